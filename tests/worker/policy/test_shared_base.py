"""Many learners on one base: each is what it would be alone, bit for bit, whoever its neighbours are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from service.spec.model import Lora, ModelSpec
from service.spec.training import OptimizerSpec, Schedule
from workers.policy.base import Base
from workers.policy.errors import PolicyFailed
from workers.policy.learner import Learner
from workers.policy.policy import Policy
from workers.policy.reference import open_reference

SPECS: dict[str, dict[str, Any]] = {
    "left": {"adapter": Lora(rank=4, alpha=8, dropout=0.3), "seed": 1, "learning_rate": 1e-2, "weight_decay": 0.5},
    "right": {"adapter": Lora(rank=4, alpha=8, dropout=0.3), "seed": 2, "learning_rate": 3e-2, "weight_decay": 0.1},
    "few": {
        "adapter": Lora(rank=2, alpha=2, target_modules=["q_proj", "down_proj"]),
        "seed": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.3,
    },
}


@pytest.fixture(params=["float32", "bfloat16"])
def source(request, family_folder) -> ModelSpec:
    return ModelSpec(source=str(family_folder("qwen3")), dtype=request.param, adapter=Lora())


@pytest.fixture
def make(load, source) -> Callable[..., Learner]:
    """One of the learners above: on a base of its own, or on this one."""

    def make(name: str, on: Base | None = None, **start: Any) -> Learner:
        spec = SPECS[name]
        schedule = Schedule(kind="cosine", warmup_steps=2)
        rate, decay = spec["learning_rate"], spec["weight_decay"]
        optimizer = OptimizerSpec(learning_rate=rate, weight_decay=decay, schedule=schedule)
        model = source.model_copy(update={"adapter": spec["adapter"]})
        return load(model, on=on, name=name, seed=spec["seed"], optimizer=optimizer, **start)

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved(learner: Learner, folder: Path) -> dict[str, Any]:
    """Every byte, but for the order of the adapted layers: peft writes down a set."""
    learner.save(folder)
    config = json.loads((folder / "model" / "adapter_config.json").read_text())
    return files(folder) | {"model/adapter_config.json": config | {"target_modules": sorted(config["target_modules"])}}


def lesson(learner: Learner, step: int, some_sequences: Callable[..., Any]) -> float:
    """Half of an optimizer step: the gradient of a third of its loss, so that each step needs three."""
    sequences = some_sequences(4, seed=step)
    return learner.accumulate(sequences, lambda log_probs, rows: -log_probs.sum() / 20, microbatch_tokens=30)


def test_learners_that_take_turns_end_as_each_would_alone(make, base, source, some_sequences, tmp_path: Path):
    shared = base(source)
    names, prompts = list(SPECS), [shared.text.encode("rev 1>")]
    together, alone = {name: make(name, shared) for name in names}, {name: make(name) for name in names}
    found = {name: ([], []) for name in names}
    for turn in range(18):  # every learner is interrupted between its gradients and its step, and steps at other times
        for offset, name in enumerate(names):
            for place, learner in enumerate((together[name], alone[name])):
                found[name][place].append(lesson(learner, turn, some_sequences))
                if (turn + offset) % 3 == 2:
                    found[name][place].append(learner.step())
                if turn % 5 == offset:
                    found[name][place].append(learner.score(some_sequences(3)).log_probs.tolist())
                    found[name][place].append(learner.sample(prompts, group_size=3, max_tokens=5, temperature=1.0, seed=turn))
    for name in names:
        ours, theirs = found[name]
        assert ours == theirs
        assert saved(together[name], tmp_path / "together" / name) == saved(alone[name], tmp_path / "alone" / name)
    weights = [(tmp_path / "alone" / name / "model" / "adapter_model.safetensors").read_bytes() for name in names]
    assert len(set(weights)) == len(names), "or a mix-up could not be told"


def test_a_neighbours_decay_and_gradient_reach_nobody_else(make, base, source, some_sequences):
    shared = base(source)
    left, right = make("left", shared), make("right", shared)
    lesson(right, 0, some_sequences)
    held = {name: (p.detach().clone(), p.grad) for name, p in shared.adapters.parameters("right").items()}
    before = {n: p.detach().clone() for n, p in shared.model.named_parameters() if ".lora_" not in n}
    for step in range(4):
        lesson(left, step, some_sequences)
        left.step()
    after = shared.adapters.parameters("right")
    assert all(torch.equal(after[name], value) and after[name].grad is grad for name, (value, grad) in held.items())
    assert any(grad is not None and grad.any() for _, grad in held.values())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in shared.model.named_parameters() if n in before)
    right.step()
    assert any(not torch.equal(after[name], value) for name, (value, _) in held.items()), "its own step does"


def test_the_base_alone_is_what_it_was_before_it_had_learners(make, base, source, some_sequences):
    shared, sequences = base(source), some_sequences(4)
    untouched = Policy(shared).score(sequences).log_probs
    left = make("left", shared)
    make("few", shared)
    for step in range(3):
        lesson(left, step, some_sequences)
        left.step()
    assert not torch.equal(left.score(sequences).log_probs, untouched)
    assert torch.equal(Policy(shared).score(sequences).log_probs, untouched)
    prompts = [shared.text.encode("rev 1>")]
    how = {"group_size": 4, "max_tokens": 6, "temperature": 1.0, "seed": 3}
    assert Policy(shared).sample(prompts, **how) == Policy(base(source)).sample(prompts, **how)


@pytest.mark.parametrize("neighbour", [None, "right", "few"])  # few has no adapter on most of the layers
def test_a_learner_leaves_its_base_and_comes_back_unharmed(neighbour, make, base, source, some_sequences, tmp_path: Path):
    shared, undisturbed = base(source), make("left")
    bare = dict(shared.model.named_parameters())
    untouched = Policy(shared).score(some_sequences(3)).log_probs
    left, right = make("left", shared), None if neighbour is None else make(neighbour, shared)
    ended = []
    for step in range(6):
        if step == 3:
            left.save(tmp_path / "left")
            left.unload()
            with pytest.raises(ValueError, match="no adapter 'left'"):
                left.score(some_sequences(1))
            assert not any(".left." in name for name, _ in shared.model.named_parameters())
            assert torch.equal(Policy(shared).score(some_sequences(3)).log_probs, untouched)
            if right is not None:
                lesson(right, step, some_sequences)
                right.step()
            else:  # the last one leaves nothing behind
                assert {n: id(p) for n, p in shared.model.named_parameters()} == {n: id(p) for n, p in bare.items()}
            left = make("left", shared, weights_from=tmp_path / "left", optimizer_from=tmp_path / "left")
        for learner in (left, undisturbed):
            ended.append(lesson(learner, step, some_sequences))
            learner.step()
    assert ended[0::2] == ended[1::2]
    assert saved(left, tmp_path / "came back") == saved(undisturbed, tmp_path / "stayed")


def test_a_loss_that_is_not_finite_skips_the_step_of_its_own_learner(make, base, source, some_sequences):
    shared = base(source)
    left, right = make("left", shared), make("right", shared)
    left.accumulate(some_sequences(3), lambda log_probs, rows: log_probs.sum() * float("nan"))
    lesson(right, 0, some_sequences)
    assert (right.step()["skipped"], left.step()["skipped"]) == (False, True)


def test_one_policy_does_not_work_within_another(make, base, source, some_sequences):
    shared, sequences = base(source), some_sequences(3)
    left = make("left", shared)

    def loss(log_probs, rows):
        Policy(shared).score(sequences)
        return log_probs.sum()

    with pytest.raises(RuntimeError, match="has to wait"):
        left.accumulate(sequences, loss)
    left.accumulate(sequences, lambda log_probs, rows: log_probs.sum())


def test_a_checkpoint_knows_no_adapter_names(make, tmp_path: Path, some_sequences):
    learner = make("few")
    lesson(learner, 0, some_sequences)
    learner.step()
    learner.save(tmp_path)
    keys = {}
    for name in ("model/adapter_model.safetensors", "optimizer.safetensors"):
        with safe_open(tmp_path / name, "pt") as tensors:
            keys[name] = set(tensors.keys())
    layers = [
        f"model.layers.{n}.{layer}.lora_{ab}" for n in (0, 1) for layer in ("self_attn.q_proj", "mlp.down_proj") for ab in "AB"
    ]
    assert keys["model/adapter_model.safetensors"] == {f"base_model.model.{layer}.weight" for layer in layers}
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert keys["optimizer.safetensors"] == {f"{kind}/{layer}.default.weight" for kind in moments for layer in layers}
    assert all(b"few" not in body for name, body in files(tmp_path).items() if "adapter" in name or "optimizer" in name)


def test_each_learner_has_a_reference_of_its_own(make, base, source, some_sequences, tmp_path: Path):
    shared, sequences = base(source), some_sequences(4)
    starts = {}
    for name in ("left", "right"):
        earlier = make(name)
        for step in range(2):
            lesson(earlier, step, some_sequences)
            earlier.step()
        earlier.save(tmp_path / name)
        starts[name] = earlier.score(sequences).log_probs
    references = {}
    for name in starts:
        learner = make(name, shared, weights_from=tmp_path / name)
        spec = source.model_copy(update={"adapter": SPECS[name]["adapter"]})
        references[name] = open_reference(learner, spec, tmp_path / name)
        lesson(learner, 3, some_sequences)
        learner.step()
        assert not torch.equal(learner.score(sequences).log_probs, starts[name])
    for name, start in starts.items():
        torch.manual_seed(7)
        assert torch.equal(references[name].score(sequences).log_probs, start), "no dropout either"
    references["left"].unload()
    assert torch.equal(references["right"].score(sequences).log_probs, starts["right"])


def test_all_weights_are_trained_by_one_learner_alone(base, load, tiny_spec, tiny_lora_spec):
    taken = base(tiny_spec)
    load(tiny_spec, on=taken)
    for spec in (tiny_spec, tiny_lora_spec):
        with pytest.raises(ValueError, match=r"another base|base of its own"):
            load(spec, on=taken, name="second")
    shared = base(tiny_lora_spec)
    load(tiny_lora_spec, on=shared)
    with pytest.raises(ValueError, match="base of its own"):
        load(tiny_spec, on=shared, name="second")


def test_full_weights_come_with_their_base(base, load, tiny_spec, tmp_path: Path):
    load(tiny_spec).save(tmp_path)
    with pytest.raises(ValueError, match="come with their base"):
        load(tiny_spec, on=base(tiny_spec), weights_from=tmp_path)
    assert load(tiny_spec, on=base(tiny_spec, tmp_path), weights_from=tmp_path).adapter is None


def names_in(base: Base) -> set[str]:
    """Of its weights, without what peft puts into the name where an adapter is or was."""
    return {name.replace(".base_layer", "") for name, _ in base.model.named_parameters()}


@pytest.mark.parametrize("name", ["mine", "", "a.b", "../up", "model", "q_proj", "1", "lora_A", "base_layer"])
def test_a_name_that_would_be_mistaken_for_another_is_refused(name, base, load, tiny_lora_spec):
    shared = base(tiny_lora_spec)
    load(tiny_lora_spec, on=shared, name="mine")
    with pytest.raises(ValueError, match="cannot be the name"):
        load(tiny_lora_spec, on=shared, name=name)
    load(tiny_lora_spec, on=shared, name="min")


@pytest.mark.parametrize("neighbour", [None, "right", "few"])  # few has no adapter on most of the layers
def test_what_could_not_be_loaded_leaves_the_base_as_it_was(
    neighbour, make, base, load, source, some_sequences, tmp_path: Path
):
    shared, alone = base(source), make("left")
    if neighbour is not None:
        make(neighbour, shared)
    parameters = names_in(shared)
    few = make("few")
    lesson(few, 0, some_sequences)
    few.step()
    few.save(tmp_path / "few")
    wrong = [
        {"adapter": Lora(target_modules=["nothing_like_it"])},
        {"adapter": Lora(target_modules=["k_proj", "input_layernorm"])},  # peft gives up in the middle
        {"adapter": Lora(rank=2, alpha=4), "weights_from": tmp_path / "few"},
        {"adapter": Lora(rank=2, alpha=2), "weights_from": tmp_path / "few"},  # other layers
        {"adapter": Lora(rank=4, alpha=8), "optimizer_from": tmp_path / "few"},  # found out when the adapter is there already
    ]
    for start in wrong:
        adapter = start.pop("adapter")
        with pytest.raises(PolicyFailed):
            load(source.model_copy(update={"adapter": adapter}), on=shared, name="left", **start)
        assert names_in(shared) == parameters
    learner = make("left", shared)
    for step in range(3):
        assert lesson(learner, step, some_sequences) == lesson(alone, step, some_sequences)
        assert learner.step() == alone.step()
    assert saved(learner, tmp_path / "shared") == saved(alone, tmp_path / "alone")
