"""Saved, loaded and continued is bit for bit the same as continued."""

from pathlib import Path

import pytest
import torch

from service.errors import JobFailed
from service.spec.model import Lora, ModelSpec, TinyConfig
from service.spec.training import Schedule

TINY = TinyConfig(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=64)
SCHEDULE = Schedule(kind="cosine", warmup_steps=2, min_ratio=0.1)
SPECS = {
    "full-float32": ModelSpec(source="tiny", tiny=TINY, dtype="float32"),
    "full-bfloat16": ModelSpec(source="tiny", tiny=TINY, dtype="bfloat16"),
    "lora-float32": ModelSpec(source="tiny", tiny=TINY, dtype="float32", adapter=Lora(rank=4, alpha=8, dropout=0.3)),
    "lora-bfloat16": ModelSpec(source="tiny", tiny=TINY, dtype="bfloat16", adapter=Lora(rank=4, alpha=8, dropout=0.3)),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path: Path, load, learn, weights):
    spec = SPECS[name]
    undisturbed = load(spec, schedule=SCHEDULE)
    losses = [learn(undisturbed, step) for step in range(6)]

    first = load(spec, schedule=SCHEDULE)
    halves = [learn(first, step) for step in range(3)]
    first.save(tmp_path)
    torch.manual_seed(99)  # whatever the new process's generator holds
    second = load(spec, schedule=SCHEDULE, weights_from=tmp_path, optimizer_from=tmp_path)
    halves += [learn(second, step) for step in range(3, 6)]

    assert halves == losses
    ended, expected = weights(second), weights(undisturbed)
    assert ended.keys() == expected.keys()
    for key, value in expected.items():
        assert ended[key].dtype == value.dtype and torch.equal(ended[key], value), key
    prompts = [undisturbed.text.encode("rev 1>")]
    answers = [p.sample(prompts, group_size=4, max_tokens=6, temperature=1.0, seed=5) for p in (undisturbed, second)]
    assert answers[0] == answers[1]


def test_without_the_optimizer_the_end_differs(tmp_path: Path, load, learn, weights):
    """The control of the test above: it could tell if the moments were lost."""
    spec = SPECS["full-float32"]
    first = load(spec, schedule=SCHEDULE)
    for step in range(3):
        learn(first, step)
    first.save(tmp_path)
    second = load(spec, schedule=SCHEDULE, weights_from=tmp_path)
    for policy in (first, second):
        learn(policy, 3)
    assert any(not torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_dropout_is_drawn_anew_for_each_step_and_off_when_scoring(load, learn, some_sequences):
    policy = load(SPECS["lora-float32"], learning_rate=1e-12)
    with torch.no_grad():
        for name, parameter in policy.base.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)  # so that the adapter does something
    sequences = some_sequences(5)
    losses = []
    for _ in range(3):
        losses.append(policy.accumulate(sequences, lambda log_probs, rows: log_probs.sum()))
        losses.append(policy.accumulate(sequences, lambda log_probs, rows: log_probs.sum()))
        policy.step()
    assert len(set(losses)) == 6
    assert torch.equal(policy.score(sequences).log_probs, policy.score(sequences).log_probs)


def test_a_fork_with_the_optimizer_starts_its_schedule_anew(tmp_path: Path, load, learn, some_sequences):
    spec = SPECS["full-float32"]
    first = load(spec, schedule=SCHEDULE)
    for step in range(3):
        learn(first, step)
    first.save(tmp_path)
    rates = {}
    for new in (False, True):
        policy = load(spec, schedule=SCHEDULE, weights_from=tmp_path, optimizer_from=tmp_path, new_schedule=new)
        policy.accumulate(some_sequences(2), lambda log_probs, rows: log_probs.sum())
        rates[new] = policy.step()["learning_rate"]
    assert rates[True] == pytest.approx(0.5e-2)  # the first of two warm-up steps
    assert rates[False] == pytest.approx(1e-2 * (0.1 + 0.9 * (0.5 + 0.5 * torch.tensor(torch.pi / 6).cos().item())))


def test_an_optimizer_of_another_shape_is_refused_by_name(tmp_path: Path, load, learn):
    lora = load(SPECS["lora-float32"])
    learn(lora, 0)
    lora.save(tmp_path)
    with pytest.raises(JobFailed) as failed:
        load(SPECS["full-float32"], optimizer_from=tmp_path)
    assert failed.value.code == "checkpoint_mismatch"
    wider = SPECS["lora-float32"].model_copy(update={"adapter": Lora(rank=8, alpha=8)})
    with pytest.raises(JobFailed, match="has shape"):
        load(wider, optimizer_from=tmp_path)
