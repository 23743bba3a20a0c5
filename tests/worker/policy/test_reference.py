"""The reference is what the job started from, never what it has become."""

from pathlib import Path

import pytest
import torch

from service.spec.model import Lora, ModelSpec


@pytest.mark.parametrize("spec", ["tiny_spec", "tiny_lora_spec"])
def test_the_reference_stays_where_the_job_started(spec, request, load, learn, some_sequences):
    policy = load(request.getfixturevalue(spec), reference=True)
    sequences = some_sequences(5)
    start, _ = policy.score(sequences)
    torch.testing.assert_close(policy.score(sequences, reference=True)[0], start, atol=1e-6, rtol=0)
    for step in range(3):
        learn(policy, step)
    assert not torch.allclose(policy.score(sequences)[0], start, atol=1e-2)
    torch.testing.assert_close(policy.score(sequences, reference=True)[0], start, atol=1e-6, rtol=0)


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
    start, _ = earlier.score(sequences)

    job = load(spec, reference=True, weights_from=tmp_path / "start", reference_from=tmp_path / "start")
    torch.testing.assert_close(job.score(sequences)[0], start, atol=1e-6, rtol=0)
    for step in range(3, 6):
        learn(job, step)
    torch.testing.assert_close(job.score(sequences, reference=True)[0], start, atol=1e-6, rtol=0)
    job.save(tmp_path / "mine")
    mine, _ = job.score(sequences)

    resumed = load(
        spec,
        reference=True,
        reference_from=tmp_path / "start",
        weights_from=tmp_path / "mine",
        optimizer_from=tmp_path / "mine",
    )
    assert torch.equal(resumed.score(sequences)[0], mine)
    torch.testing.assert_close(resumed.score(sequences, reference=True)[0], start, atol=1e-6, rtol=0)
    assert not torch.allclose(mine, start, atol=1e-2)
    assert learn(resumed, 6) == learn(job, 6), "scoring the reference leaves the policy ready to learn"
    assert torch.equal(resumed.score(sequences)[0], job.score(sequences)[0])


def test_a_reference_between_micro_batches_does_not_disturb_the_gradient(load, some_sequences, gradients, tiny_lora_spec):
    sequences = some_sequences(5)
    results = []
    for look in (False, True):
        policy = load(tiny_lora_spec, reference=True)
        for _ in range(2):
            policy.accumulate(sequences, lambda log_probs, rows: log_probs.sum())
            if look:
                policy.score(sequences, reference=True)
        results.append(gradients(policy))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_reference_that_was_not_loaded_is_refused(load, some_sequences):
    with pytest.raises(ValueError, match="reference=False"):
        load().score(some_sequences(1), reference=True)


def test_only_the_trained_adapter_is_trained(load, tmp_path: Path, learn, some_sequences, tiny_lora_spec):
    start = load(tiny_lora_spec)
    start.save(tmp_path)
    policy = load(tiny_lora_spec, reference=True, weights_from=tmp_path, reference_from=tmp_path)
    assert policy.facts["trainable_parameters"] == start.facts["trainable_parameters"]
    frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if ".reference." in n}
    assert frozen
    policy.score(some_sequences(2), reference=True)
    learn(policy, 0)
    assert all(torch.equal(p, frozen[n]) for n, p in policy.model.named_parameters() if n in frozen)


def test_the_reference_of_a_bfloat16_adapter_is_the_bare_base(load, learn, some_sequences, tiny_spec):
    spec = ModelSpec(source="tiny", tiny=tiny_spec.tiny, dtype="bfloat16", adapter=Lora(rank=4, alpha=8))
    sequences = some_sequences(4)
    policy = load(spec, reference=True)
    for step in range(3):
        learn(policy, step)
    bare = load(ModelSpec(source="tiny", tiny=tiny_spec.tiny, dtype="bfloat16"))
    assert torch.equal(policy.score(sequences, reference=True)[0], bare.score(sequences)[0])
