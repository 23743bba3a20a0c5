"""A session as an object: operations are numbered, sent together where they wait, sent again where an answer was lost.

    session = ratchet.session(model={"source": "tiny"}, name="my loop")
    groups = session.sample(["rev 123456>"], num_samples=8)         # done when it returns
    later = session.submit.train_step(groups, objective="gspo")     # goes on beside you
    metrics = later.result()

`AsyncSession` does the work; `Session` runs one in a thread of its own.

An operation gets its number (`seq`) when it is sent, and one request is under way at a time, so that a refused one takes no
number. What was sent is sent again with the same number until it is answered, which the service takes for one operation. The
service may hold an answer back until the operation is done; if another operation is to be sent meanwhile, that request is
given up, and sent again without waiting.
"""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from math import ceil
from threading import Thread
from time import monotonic
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx

from ratchet_client import operations, tensors
from ratchet_client.errors import RatchetApiError, RatchetError, RatchetOperationError
from ratchet_client.operations import Operation
from ratchet_client.resources.base import part
from ratchet_client.transport import AsyncTransport, parsed

T = TypeVar("T")
P = ParamSpec("P")

JSON, TENSORS = "application/json", "application/vnd.safetensors"
HOLD_S = 30.0  # the service is asked to hold a request for so long
GATHER_S = 0.002  # what nobody waits for is sent after so long, together with what came meanwhile
AT_ONCE = 256  # operations in one request
BODY_AT_FAULT = frozenset({400, 413, 415, 422})  # nothing was logged, and other bodies may fare better
POLLS = 8  # answers that are waited for at once


class AsyncHandle(Generic[T]):
    """An operation that was submitted. `await` it, or its `result`, as often as you like."""

    def __init__(self, session: "AsyncSession", operation: Operation[T]) -> None:
        self.operation = operation
        self.head = _text(operation.head)
        self.seq: int | None = None  # once it is sent
        self._session = session
        self._settled = asyncio.Event()  # sent, or never to be
        self._error: RatchetError | None = None
        self._answer: dict[str, Any] | None = None
        self._wanted = False

    def __await__(self) -> Generator[Any, None, T]:
        return self.result().__await__()

    async def result(self, timeout_s: float | None = None) -> T:
        """What came of it. Raises RatchetOperationError if it failed, RatchetApiError if it was refused, TimeoutError."""
        self._wanted = True
        self._session.somebody_waits.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
                if self._error is None and self._answer is None:
                    await self._session._collect(self)  # pyright: ignore[reportPrivateUsage]
        except TimeoutError:
            raise TimeoutError(f"{self.operation.kind} (operation {self.seq}) is not done after {timeout_s} s") from None
        return self.outcome()

    def outcome(self) -> T:
        """What `result` returns or raises, once it is `done`."""
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self.operation.read(self._answer)

    def take(self, view: dict[str, Any]) -> None:
        """The operation as the service shows it; what it holds of an answer is kept."""
        if view["status"] == "failed":
            self._error = RatchetOperationError(view)
        elif view["status"] == "done" and view["result"] is None:
            self._error = RatchetError(f"the answer of {view['id']} has expired")
        elif view["status"] == "done":
            self._answer = view["result"]

    def take_answer(self, answer: dict[str, Any]) -> None:
        self._answer = answer

    def settle(self, error: RatchetError | None = None) -> None:
        self._error = self._error or error
        self._settled.set()

    @property
    def done(self) -> bool:
        """Whether `result` returns at once."""
        return self._error is not None or self._answer is not None

    @property
    def wanted(self) -> bool:
        return self._wanted

    def want(self) -> None:
        self._wanted = True


def _awaited(build: Callable[P, Operation[T]]) -> Callable[Concatenate["AsyncSession", P], Awaitable[T]]:
    @wraps(build)
    async def call(self: "AsyncSession", *args: P.args, **options: P.kwargs) -> T:
        handle = self.submitted(build(*args, **options), wanted=True)
        return await handle

    return call


