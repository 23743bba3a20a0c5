"""Errors go from process to process: what a process pool raises is what was raised in its child."""

import copy
import multiprocessing
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from typing import Any

import pytest
from celery.exceptions import reraise

import ratchet_client
import service
import workers
from ratchet_client.errors import RatchetApiError, RatchetLossPending
from service.errors import FieldError, JobFailed
from workers.policy.errors import Subject

PACKAGES = (service, workers, ratchet_client)
WRONG = FieldError("/model/source", "there is no such model", "unknown_model", got="tiny2", allowed=["tiny"])
PROBLEM = {"code": "busy", "detail": "too many wait", "hint": "wait", "retryable": True, "errors": [WRONG.as_dict()]}

LOST = {"code": "operation_lost", "detail": "the worker died", "category": "server", "hint": "send less"}

# What an error is made of, by the class whose __init__ takes it.
MADE_OF: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "Exception": (("what went wrong",), {}),
    "RuntimeError": (("what went wrong",), {}),
    "TemplateError": (("what went wrong",), {}),
    "ValueError": (("what went wrong",), {}),
    "RatchetError": (("what went wrong",), {"code": "odd", "hint": "look", "allowed_moves": ["resume"]}),
    "InvalidRequest": (("what went wrong", [WRONG]), {"code": "odd", "hint": "look", "line": 3}),
    "JobFailed": (("model_not_found", "no such model"), {"hint": "look", "pointer": "/model", "tried": ["tiny2"]}),
    "PolicyFailed": (("model_not_found", "no such model"), {"hint": "look", "subject": Subject.SOURCE}),
    "BadTensors": (("begins at byte 8", "log_probs"), {}),
    "BadJson": (("syntax", "Expecting value"), {"at": 7, "line": 2, "column": 3}),
    "MarkedYAMLError": ((None, None, "the key stands twice", None), {}),
    "NotThese": ((WRONG,), {}),
    "ItemRefused": (([WRONG, FieldError("", "too large")],), {}),
    "Retry": (("no answer", 2.5), {}),
    "RatchetApiError": ((429, PROBLEM), {"retry_after_s": 1.5}),
    "RatchetOperationError": (({"id": "op_1", "seq": 3, "kind": "forward", "error": LOST},), {}),
    "OtherCommit": (("a" * 40,), {}),
    "RatchetLossPending": (("loss_1", "queued"), {}),
}


def subclasses(parent: type) -> Iterator[type]:
    for child in parent.__subclasses__():
        yield child
        yield from subclasses(child)


def own_errors() -> list[type[Exception]]:
    """Every error class of our packages, all of whose modules are imported for this."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(".__main__"):
                import_module(module.name)
    names = {package.__name__ for package in PACKAGES}
    return sorted({kind for kind in subclasses(Exception) if kind.__module__.split(".")[0] in names}, key=repr)


def made(kind: type[Exception]) -> Exception:
    takes = next(parent for parent in kind.__mro__ if "__init__" in vars(parent))
    args, kwargs = MADE_OF[takes.__name__]
    return kind(*args, **kwargs)


def facts(error: BaseException) -> tuple[Any, ...]:
    return type(error), str(error), error.args, vars(error)


def lost(error: Exception) -> list[str]:
    """What pickling and copying do not keep of it."""
    error.add_note("seen on the way")
    ways: dict[str, Callable[[], Any]] = {
        f"protocol {number}": lambda number=number: pickle.loads(pickle.dumps(error, number))
        for number in range(pickle.HIGHEST_PROTOCOL + 1)
    }
    found: list[str] = []
    for way, again in (ways | {"copy": lambda: copy.copy(error)}).items():
        try:
            assert facts(again()) == facts(error)
        except (AssertionError, TypeError, AttributeError) as broken:
            found.append(f"{type(error).__module__}.{type(error).__name__}, {way}: {broken}")
    return found


def test_every_error_survives_pickling_with_all_that_it_says() -> None:
    errors = [made(kind) for kind in own_errors()]
    assert {JobFailed, RatchetApiError, RatchetLossPending} <= {type(error) for error in errors} and len(errors) >= 30
    assert [line for error in errors for line in lost(error)] == []


class TwoParts(Exception):
    """What Python cannot make again by itself."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def test_an_error_that_does_not_survive_is_found() -> None:
    assert len(lost(TwoParts("odd", "what went wrong"))) == pickle.HIGHEST_PROTOCOL + 2


@pytest.mark.parametrize("kind", [RatchetApiError, RatchetLossPending, JobFailed])
def test_what_a_process_of_a_pool_raises_arrives(kind: type[Exception]) -> None:
    sent = made(kind)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(kind) as raised:
            pool.submit(reraise, kind, sent).result(60)
        assert facts(raised.value) == facts(sent)
        assert pool.submit(len, "the pool lives").result(60) == 14
