"""Rounding in half precision: what it does to the ratios is measured, and a clip that lies below it is named."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from job_specs import rl_spec
from service.jobs import lease as leases
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.spec.job import JobSpec
from service.spec.model import Lora, ModelSpec, TinyConfig
from service.spec.objective import ObjectiveSpec
from service.spec.training import OptimizerSpec
from service.store import events, metrics
from service.validation import parse
from workers import runner
from workers.loops import noise
from workers.objectives.objective import Objective
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.nudge import STRIDE, nudged
from workers.policy.score.layout import Sequence
from workers.tenure.keeper import Keeper

# A model of random weights is so flat that rounding moves its log-probs a hundred times less than a real one's.
NARROW: dict[str, Any] = {"preset": "gspo", "surrogate": {"clip_low": 1e-5, "clip_high": 2e-5}}
WIDE: dict[str, Any] = {"preset": "gspo", "surrogate": {"clip_low": 0.4, "clip_high": 0.5}}


@pytest.fixture
def learner() -> Callable[[str], Learner]:
    """Four layers, so that rounding has something to grow in."""

    def learner(dtype: str) -> Learner:
        tiny = TinyConfig(hidden_size=64, layers=4, heads=4, intermediate_size=128)
        spec = ModelSpec(source="tiny", tiny=tiny, dtype=dtype, adapter=Lora(rank=4))  # pyright: ignore[reportArgumentType]
        base = Base.load(spec, device="cpu", threads=1)
        with torch.no_grad():  # a model that learnt something is not as flat as one that was just made
            for weight in base.model.parameters():
                weight.mul_(4 if weight.ndim > 1 else 1)
        optimizer = OptimizerSpec(learning_rate=1e-6)
        assert isinstance(spec.adapter, Lora)
        return Learner(base, spec.adapter, name="mine", optimizer=optimizer, steps=8, seed=0)

    return learner


def some() -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)
    return [Sequence(*torch.randint(3, 30, (2, 20), generator=generator).tolist()) for _ in range(16)]


def rms(one: Any, other: Any) -> float:
    return float((one.log_probs - other.log_probs)[one.mask].double().square().mean().sqrt())


# ---------------------------------------------------------------- the nudge


def test_a_nudge_does_what_an_update_far_too_small_to_matter_does(learner: Callable[[str], Learner]) -> None:
    found: dict[str, tuple[float, float]] = {}
    for dtype in ("bfloat16", "float32"):
        policy, sequences = learner(dtype), some()
        before = policy.score(sequences)
        nudge = rms(before, policy.score(sequences, nudge=True))
        assert rms(before, policy.score(sequences)) == 0.0, "the nudge is gone, and nothing else differs"
        policy.accumulate(sequences, lambda log_probs, _: -log_probs.sum() / 320)
        policy.step()
        found[dtype] = nudge, rms(before, policy.score(sequences))
    nudge, update = found["bfloat16"]
    assert 0.5 < nudge / update < 2, found
    assert found["float32"][1] < update / 10, "what the update itself does is much less"
    assert found["float32"][0] < 1e-4


def test_a_nudge_moves_one_number_in_many_to_its_neighbour() -> None:
    class Model(torch.nn.Module):
        embedding = torch.nn.Embedding(7, 1000, dtype=torch.bfloat16)

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.embedding

    model: Any = Model()
    ids = torch.arange(7).view(1, 7)
    with torch.no_grad():
        plain = model.embedding(ids)
        with nudged(model):
            moved = model.embedding(ids)
        assert torch.equal(model.embedding(ids), plain)
    places = (moved != plain).flatten().nonzero().flatten()
    assert (places % STRIDE == 0).all() and len(places) > 0.9 * 7000 / STRIDE
    steps = (moved.view(torch.int16).int() - plain.view(torch.int16).int()).flatten()[places]
    assert (steps == 1).all(), "away from 0, by one unit in the last place"


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ("token", [[0.1, 0.2, 0.3], [-0.4, 0.0, 0.0]]),
        ("sequence", [[0.2, 0.2, 0.2], [-0.4, -0.4, -0.4]]),
        ("sequence_token", [[0.2, 0.2, 0.2], [-0.4, -0.4, -0.4]]),
        ("product", [[0.6, 0.6, 0.6], [-0.4, -0.4, -0.4]]),
        ({"kind": "segment", "chunk": 2}, [[0.15, 0.15, 0.3], [-0.4, -0.4, -0.4]]),
    ],
)
def test_log_ratios_are_pooled_as_the_objective_does(ratio: Any, expected: list[list[float]]) -> None:
    objective = Objective(ObjectiveSpec.model_validate({"ratio": ratio}).resolve())
    delta = torch.tensor([[0.1, 0.2, 0.3], [-0.4, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    pooled: Tensor = objective.pooled(delta, mask)
    torch.testing.assert_close(pooled[mask], torch.tensor(expected, dtype=torch.float64)[mask])


def test_one_answer_of_each_group_comes_first() -> None:
    sequences = [Sequence([1] * 500, [1] * 500)] * 12
    assert noise._some(sequences, 4) == [0, 4, 8, 1]
    assert noise._some([Sequence([1] * 9000, [1])] * 2, 2) == [0]


# ---------------------------------------------------------------- in a job


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    shutil.copyfile(sqlite_template, tmp_path / "ratchet.db")
    return f"sqlite:///{tmp_path / 'ratchet.db'}"


Ran = tuple[dict[str, dict[int, float]], list[dict[str, Any]]]


@pytest.fixture
def run(store: Any, settings: Any, doorbell: Any) -> Callable[..., Ran]:
    """The job's metrics by name and step, and its warnings about rounding."""

    def run(dtype: str, steps: int = 2, **sections: Any) -> Ran:
        spec = rl_spec(limits={"max_steps": steps}, **sections)
        spec["model"] = {**spec["model"], "dtype": dtype}
        resolved = resolve(store, settings, "default", parse(JobSpec, spec))
        job = create_job(store, doorbell, project="default", sent=spec, resolved=resolved)
        claimed = leases.claim(store, settings, "w", {"any"})
        assert claimed is not None
        runner.run(Keeper(store, settings, doorbell), *claimed)
        with store.begin(readonly=True) as session:
            curves = metrics.series(session, job.id)
            told = [event.data for event in events.after(session, job.id, 0) if event.type == "warning"]
        return {name: dict(zip(c.step, c.value, strict=True)) for name, c in curves.items()}, told  # pyright: ignore[reportReturnType]

    return run


