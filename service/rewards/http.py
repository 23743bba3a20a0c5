"""The grader that calls the user's own reward service: it sends batches of samples and gets rewards (docs/graders.md)."""

import asyncio
import hashlib
import hmac
import json
import random
from collections.abc import Mapping, Sequence
from time import time
from typing import Any

import httpx

from service.errors import JobFailed
from service.jobs.resolve_reward import NETWORKS
from service.outgoing import AddressNotAllowed, Checked, NameNotAllowed, certificates, checked
from service.rewards.samples import Grader, GraderContext, NotGraded, Outcome, Sample
from service.spec.addresses import address_refused, name_refused
from service.spec.reward import HttpGrader
from service.validation.words import counted

AT_ONCE = 8  # batches in flight
FIRST_PAUSE_S = 0.5  # before the first retry; doubled for each further one, with jitter
LONGEST_PAUSE_S = 30.0
LONGEST_RETRY_AFTER_S = 120.0
MAX_ANSWER_BYTES = 16 * 2**20
SHOWN = 200  # characters of a service's response in an error message

Headers = Mapping[str, str]


class Retry(Exception):
    """An attempt failed, and another may succeed."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class NameRefused(Retry):
    """The host's name is not found, or leads where nothing may be reached. Both end alike, after as many attempts."""


def sign(secret: str, body: bytes, timestamp: int) -> str:
    """The value of Ratchet-Signature: HMAC-SHA256 over `TIMESTAMP.BODY`, in hex."""
    digest = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