def _submitted_async(build: Callable[P, Operation[T]]) -> Callable[Concatenate["AsyncSubmit", P], AsyncHandle[T]]:
    @wraps(build)
    def call(self: "AsyncSubmit", *args: P.args, **options: P.kwargs) -> AsyncHandle[T]:
        return self.session.submitted(build(*args, **options))

    return call


class AsyncSubmit:
    """The operations, each of which returns a handle at once."""

    def __init__(self, session: "AsyncSession") -> None:
        self.session = session

    sample = _submitted_async(operations.sample)
    evaluate = _submitted_async(operations.evaluate)
    forward = _submitted_async(operations.forward)
    forward_backward = _submitted_async(operations.forward_backward)
    optim_step = _submitted_async(operations.optim_step)
    train_step = _submitted_async(operations.train_step)
    save = _submitted_async(operations.save)
    load = _submitted_async(operations.load)
    finish = _submitted_async(operations.finish)


class AsyncSession:
    """One session, for one event loop. Made by `await ratchet.async_session(...)`. One program at a time may send operations.

    If the service cannot be reached for `reconnect_for_s`, RatchetConnectionError is raised, and all later operations are
    refused with it: open the session again (`async_session(id)`) and look what was done.
    """

    def __init__(self, transport: AsyncTransport, session_id: str, next_seq: int, *, reconnect_for_s: float) -> None:
        self.id = session_id
        self.next_seq = next_seq
        self.submit = AsyncSubmit(self)
        self._transport, self._reconnect_for_s = transport, reconnect_for_s
        self._path = f"/v1/sessions/{part(session_id)}/operations"
        self._outbox = deque[AsyncHandle[Any]]()
        self._arrived = asyncio.Event()
        self.somebody_waits = asyncio.Event()  # for a handle that was not wanted when it came
        self._sender: asyncio.Task[None] | None = None
        self._polls = asyncio.Semaphore(POLLS)
        self._broken: RatchetError | None = None

    sample = _awaited(operations.sample)
    evaluate = _awaited(operations.evaluate)
    forward = _awaited(operations.forward)
    forward_backward = _awaited(operations.forward_backward)
    optim_step = _awaited(operations.optim_step)
    train_step = _awaited(operations.train_step)
    save = _awaited(operations.save)
    load = _awaited(operations.load)
    finish = _awaited(operations.finish)

    def submitted(self, operation: Operation[T], *, wanted: bool = False) -> AsyncHandle[T]:
        handle = AsyncHandle(self, operation)
        if wanted:
            handle.want()
        self.enqueue(handle)
        return handle

    def enqueue(self, handle: AsyncHandle[Any]) -> None:
        """To be called in the event loop."""
        if self._broken is not None:
            handle.settle(self._broken)
            return
        self._outbox.append(handle)
        self._arrived.set()
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all())

    async def close(self) -> None:
        """Close the connection. The session stays, rests when it has been idle for a while, and can be opened again."""
        self._break(RatchetError(f"{self.id} was closed here; open it again by its id"))
        if self._sender is not None:
            self._sender.cancel()
        await self._transport.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ---------------------------------------------------------------- sending

    async def _send_all(self) -> None:
        try:
            while self._outbox:
                if not any(handle.wanted for handle in self._outbox):
                    self.somebody_waits.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(GATHER_S):
                            await self.somebody_waits.wait()
                await self._deliver(self._together())
        except Exception as error:
            self._break(RatchetError(f"operations of {self.id} could not be sent: {error!r}"))
            raise
        finally:
            self._sender = None

    def _together(self) -> list[AsyncHandle[Any]]:
        """The next handles that fit into one request: several as JSON, or one as tensors."""
        batch = [self._outbox.popleft()]
        if batch[0].operation.tensors is None:
            while self._outbox and self._outbox[0].operation.tensors is None and len(batch) < AT_ONCE:
                batch.append(self._outbox.popleft())
        return batch

    async def _deliver(self, batch: list[AsyncHandle[Any]]) -> None:
        for place, handle in enumerate(batch):
            handle.seq = self.next_seq + place
        try:
            views = await self._post(batch)
        except RatchetApiError as error:
            if error.status in BODY_AT_FAULT and error.code != "seq_reused":
                if len(batch) > 1:  # the fault of one is not that of the others
                    for handle in batch:
                        await self._deliver([handle])
                    return
                batch[0].seq = None
                batch[0].settle(error)
                return
            self._break(error, batch)
        except RatchetError as error:
            self._break(error, batch)
        else:
            self.next_seq += len(batch)
            for handle, view in zip(batch, views, strict=True):
                handle.take(view)
                handle.settle()

    def _break(self, error: RatchetError, batch: Sequence[AsyncHandle[Any]] = ()) -> None:
        """It is not known what the service has: nothing more is sent."""
        self._broken = self._broken or error
        for handle in (*batch, *self._outbox):
            handle.settle(error)
        self._outbox.clear()

    async def _post(self, batch: list[AsyncHandle[Any]]) -> list[dict[str, Any]]:
        """Send these, and send them again until they are logged. Returns them as the service shows them."""
        body, sent_as = _body(batch)
        holds = any(handle.wanted for handle in batch) and not any(handle.operation.large_answer for handle in batch)
        self._arrived.clear()
        if self._outbox or not holds:
            return await self._posted(body, sent_as, 0.0)
        held = asyncio.create_task(self._posted(body, sent_as, HOLD_S))
        arrived = asyncio.create_task(self._arrived.wait())
        try:
            await asyncio.wait((held, arrived), return_when=asyncio.FIRST_COMPLETED)
            if held.done():
                return held.result()
        finally:
            held.cancel()
            arrived.cancel()
        return await self._posted(body, sent_as, 0.0)

    async def _posted(self, body: bytes, sent_as: str, hold_s: float) -> list[dict[str, Any]]:
        headers = {"Content-Type": sent_as, "Accept": JSON}
        response = await self._exchange("POST", self._path, headers, hold_s, content=body)
        answer = parsed(self._transport.base_url, response)
        return answer["data"] if answer["object"] == "list" else [answer]

    # ---------------------------------------------------------------- collecting

    async def _collect(self, handle: AsyncHandle[Any]) -> None:
        """Wait until the operation is done."""
        path, wanted = f"{self._path}/{handle.seq}", TENSORS if handle.operation.large_answer else JSON
        async with self._polls:
            while not handle.done:
                try:
                    response = await self._exchange("GET", path, {"Accept": wanted}, HOLD_S)
                except RatchetApiError:
                    if wanted == JSON:
                        raise
                    wanted = JSON  # which says more of a failed operation
                    continue
                if response.headers.get("content-type", "").startswith(TENSORS):
                    handle.take_answer(tensors.decode(response.content))
                else:
                    handle.take(parsed(self._transport.base_url, response))

    async def _exchange(self, method: str, path: str, headers: dict[str, str], hold_s: float, **content: Any) -> httpx.Response:
        prefer = {"Prefer": f"wait={ceil(hold_s)}"} if hold_s else {}
        timeout_s = self._transport.timeout_s + hold_s

        def attempt() -> Awaitable[httpx.Response]:
            return self._transport.attempt(method, path, headers=headers | prefer, timeout_s=timeout_s, **content)

        return await self._transport.until_answered(attempt, until=monotonic() + self._reconnect_for_s)


