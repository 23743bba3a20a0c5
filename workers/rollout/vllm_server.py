"""The wire of a vLLM server, as version 0.33 speaks it: OpenAI's completions, LoRA adapters by name, what it says of itself.

Whatever fails and may succeed later is tried again, up to `wait_s` after a request's first failure. docs/rollout-engines.md
lists the facts that this module relies on, with their places in vLLM's source.
"""

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from itertools import count
from threading import Thread
from time import monotonic
from typing import Any, Generic, TypeVar

import httpx
from pydantic import SecretStr

from service.errors import JobFailed
from service.jobs.resolve_rollout import NETWORKS
from service.outgoing import AddressNotAllowed, NameNotAllowed, certificates, checked
from service.spec.addresses import Networks, address_refused, name_refused
from service.spec.training import VllmEngine
from service.validation.words import counted

POINTER, COMPLETIONS = "/rollout/engine", "/v1/completions"
WATCH_S = 0.5  # how often the owner's wishes are looked at while requests are under way
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # before a request is sent again; doubled each time, with jitter
MAX_ANSWER_BYTES = 64 * 2**20
SHOWN = 300  # characters of the server's words in an error message
NOT_JSON = "not JSON compliant"  # vLLM answers so where a log-prob is NaN: its JSON encoder refuses it
T = TypeVar("T")

log = logging.getLogger(__name__)


class Again(Exception):
    """A request failed, and another may succeed."""


class AgainByName(Again):
    """The host's name was not found, or leads where nothing may be reached."""


class NoSuchModel(Exception):
    """The server does not know the model or adapter that was asked for."""


class NonFinite(Exception):
    """The server computed a log-prob that is not finite."""


class Underway(Generic[T]):
    """Work that a thread does on an event loop, while whoever wants it does something else. Until it is done or ended, nothing
    else may run on that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self.seconds = 0.0  # that it took, once it is done
        self._loop, self._task = loop, loop.create_task(work)
        self._thread = Thread(target=self._run, name="rollout ahead", daemon=True)
        self._thread.start()

    def wait(self, check: Callable[[], object], every_s: float) -> None:
        """Until it is done. `check` is called meanwhile; what it raises ends the waiting, not the work."""
        while self._thread.is_alive():
            self._thread.join(every_s)
            check()

    def outcome(self) -> T:
        """What came of it, once it is done."""
        return self._task.result()

    def end(self) -> None:
        """End it, if it is not done."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        since = monotonic()
        with suppress(BaseException):  # `outcome` raises it
            self._loop.run_until_complete(self._task)
        self.seconds = monotonic() - since


