"""What a worker brings is stored alike on both databases, or it stops a job on one of them only."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from service.errors import Failure
from service.ids import new_id
from service.jobs import lease as leases
from service.jobs.lease import CheckpointRow, Lease, RolloutRow
from service.settings import Settings
from service.store import checkpoints, events, jobs, metrics, rollouts
from service.store.session import Store
from service.store.tables import Job
from service.store.values import dumps

VALUES = {
    "nan": (float("nan"), None),
    "infinity": (float("inf"), None),
    "minus infinity": (float("-inf"), None),
    "largest": (1.7976931348623157e308, pytest.approx(1.7976931348623157e308)),  # jsonb gives it back as an integer
    "smallest": (5e-324, 5e-324),
    "minus zero": (-0.0, 0.0),
    "integer": (2**53 + 1, 2**53 + 1),
    "true": (True, True),
    "null": (None, None),
    "nul": ("a\0b", "a\u2400b"),
    "lone surrogate": ("a\ud83db", "a\ufffdb"),
    "pair": ("\U0001f600", "\U0001f600"),
    "backslashes": ("\\u0000 \\ud800", "\\u0000 \\ud800"),
    "controls": ("\x01\x1b[31m\x7f\x85\u202e", "\x01\x1b[31m\x7f\x85\u202e"),
    "nested": ({"a\0": [float("nan"), {"b": "\0"}]}, {"a\u2400": [None, {"b": "\u2400"}]}),
    "tuple": ((1, float("nan")), [1, None]),
}
EACH = pytest.mark.parametrize(("sent", "kept"), VALUES.values(), ids=VALUES)


@pytest.fixture
def held(store: Store, settings: Settings, new_job: Callable[..., Job]) -> Lease:
    new_job()
    claimed = leases.claim(store, settings, "w1", {"any"})
    assert claimed is not None
    return claimed[0]


@EACH
def test_all_that_a_worker_writes(store: Store, held: Lease, sent: Any, kept: Any) -> None:
    text, kept_text = (sent, kept) if isinstance(sent, str) else ("x", "x")
    number, kept_number = (sent, kept) if isinstance(sent, float) else (0.5, 0.5)
    sample = {"text": text, "reward": sent}
    leases.set_resolved(store, held, {"fact": sent})
    group = RolloutRow("eval", 1, 0, text, text, [sample])
    leases.commit_step(store, held, 1, {"loss": number}, [group], [("evaluation", {"metrics": {"m": sent}})])
    id_ = new_id("ckpt")
    row = CheckpointRow(id_, 1, "full", {"source": text}, f"x/{id_}", 1, "0" * 64, {"eval/m": sent}, True, False)
    leases.commit_checkpoint(store, held, row)
    leases.fail(store, held, Failure("sample_not_graded", text, details={"value": sent}), {"final": {"m": sent}})
    with store.begin(readonly=True) as session:
        job = jobs.get(session, "default", held.job_id)
        assert job.resolved["fact"] == kept
        assert job.result == {"final": {"m": kept}}
        assert job.error is not None
        assert (job.error["detail"], job.error["details"]) == (kept_text, {"value": kept})
        assert checkpoints.get(session, "default", id_).metrics == {"eval/m": kept}
        assert checkpoints.get(session, "default", id_).model == {"source": kept_text}
        (found,), _ = rollouts.page(session, held.job_id)
        assert (found.prompt, found.reference, found.samples) == (kept_text, kept_text, [{"text": kept_text, "reward": kept}])
        assert metrics.series(session, held.job_id, ["loss"])["loss"].value == [kept_number]
        told = {event.type: event.data for event in events.after(session, held.job_id, 0)}
    assert told["evaluation"] == {"metrics": {"m": kept}}
    assert told["step"]["metrics"]["loss"] == kept_number


@EACH
def test_it_is_json(sent: Any, kept: Any) -> None:
    def never(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(dumps({"x": sent}), parse_constant=never) == {"x": kept}


def test_what_json_has_not_is_refused() -> None:
    with pytest.raises(TypeError):
        dumps({"x": object()})


def test_a_spec_is_kept_as_it_was_sent(store: Store, new_job: Callable[..., Job]) -> None:
    """Chat templates write tools in the order of their keys, and templates of rows write objects so."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "description": "d"}}
    rows = [{"question": {"long": 1, "a": -0.0, "b": 1e22}, "q": "1"}]
    chat = [{"role": "user", "content": "{question}{q}"}]
    data = {"train": {"source": "inline", "rows": rows}, "chat": chat, "answer": "1", "tools": [tool]}
    metadata = {"second": 1, "first": {"zz": 1, "a": 2}}
    job_id = new_job(data=data, metadata=metadata).id
    with store.begin(readonly=True) as session:
        job = jobs.find(session, job_id)
    assert job is not None
    assert json.dumps(job.spec["data"]["tools"]) == json.dumps(job.spec_sent["data"]["tools"]) == json.dumps([tool])
    assert json.dumps(job.spec["data"]["train"]["rows"]) == json.dumps(rows)
    assert json.dumps(job.user_metadata) == json.dumps(metadata)