class HttpRewards(Grader):
    """Posts batches in parallel. If the service is down after all retries, the job pauses as grader_unhealthy."""

    def __init__(self, spec: HttpGrader, context: GraderContext) -> None:
        self._spec, self._context = spec, context
        self._runner: asyncio.Runner | None = None
        self._client: httpx.AsyncClient | None = None
        self._secret = None
        if spec.secret is not None:
            if spec.secret not in context.secrets:
                raise self._down(f"the operator has set no secret {spec.secret!r}", hint="name it in RATCHET_GRADER_SECRETS")
            self._secret = context.secrets[spec.secret]

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        if not samples:
            return []
        if self._runner is None:
            # One event loop for the grader's life, so that its connections are kept from step to step.
            self._runner = asyncio.Runner()
        try:
            return self._runner.run(self._grade(samples))
        except ExceptionGroup as group:  # one batch gave up, and the others were cancelled
            raise group.exceptions[0] from None

    def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            if self._client is not None:
                runner.run(self._client.aclose())
                self._client = None
            runner.close()

    async def _grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        if self._client is None:
            limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
            # `_once` bounds the time of a whole attempt. No proxy from the environment, because it would choose the address.
            self._client = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(verify=certificates(), limits=limits), timeout=None
            )
        turns, size = asyncio.Semaphore(AT_ONCE), self._spec.batch_size
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._batch(self._client, samples[i : i + size], turns)) for i in range(0, len(samples), size)
            ]
        return [outcome for task in tasks for outcome in task.result()]

    async def _batch(self, client: httpx.AsyncClient, samples: Sequence[Sample], turns: asyncio.Semaphore) -> list[Outcome]:
        async with turns:
            body, batch_id = self._body(samples)
            for attempt in range(self._spec.max_retries + 1):
                try:
                    answer = await self._once(client, body, batch_id, attempt)
                    return read_rewards(answer, len(samples))
                except Retry as retry:
                    if attempt == self._spec.max_retries:
                        raise self._gave_up(retry, attempt + 1) from None
                    await asyncio.sleep(_pause_s(attempt, retry.after_s))
        raise AssertionError("unreachable")

    async def _once(self, client: httpx.AsyncClient, body: bytes, batch_id: str, attempt: int) -> bytes:
        """One attempt, bounded by timeout_s as a whole: a service that sends a byte now and then also times out."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Idempotency-Key": batch_id}
        if self._secret is not None:
            headers["Ratchet-Signature"] = sign(self._secret.get_secret_value(), body, int(time()))
        try:
            async with asyncio.timeout(self._spec.timeout_s):
                to = await self._address(attempt)
                headers["Host"] = to.host
                sent = client.stream("POST", to.url, content=body, headers=headers, extensions=to.extensions)
                async with sent as response:
                    answer = await _read(response)
        except TimeoutError:
            raise Retry(f"no answer within {self._spec.timeout_s:g} s (timeout_s)") from None
        except httpx.TransportError as error:
            raise Retry(f"{type(error).__name__}: {error}") from None
        status = f"status {response.status_code}"
        if response.status_code == 429 or response.status_code >= 500:
            raise Retry(f"{status}{_shown(answer)}", _retry_after_s(response.headers))
        if response.status_code != 200:
            raise self._down(f"{status}{_shown(answer)}; only 200 is taken, and only 429 and 5xx are tried again")
        return answer

    async def _address(self, attempt: int) -> Checked:
        try:
            return await checked(self._spec.url, self._context.networks, attempt)
        except ValueError as error:
            raise self._down(str(error)) from None
        except NameNotAllowed:
            raise NameRefused(name_refused(NETWORKS)) from None
        except AddressNotAllowed:
            raise self._refused(address_refused(NETWORKS)) from None

    def _body(self, samples: Sequence[Sample]) -> tuple[bytes, str]:
        """The request and its id, which is a hash, so that the same samples always have the same id."""
        content = {
            "job_id": self._context.job_id,
            "grader": self._context.name,
            "samples": [
                {
                    "index": index,
                    "prompt": sample.prompt,
                    "completion": sample.completion,
                    "tokens": sample.tokens,
                    "truncated": sample.truncated,
                    "row": sample.row,
                }
                for index, sample in enumerate(samples)
            ],
        }
        # ASCII, because an answer may end in half a character, which UTF-8 cannot encode; str, because rows may contain dates.
        text = json.dumps(content, default=str)
        batch_id = f"batch_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        return json.dumps({"batch_id": batch_id, **content}, default=str).encode(), batch_id

    def _gave_up(self, retry: Retry, attempts: int) -> JobFailed:
        tried = f"(after {attempts} attempt" + ("s)" if attempts > 1 else ")")
        return self._refused(f"{retry} {tried}") if isinstance(retry, NameRefused) else self._down(f"{retry} {tried}")

    def _refused(self, reason: str) -> JobFailed:
        return JobFailed("grader_address_refused", f"{self._named}: {reason}", pointer=self._context.pointer)

    def _down(self, reason: str, hint: str | None = None) -> JobFailed:
        return JobFailed(
            "grader_unhealthy",
            f"{self._named} cannot be used: {reason}",
            hint=hint
            or "see that the service runs, is reachable from the worker and answers as docs/graders.md says; then resume",
            pointer=self._context.pointer,
        )

    @property
    def _named(self) -> str:
        return f"the reward service of grader {self._context.name!r} at {_without_query(self._spec.url)}"


def read_rewards(answer: bytes, expected: int) -> list[Outcome]:
    """One outcome per sample. If the response as a whole is invalid, every sample has an error."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return [NotGraded(f"the reward service did not answer JSON{_shown(answer)}")] * expected
    rewards = value.get("rewards") if isinstance(value, dict) else None
    if not isinstance(rewards, list):
        return [NotGraded(f'the reward service must answer {{"rewards": [...]}}, got{_shown(answer)}')] * expected
    if len(rewards) != expected:
        return [
            NotGraded(f"the reward service answered {counted(len(rewards), 'reward')} to {counted(expected, 'sample')}")
        ] * expected
    return [_reward(reward) for reward in rewards]


def _reward(value: Any) -> Outcome:
    if isinstance(value, dict):
        if value.get("error") is not None:
            return NotGraded(f"the reward service says: {str(value['error'])[:SHOWN]}")
        value = value.get("reward")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NotGraded(f"a reward must be a number, {{reward: number}} or {{error: text}}, got {json.dumps(value)[:SHOWN]}")
    try:
        return float(value)  # NaN and infinities are refused later, for all graders
    except OverflowError:
        return NotGraded("the reward is too large for a float")


async def _read(response: httpx.Response) -> bytes:
    answer = bytearray()
    async for part in response.aiter_bytes():
        answer += part
        if len(answer) > MAX_ANSWER_BYTES:
            raise Retry(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(answer)


def _pause_s(attempt: int, after_s: float | None) -> float:
    if after_s is not None:
        return min(after_s, LONGEST_RETRY_AFTER_S)
    longest = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
    return longest * random.SystemRandom().uniform(0.5, 1.0)  # its own random source: it must not change a job's draws


def _retry_after_s(headers: Headers) -> float | None:
    """The header in seconds; None if it is absent or a date."""
    text = headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else None


def _shown(answer: bytes) -> str:
    text = answer[: 4 * SHOWN].decode("utf-8", "replace").strip()
    return f": {text[:SHOWN]!r}" if text else " with an empty body"


def _without_query(url: str) -> str:
    return url.split("?", 1)[0].split("#", 1)[0]