def test_a_job_in_bfloat16_measures_rounding_and_names_clips_that_lie_below_it_once(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "EVERY_STEPS", 3)
    measured, told = run("bfloat16", steps=5, objective=NARROW)
    token, pooled = measured["policy/noise_log_ratio"], measured["policy/noise_pooled_log_ratio"]
    assert list(token) == list(pooled) == [1, 4]
    assert all(1e-4 < value < 0.1 for value in token.values()), token
    assert all(token[step] / 3 < pooled[step] <= token[step] for step in token), "answers of four tokens: about a half"
    [warning] = told
    assert (warning["step"], warning["metric"]) == (1, "policy/noise_pooled_log_ratio")
    assert "1e-05 and 2e-05" in warning["detail"] and "bfloat16 alone" in warning["detail"]
    assert "model.dtype: float32" in warning["detail"]


def test_wide_clips_draw_no_warning(run: Callable[..., Ran]) -> None:
    measured, told = run("bfloat16", objective=WIDE)
    assert 0 < measured["policy/noise_pooled_log_ratio"][1] < 0.4 and told == []


def test_what_has_no_ratio_has_no_pooled_one(run: Callable[..., Ran]) -> None:
    measured, told = run("bfloat16", objective={"ratio": "one", "surrogate": "none"})
    assert measured["policy/noise_log_ratio"][1] > 0 and "policy/noise_pooled_log_ratio" not in measured and told == []


def test_nothing_is_measured_in_float32(run: Callable[..., Ran]) -> None:
    measured, told = run("float32", objective=NARROW)
    assert not any("noise" in name for name in measured) and told == []


def test_to_measure_changes_nothing(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    with_it, _ = run("bfloat16", objective=NARROW)
    monkeypatch.setattr(noise, "is_due", lambda attempt, step: False)
    without, _ = run("bfloat16", objective=NARROW)
    assert with_it.keys() - without.keys() == {"policy/noise_log_ratio", "policy/noise_pooled_log_ratio"}
    timed = {name for name in without if name.startswith("perf/")}
    assert all(with_it[name] == without[name] for name in without.keys() - timed)
    assert not any(math.isnan(value) for name in without for value in without[name].values())
