"""Start everything in order, keep it running, stop it in order."""

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import FrameType

import httpx
import uvicorn

from service.app import create_app
from service.edge.protocol import BoundedHttp
from service.local.children import Child, Say
from service.local.place import CannotStart, embedded_settings, leave_out_what_it_brings, listen, locked, url_file, url_of
from service.local.redis_server import make_redis, socket_folder, wait_for_redis
from service.local.worker import check_worker_can_run, make_loss_worker, make_worker
from service.settings import Settings
from service.store.session import upgrade
from service.telemetry import configure_logging

LOOK_EVERY_S = 0.2
READY_WITHIN_S = 60.0
REDIS_GRACE_S = 10.0
STREAMS_MAY_LAST_S = 3  # open event streams when the API stops
LOSSES_GRACE_S = 10.0
AFTER_GRACE_S = 15.0  # beyond drain_grace_s, for the worker to end by itself


def up(data_dir: Path, port: int, say: Say) -> None:
    """Run until SIGINT, SIGTERM or SIGHUP. Raises CannotStart."""
    data_dir = data_dir.absolute()
    leave_out_what_it_brings()
    with ExitStack() as stack:
        stop = stack.enter_context(_signals())
        stack.enter_context(locked(data_dir))
        listener = stack.enter_context(listen(Settings().host, port))
        check_worker_can_run(Settings())
        url = url_of(listener)
        folder = stack.enter_context(socket_folder(data_dir))
        settings = embedded_settings(data_dir, listener.getsockname()[1], folder)
        configure_logging(settings)

        redis_server = make_redis(data_dir, folder, say)
        redis_server.start()
        stack.callback(redis_server.stop, grace_s=REDIS_GRACE_S)
        wait_for_redis(redis_server, folder, lambda: stop.asked)
        upgrade(settings.sql_url)
        api = Api(settings, listener)
        stack.callback(api.stop)
        children = [redis_server]
        loss_worker = make_loss_worker(settings, say)
        if loss_worker:
            stack.callback(loss_worker.stop, grace_s=LOSSES_GRACE_S, hurry=lambda: stop.hurry)
        if worker := make_worker(settings, say):
            worker.start()  # it loads torch while the API starts
            stack.callback(_stop_worker, worker, settings, stop, say)
            children.append(worker)
        api.start()
        _wait_ready(url, api, children, stop)
        if loss_worker and not stop.asked:
            loss_worker.start()  # only now, so that loading its torch does not delay the stack
            children.append(loss_worker)
        stack.enter_context(url_file(data_dir / "url", url))
        if not stop.asked:
            say(
                f"Ratchet is ready at {url}\n"
                f"  the dashboard is there: sign in with what this prints: cat {data_dir / 'key'}\n"
                f"  data and logs in {data_dir}; stop with Ctrl-C"
            )
        while not stop.asked:
            _look(api, children)
            time.sleep(LOOK_EVERY_S)


# ---------------------------------------------------------------- the API


class Api:
    """uvicorn in its own thread. It leaves the signals to the supervisor."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        app = create_app(settings)
        config = uvicorn.Config(
            app, http=BoundedHttp, log_config=None, access_log=False, timeout_graceful_shutdown=STREAMS_MAY_LAST_S
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [listener]}, name="api", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(STREAMS_MAY_LAST_S + 5)


def _wait_ready(url: str, api: Api, children: list[Child], stop: "Stop") -> None:
    until, said = time.monotonic() + READY_WITHIN_S, "nothing"
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while not stop.asked:
            _look(api, children)
            time.sleep(0.05)
            with suppress(httpx.TransportError):
                answer = client.get(f"{url}/readyz")
                if answer.is_success:
                    return
                said = answer.text[:500]
            if time.monotonic() > until:
                raise CannotStart(f"{url}/readyz did not answer 200 within {READY_WITHIN_S:.0f} s; it said: {said}")


def _look(api: Api, children: list[Child]) -> None:
    if not api.alive:
        raise CannotStart("the API ended; its last messages stand above")
    for child in children:
        child.look()


# ---------------------------------------------------------------- stopping


class Stop:
    """Whether a signal asked us to stop, and whether Ctrl-C asked us after that to hurry.

    No other signal hurries, however often it comes: `ratchet down` sends SIGTERM and a closed terminal SIGHUP, and both promise
    that the running job is saved.
    It uses plain attributes, because the code that a signal interrupts may hold any lock, even that of an Event.
    """

    def __init__(self) -> None:
        self.asked = self.hurry = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.hurry = self.asked
        self.asked = True


@contextmanager
def _signals() -> Iterator[Stop]:
    stop = Stop()
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_worker(worker: Child, settings: Settings, stop: Stop, say: Say) -> None:
    say("stopping; a running job is saved first (Ctrl-C again to stop at once)")
    worker.stop(grace_s=settings.drain_grace_s + AFTER_GRACE_S, hurry=lambda: stop.hurry)
