"""Old log-probs from the sampler: what they must be equal to, when they are taken, and what happens when they are wrong."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from job_specs import rl_spec
from service.metric_names import RESCORE_DIFFERENCE
from service.spec.job import JobSpec
from service.spec.model import Full, ModelSpec, TinyConfig
from service.spec.training import OptimizerSpec
from service.validation import parse
from workers.loops import rescore
from workers.loops.progress import Progress
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.policy import Scores
from workers.policy.score.layout import Sequence

TINY = TinyConfig(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=64)


@pytest.fixture
def policy() -> Learner:
    return learner("float32")


def learner(dtype: Any) -> Learner:
    base = Base.load(ModelSpec(source="tiny", tiny=TINY, adapter=Full(), dtype=dtype), device="cpu", threads=1)
    with torch.no_grad():
        for weight in base.model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return Learner(base, Full(), name="mine", optimizer=OptimizerSpec(), steps=1, seed=0)


def attempt(policy: Learner, objective: Any = "gspo", **rollout: Any) -> Any:
    asked = rl_spec(objective=objective)
    asked["rollout"] |= rollout
    return cast(Any, SimpleNamespace(spec=parse(JobSpec, asked), policy=policy, progress=Progress()))


def answers(policy: Learner, temperature: float = 1.0) -> tuple[list[Sequence], list[Any]]:
    prompts = [policy.text.encode(text) for text in ("rev 123>", "rev 4>", "rev 56>")]
    groups = policy.sample(prompts, group_size=8, max_tokens=9, temperature=temperature, seed=3, entropies=True)
    completions = [one for group in groups for one in group]
    return [Sequence(prompts[place // 8], one.tokens) for place, one in enumerate(completions)], completions


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_scores_are_the_trainers(policy: Learner, temperature: float) -> None:
    sequences, completions = answers(policy, temperature)
    scores, measured, events = rescore.sampled(attempt(policy, temperature=temperature), sequences, completions, 5)
    whole = policy.score(sequences, temperature=temperature)
    assert scores is not None and not events and 0 < measured[RESCORE_DIFFERENCE] < 1e-5
    assert torch.equal(scores.mask, whole.mask)
    torch.testing.assert_close(scores.log_probs, whole.log_probs, atol=2e-5, rtol=0)
    torch.testing.assert_close(scores.entropy, whole.entropy, atol=2e-5, rtol=0)
    assert abs(measured["rollout/approx_kl"]) < 1e-5 and measured["rollout/effective_samples"] == pytest.approx(1, abs=1e-5)


def test_only_a_sample_is_scored(policy: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, completions = answers(policy)
    scored: list[Sequence] = []
    score = policy.score
    monkeypatch.setattr(policy, "score", lambda some, **how: scored.extend(some) or score(some, **how))
    rescore.sampled(attempt(policy), sequences, completions, 5)
    assert len(scored) == 2


def test_where_the_proof_fails_all_answers_are_scored_from_then_on(policy: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, completions = answers(policy)
    score = policy.score

    def off(some: list[Sequence], **how: Any) -> Scores:
        found = score(some, **how)
        return Scores(found.log_probs + 2 * rescore.BOUND, found.entropy, found.mask)

    monkeypatch.setattr(policy, "score", off)
    job = attempt(policy)
    scores, measured, ((kind, told),) = rescore.sampled(job, sequences, completions, 5)
    assert scores is None and measured[RESCORE_DIFFERENCE] > rescore.BOUND
    assert kind == "warning" and told["metric"] == RESCORE_DIFFERENCE and "sampler and trainer disagree" in told["detail"]
    assert job.progress.rescores and rescore.sampled(job, sequences, completions, 6) == (None, {}, [])


@pytest.mark.parametrize(
    ("free", "objective", "rollout"),
    [
        (True, "gspo", {}),
        (True, "gspo", {"temperature": 0.5}),
        (False, "gspo", {"rescore": "always"}),
        (False, "gspo", {"top_p": 0.9}),
        (False, "gspo", {"top_k": 5}),
        (False, {"preset": "gspo", "correct": {"action": "truncate"}}, {}),
        (False, {"preset": "gspo", "anchor": "rollout"}, {}),
    ],
)
def test_when_scoring_may_be_left_out(policy: Learner, free: bool, objective: Any, rollout: dict[str, Any]) -> None:
    assert rescore.may_be_left_out(attempt(policy, objective, **rollout)) is free


def test_never_in_half_precision(policy: Learner) -> None:
    assert rescore.may_be_left_out(attempt(policy)) and not rescore.may_be_left_out(attempt(learner("bfloat16")))
