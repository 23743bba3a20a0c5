"""The reference is what the job started from, never what it has become."""

from pathlib import Path

import pytest
import torch

from service.spec.model import Lora, ModelSpec
from workers.policy.reference import open_reference


@pytest.mark.parametrize("spec", ["tiny_spec", "tiny_lora_spec"])
def test_the_reference_stays_where_the_job_started(spec, request, load, learn, some_sequences):
    spec = request.getfixturevalue(spec)
    policy = load(spec)
    reference = open_reference(policy, spec, None)
    sequences = some_sequences(5)
    start = policy.score(sequences).log_probs
    torch.testing.assert_close(reference.score(sequences).log_probs, start, atol=1e-6, rtol=0)
    for step in range(3):
        learn(policy, step)
    assert not torch.allclose(policy.score(sequences).log_probs, start, atol=1e-2)
    torch.testing.assert_close(reference.score(sequences).log_probs, start, atol=1e-6, rtol=0)


@pytest.mark.parametrize("spec", ["tiny_spec", "tiny_lora_spec"])
def test_from_a_checkpoint_the_reference_is_that_checkpoint_also_after_a_resume(
    spec, request, tmp_path: Path, load, learn, some_sequences
):
    spec = request.getfixturevalue(spec)
    sequences = some_sequences(5)
    earlier = load(spec)
    for step in range(3):
        learn(earlier, step)
    earlier.save(tmp_path / "start")
    start = earlier.score(sequences).log_probs

    job = load(spec, weights_from=tmp_path / "start")
    reference = open_reference(job, spec, tmp_path / "start")
    torch.testing.assert_close(job.score(sequences).log_probs, start, atol=1e-6, rtol=0)
    for step in range(3, 6):
        learn(job, step)
    torch.testing.assert_close(reference.score(sequences).log_probs, start, atol=1e-6, rtol=0)
    job.save(tmp_path / "mine")
    mine = job.score(sequences).log_probs

    resumed = load(spec, weights_from=tmp_path / "mine", optimizer_from=tmp_path / "mine")
    reference = open_reference(resumed, spec, tmp_path / "start")
    assert torch.equal(resumed.score(sequences).log_probs, mine)
    torch.testing.assert_close(reference.score(sequences).log_probs, start, atol=1e-6, rtol=0)
    assert not torch.allclose(mine, start, atol=1e-2)
    assert learn(resumed, 6) == learn(job, 6), "scoring the reference leaves the policy ready to learn"
    assert torch.equal(resumed.score(sequences).log_probs, job.score(sequences).log_probs)


def test_a_reference_between_micro_batches_does_not_disturb_the_gradient(load, some_sequences, gradients, tiny_lora_spec):
    sequences = some_sequences(5)
    results = []
    for look in (False, True):
        policy = load(tiny_lora_spec)
        reference = open_reference(policy, tiny_lora_spec, None)
        for _ in range(2):
            policy.accumulate(sequences, lambda log_probs, rows: log_probs.sum())
            if look:
                reference.score(sequences)
        results.append(gradients(policy))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_only_the_trained_adapter_is_trained(load, tmp_path: Path, learn, some_sequences, tiny_lora_spec):
    start = load(tiny_lora_spec)
    start.save(tmp_path)
    policy = load(tiny_lora_spec, weights_from=tmp_path)
    reference = open_reference(policy, tiny_lora_spec, tmp_path)
    assert policy.facts["trainable_parameters"] == start.facts["trainable_parameters"]
    frozen = {n: p.detach().clone() for n, p in policy.base.model.named_parameters() if f".{reference.adapter}." in n}
    assert frozen
    reference.score(some_sequences(2))
    learn(policy, 0)
    assert all(torch.equal(p, frozen[n]) for n, p in policy.base.model.named_parameters() if n in frozen)


def test_the_reference_of_a_bfloat16_adapter_is_the_bare_base(load, learn, some_sequences, tiny_spec):
    spec = ModelSpec(source="tiny", tiny=tiny_spec.tiny, dtype="bfloat16", adapter=Lora(rank=4, alpha=8))
    sequences = some_sequences(4)
    policy = load(spec)
    reference = open_reference(policy, spec, None)
    for step in range(3):
        learn(policy, step)
    bare = load(ModelSpec(source="tiny", tiny=tiny_spec.tiny, dtype="bfloat16"))
    assert torch.equal(reference.score(sequences).log_probs, bare.score(sequences).log_probs)
