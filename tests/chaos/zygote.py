"""Starts workers and APIs in a blink: it loads torch once, and forks.

A worker's child loads torch for seconds, and a thousand kills would take hours. So this process loads everything while it
has one thread only, and forks a worker's parent when asked. That parent forks, before it does anything else, a *nursery*;
where billiard would start its child as a fresh interpreter, the nursery makes one by clone(CLONE_PARENT). The child is what
it would have been: a clean process whose parent is the worker's parent, dying with it, with nothing of it inside.

Speaks lines of JSON over a socket that its starter inherits to it: {"argv", "env", "log", "beside", "cwd"} in, {"pid"} out.
Ends with it. `argv` is what stands behind `python` or `python -m`. What is started `beside` is its starter's child, which
is to wait for it; else whoever has died is gone at once.
"""

import array
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

LOADED = (
    "workers.runner",
    "service.app",
    "celery.apps.worker",
    "celery.bin.worker",
    "celery.concurrency.prefork",
    "kombu.transport.redis",
    "psycopg",
    "uvicorn",
)
CLONE_PARENT = 0x8000
SYS_CLONE = {"x86_64": 56, "aarch64": 220}
PR_SET_PDEATHSIG = 1
LENGTH = struct.Struct("!I")
MOST_DESCRIPTORS = 16
HIGH = 200  # above all descriptors of a young process


def main(descriptor: int) -> None:
    orders = socket.socket(fileno=descriptor)
    _die_with_parent()
    _load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with orders.makefile("rw") as lines:
        print(json.dumps({"ready": True}), file=lines, flush=True)
        while line := lines.readline():
            order = json.loads(line)
            pid = _clone_beside() if order["beside"] else os.fork()
            if pid == 0:
                orders.close()
                _become(order)
            print(json.dumps({"pid": pid}), file=lines, flush=True)


def _load() -> None:
    """All that takes time; nothing that reads settings, opens a connection, or starts a thread."""
    gc.disable()  # nothing of it is garbage
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    threads = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Threads:"))
    assert threads.split() == ["Threads:", "1"], "a process with threads must not fork"


def _become(order: dict[str, Any]) -> None:
    """Never returns: this process is now `python argv...` or `python -m argv...`."""
    argv: list[str] = order["argv"]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    _die_with_parent()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    written = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(written, 1)
    os.dup2(written, 2)
    match argv:
        case ["-c", program, *_]:
            _run(lambda: exec(program, {"__name__": "__main__"}), ["-c", *argv[2:]])
        case [path, *_] if path.endswith(".py"):
            sys.path.insert(0, str(Path(path).parent))
            _run(lambda: runpy.run_path(path, run_name="__main__"), list(argv))
        case _:
            if argv[0] == "celery":
                _open_nursery()
            _run(lambda: runpy.run_module(argv[0], run_name="__main__", alter_sys=True), argv)


def _run(do: Any, argv: list[str]) -> None:
    sys.argv = argv
    code: Any = 1
    try:
        do()
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        import traceback

        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---------------------------------------------------------------- the nursery: one for each worker's parent


def _open_nursery() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.fork() == 0:
        ours.close()
        _die_with_parent()
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(one, signal.SIG_IGN)
        _nurse(theirs)
    theirs.close()

    import billiard.popen_spawn_posix

    def spawn(path: Any, argv: list[Any], descriptors: list[int]) -> int:
        """In the place of fork and exec: the same arguments, the same descriptors under the same numbers, the same result."""
        order = json.dumps({"argv": [os.fsdecode(one) for one in argv], "env": dict(os.environ), "fds": descriptors}).encode()
        ours.sendmsg(
            [LENGTH.pack(len(order))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]
        )
        ours.sendall(order)
        return LENGTH.unpack(_exactly(ours, LENGTH.size))[0]

    billiard.popen_spawn_posix.spawnv_passfds = spawn


def _nurse(orders: socket.socket) -> None:
    while True:
        head, ancillary, _, _ = orders.recvmsg(LENGTH.size, socket.CMSG_SPACE(4 * MOST_DESCRIPTORS))
        if not head:
            os._exit(0)
        received = array.array("i")
        for _, _, data in ancillary:
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
        order = json.loads(_exactly(orders, LENGTH.unpack(head)[0]))
        pid = _clone_beside()
        if pid == 0:
            orders.close()
            _be_born(order, list(received))
        orders.sendall(LENGTH.pack(pid))
        for descriptor in received:
            os.close(descriptor)


def _clone_beside() -> int:
    """fork(), but the new process is our parent's child, as if it had forked it."""
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = ctypes.CDLL(None, use_errno=True).syscall(SYS_CLONE[os.uname().machine], CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    return pid


def _be_born(order: dict[str, Any], received: list[int]) -> None:
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(one, signal.SIG_DFL)
    high = [_moved(descriptor) for descriptor in received]  # a number that is wanted may be in use for another of them
    for descriptor, number in zip(high, order["fds"], strict=True):
        os.dup2(descriptor, number, inheritable=True)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["env"])
    # argv is: python [options] -c "from billiard.spawn import spawn_main; spawn_main(...)" --billiard-fork
    program = order["argv"][order["argv"].index("-c") + 1]
    _run(lambda: exec(program, {"__name__": "__main__"}), [sys.executable, "--billiard-fork"])


def _moved(descriptor: int) -> int:
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD, HIGH)
    os.close(descriptor)
    return high


def _exactly(orders: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = orders.recv(size - len(data))
        if not more:
            os._exit(0)
        data += more
    return data


if __name__ == "__main__":
    main(int(sys.argv[1]))