def _body(batch: list[AsyncHandle[Any]]) -> tuple[bytes, str]:
    """The request's body and its media type."""
    heads = [f'{{"seq":{handle.seq},{handle.head[1:]}' for handle in batch]
    if (given := batch[0].operation.tensors) is not None:
        return tensors.encode(given, heads[0]), TENSORS
    text = heads[0] if len(heads) == 1 else f'{{"operations":[{",".join(heads)}]}}'
    return text.encode(), JSON


def _text(head: Mapping[str, Any]) -> str:
    """An object with at least one member, as JSON. Raises ValueError for numbers that JSON does not have."""
    try:
        return json.dumps(head, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise ValueError(f"{head['kind']}: all numbers must be finite ({error})") from None


# ---------------------------------------------------------------- without an event loop


class Handle(Generic[T]):
    """An operation that was submitted."""

    def __init__(self, handle: AsyncHandle[T], loop: asyncio.AbstractEventLoop) -> None:
        self._handle, self._loop = handle, loop

    @property
    def seq(self) -> int | None:
        return self._handle.seq

    @property
    def done(self) -> bool:
        return self._handle.done

    def result(self, timeout_s: float | None = None) -> T:
        """What came of it. Raises RatchetOperationError if it failed, RatchetApiError if it was refused, TimeoutError."""
        if self.done:
            return self._handle.outcome()
        if self._loop.is_closed():
            raise RatchetError("the session was closed here; open it again by its id")
        waiting = asyncio.run_coroutine_threadsafe(self._handle.result(timeout_s), self._loop)
        try:
            return waiting.result()
        finally:
            waiting.cancel()


def _blocking(build: Callable[P, Operation[T]]) -> Callable[Concatenate["Session", P], T]:
    @wraps(build)
    def call(self: "Session", *args: P.args, **options: P.kwargs) -> T:
        return self.submitted(build(*args, **options), wanted=True).result()

    return call


def _submitted(build: Callable[P, Operation[T]]) -> Callable[Concatenate["Submit", P], Handle[T]]:
    @wraps(build)
    def call(self: "Submit", *args: P.args, **options: P.kwargs) -> Handle[T]:
        return self.session.submitted(build(*args, **options))

    return call


class Submit:
    """The operations, each of which returns a handle at once."""

    def __init__(self, session: "Session") -> None:
        self.session = session

    sample = _submitted(operations.sample)
    evaluate = _submitted(operations.evaluate)
    forward = _submitted(operations.forward)
    forward_backward = _submitted(operations.forward_backward)
    optim_step = _submitted(operations.optim_step)
    train_step = _submitted(operations.train_step)
    save = _submitted(operations.save)
    load = _submitted(operations.load)
    finish = _submitted(operations.finish)


class Session:
    """One session. Made by `ratchet.session(...)`; safe to share between threads. Errors as in `AsyncSession`.

    Each operation returns when it is done; `submit` has the same operations, which return a handle at once.
    """

    def __init__(self, session: AsyncSession) -> None:
        self.id = session.id
        self.submit = Submit(self)
        self._session = session
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name=f"ratchet {self.id}", daemon=True)
        self._thread.start()

    sample = _blocking(operations.sample)
    evaluate = _blocking(operations.evaluate)
    forward = _blocking(operations.forward)
    forward_backward = _blocking(operations.forward_backward)
    optim_step = _blocking(operations.optim_step)
    train_step = _blocking(operations.train_step)
    save = _blocking(operations.save)
    load = _blocking(operations.load)
    finish = _blocking(operations.finish)

    @property
    def next_seq(self) -> int:
        """The number of the next operation to be sent."""
        return self._session.next_seq

    def submitted(self, operation: Operation[T], *, wanted: bool = False) -> Handle[T]:
        if self._loop.is_closed():
            raise RatchetError(f"{self.id} was closed here; open it again by its id")
        handle = AsyncHandle(self._session, operation)
        if wanted:
            handle.want()
        self._loop.call_soon_threadsafe(self._session.enqueue, handle)
        return Handle(handle, self._loop)

    def close(self) -> None:
        """Close the connection. The session stays, rests when it has been idle for a while, and can be opened again."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
