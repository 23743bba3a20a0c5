"""What rank 0 and another rank say to each other, over a pair of sockets that only these two processes hold.

rank 0 says   (verb, *arguments)
it answers    ("part", value) any number of times, each of which rank 0 may answer; then ("done", value) or ("error", error)
"""

import pickle
from multiprocessing.connection import Connection
from typing import Any


def say(line: "Connection[Any, Any]", message: Any) -> None:
    """Raises OSError if the other end is gone. Not `Connection.send`: torch makes that share memory between the two."""
    line.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def hear(line: "Connection[Any, Any]") -> Any:
    """Raises EOFError or OSError if the other end is gone."""
    return pickle.loads(line.recv_bytes())


def portable(error: Exception) -> Exception:
    """The error, or what stands for it if it cannot be said."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