class Server:
    """One vLLM server. Not safe for several threads. `check` is called while requests are under way; what it raises ends
    them."""

    def __init__(
        self, spec: VllmEngine, *, networks: Networks, key: SecretStr | None, check: Callable[[], object] = lambda: None
    ) -> None:
        self.spec, self._networks, self._key, self._check = spec, networks, key, check
        self._runner = asyncio.Runner()  # one event loop for the server's life, so that its connections are kept
        self._client: httpx.AsyncClient | None = None
        self._underway: Underway[Any] | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of this work, which waits for what is under way."""
        if self._underway is not None:
            try:
                self._underway.wait(self._check, WATCH_S)
            except BaseException:
                work.close()
                raise
            self._underway = None
        return self._runner.run(self._watched(work))

    def begin(self, work: Coroutine[Any, Any, T]) -> Underway[T]:
        """Have a thread do this work. Before anything else is asked of the server, it is waited for."""
        assert self._underway is None, "`run` has waited for it"
        self._underway = Underway(self._runner.get_loop(), work)
        return self._underway

    def result(self, underway: Underway[T]) -> T:
        """What came of work that was begun."""
        underway.wait(self._check, WATCH_S)
        return underway.outcome()

    def end(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """End tasks that `run` left under way."""
        self._runner.run(_ended(list(tasks)))

    def forget_wishes(self) -> None:
        """Call `check` no more, and end what is under way: what follows is the end."""
        self._check = lambda: None
        if self._underway is not None:
            self._underway.end()

    def close(self) -> None:
        if self._client is not None:
            self._runner.run(self._client.aclose())
        self._runner.close()

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=WATCH_S))[0]:
                self._check()
        except BaseException:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        return task.result()

    # ---------------------------------------------------------------- what it says

    async def models(self) -> list[dict[str, Any]]:
        """Its base and all adapters: `id`, for adapters `parent`, for the base `max_model_len`."""
        found = (await self._ask("GET", "/v1/models")).get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) and isinstance(one.get("id"), str) for one in found):
            raise self.mismatch("its /v1/models lists no models: it is no vLLM server")
        return found

    async def version(self) -> str:
        return str((await self._ask("GET", "/version")).get("version"))

    async def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with nothing before or behind it."""
        body = {"model": self.spec.served_model, "prompt": text, "add_special_tokens": False}
        try:
            return (await self._ask("POST", "/tokenize", body)).get("tokens") or []
        except NoSuchModel as error:
            raise self.mismatch(f"it answers /tokenize with {error}") from None

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/completions; again, if the server broke the answer off. Raises NoSuchModel, NonFinite, JobFailed."""

        async def once(attempt: int) -> dict[str, Any]:
            status, content = await self._once("POST", COMPLETIONS, body, attempt)
            answer = await self._read(COMPLETIONS, status, content, ())
            choices = answer.get("choices")
            for choice in choices if isinstance(choices, list) else ():
                if isinstance(choice, dict) and (reason := choice.get("finish_reason")) not in ("stop", "length"):
                    raise Again(f"it broke an answer off: finish_reason {reason}")
            return answer

        return await self._patiently(once)

    async def knows_token(self, model: str, token: int) -> bool:
        """Whether the model's vocabulary has this token: a bias of 0 on one that it has not is refused."""
        body = {"model": model, "prompt": [0], "max_tokens": 1, "temperature": 0.0, "logit_bias": {str(token): 0.0}}
        answer = await self._ask("POST", COMPLETIONS, body, also=(400,))
        if "error" in answer and "vocab" not in _words(answer):
            raise self.refused(f"it does not take a logit_bias{_words(answer)}", None)
        return "error" not in answer

    # ---------------------------------------------------------------- adapters

    async def load(self, name: str, path: str) -> None:
        """Load the adapter in this folder, as the server sees it, under a name that no other adapter ever has."""
        try:
            answer = await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, also=(400, 500))
        except NoSuchModel as error:
            if "adapter" in str(error).lower():
                raise self.refused(
                    f"it finds no adapter in {path}",
                    "mount the folder RATCHET_ROLLOUT_ADAPTERS_DIR there, readable for it; if its path differs, set "
                    "RATCHET_ROLLOUT_ADAPTERS_SEEN_AS",
                ) from None
            raise self.refused(
                "it has no route to load adapters",
                "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and --max-lora-rank of the job's rank",
            ) from None
        words = _words(answer)
        if "error" in answer and "already been loaded" not in words:
            raise self.refused(
                f"it does not load the adapter{words}",
                "it needs --enable-lora, --max-lora-rank of at least the job's rank, and support for LoRA on the layers in "
                "model.adapter.target_modules",
            )

    async def unload(self, name: str) -> bool:
        """Remove an adapter, in one try. Returns whether it is gone."""
        path = "/v1/unload_lora_adapter"
        try:
            await self._read(path, *(await self._once("POST", path, {"lora_name": name}, 0)), ())
        except NoSuchModel:
            return True
        except (Again, JobFailed) as error:
            log.warning("the vLLM server at %s does not unload %s: %s", self.spec.url, name, error)
            return False
        return True

    # ---------------------------------------------------------------- one request

    async def _ask(self, method: str, path: str, body: Any = None, *, also: tuple[int, ...] = ()) -> dict[str, Any]:
        """The JSON object that it answers with 200 (a text counts as an empty one) or, with its error, a status in `also`."""

        async def once(attempt: int) -> dict[str, Any]:
            status, answer = await self._once(method, path, body, attempt)
            return await self._read(path, status, answer, also)

        return await self._patiently(once)

    async def _patiently(self, once: Callable[[int], Awaitable[T]]) -> T:
        failed_at: float | None = None
        for attempt in count():
            try:
                return await once(attempt)
            except Again as again:
                now = monotonic()
                failed_at = now if failed_at is None else failed_at
                if now - failed_at >= self.spec.wait_s:
                    raise self._gave_up(again, attempt + 1, now - failed_at) from None
                longest = min(FIRST_PAUSE_S * 2 ** min(attempt, 10), LONGEST_PAUSE_S)
                # Its own random source: it must not change a job's draws.
                await asyncio.sleep(longest * random.SystemRandom().uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    async def _once(self, method: str, path: str, body: Any, attempt: int) -> tuple[int, bytes]:
        if self._client is None:
            limits = httpx.Limits(max_connections=self.spec.at_once, max_keepalive_connections=self.spec.at_once)
            # `timeout_s` bounds the whole request. No proxy from the environment, because it would choose the address.
            self._client = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(verify=certificates(), limits=limits), timeout=None
            )
        headers = {"Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        content = None
        if body is not None:
            content, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            async with asyncio.timeout(self.spec.timeout_s):
                to = await checked(self.spec.url + path, self._networks, attempt)
                headers["Host"] = to.host
                async with self._client.stream(
                    method, to.url, content=content, headers=headers, extensions=to.extensions
                ) as sent:
                    return sent.status_code, await _bounded(sent)
        except ValueError as error:
            raise self._address_refused(str(error)) from None
        except NameNotAllowed:
            raise AgainByName(name_refused(NETWORKS)) from None
        except AddressNotAllowed:
            raise self._address_refused(address_refused(NETWORKS)) from None
        except TimeoutError:
            raise Again(
                f"no answer within {self.spec.timeout_s:g} s ({POINTER.strip('/').replace('/', '.')}.timeout_s)"
            ) from None
        except httpx.TransportError as error:
            raise Again(f"{type(error).__name__}: {error}") from None

    async def _read(self, path: str, status: int, answer: bytes, also: tuple[int, ...]) -> dict[str, Any]:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            value = None
        said = value if isinstance(value, dict) else {}
        told = f"status {status}{_words(said) or _shown(answer)}"
        if status == 200:
            return said
        if NOT_JSON in told:
            raise NonFinite(told)
        if status == 404:
            raise NoSuchModel(told)
        if status in also and (status < 500 or await self._is_healthy()):  # of a healthy server it is an answer
            return said if "error" in said else {"error": {"message": told}}
        if status in (408, 429) or status >= 500:
            raise Again(told)
        if status in (401, 403):
            hint = "let the operator set its key: RATCHET_ROLLOUT_KEYS, a JSON object of URL and key"
            raise self.refused(f"{path}: {told}", hint)
        raise self.refused(f"{path}: {told}", None)

    async def _is_healthy(self) -> bool:
        try:
            return (await self._once("GET", "/health", None, 0))[0] == 200
        except Again:
            return False

    # ---------------------------------------------------------------- failures

    def mismatch(self, reason: str, hint: str | None = None) -> JobFailed:
        return JobFailed("rollout_mismatch", f"{self._named}: {reason}", hint=hint, pointer=POINTER)

    def refused(self, reason: str, hint: str | None) -> JobFailed:
        return JobFailed("rollout_refused", f"{self._named}: {reason}", hint=hint, pointer=POINTER)

    def unavailable(self, reason: str, hint: str | None = None) -> JobFailed:
        return JobFailed("rollout_unavailable", f"{self._named}: {reason}", hint=hint, pointer=POINTER)

    def _address_refused(self, reason: str) -> JobFailed:
        return JobFailed("rollout_address_refused", f"{self._named}: {reason}", pointer=f"{POINTER}/url")

    def _gave_up(self, again: Again, attempts: int, seconds: float) -> JobFailed:
        tried = f"{again} (tried {counted(attempts, 'time')} in {seconds:.0f} s, rollout.engine.wait_s)"
        return self._address_refused(tried) if isinstance(again, AgainByName) else self.unavailable(tried)

    @property
    def _named(self) -> str:
        return f"the vLLM server at {self.spec.url}"


async def _ended(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _bounded(response: httpx.Response) -> bytes:
    answer = bytearray()
    async for part in response.aiter_bytes():
        answer += part
        if len(answer) > MAX_ANSWER_BYTES:
            raise Again(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(answer)


def _words(answer: dict[str, Any]) -> str:
    """The message of an error, as vLLM writes it; empty if there is none."""
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return f": {str(message)[:SHOWN]!r}" if message else ""


def _shown(answer: bytes) -> str:
    text = answer[: 4 * SHOWN].decode("utf-8", "replace").strip()
    return f": {text[:SHOWN]!r}" if text else " with an empty body"
