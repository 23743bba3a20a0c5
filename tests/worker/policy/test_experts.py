"""Adapters on routed experts, whose weights are stacked in one tensor that no linear layer holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from service.spec.model import Lora, ModelSpec
from workers.policy.base import Base
from workers.policy.errors import PolicyFailed
from workers.policy.learner import Learner
from workers.policy.policy import Policy
from workers.policy.score.log_probs import Scorer

EXPERTS = ["model.layers.*.mlp.experts.down_proj", "model.layers.*.mlp.experts.gate_up_proj"]
# gpt_oss stacks them as [experts, in, out], the others as [experts, out, in].
ON_EACH = pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])


@pytest.fixture
def spec(family_folder: Callable[[str], Path]) -> Callable[..., ModelSpec]:
    def spec(family: str, dtype: str = "float32", **adapter: Any) -> ModelSpec:
        lora = Lora(**{"rank": 4, "alpha": 8, "target_modules": ["q_proj"], "target_parameters": "experts", **adapter})
        return ModelSpec(source=str(family_folder(family)), dtype=dtype, adapter=lora)  # pyright: ignore[reportArgumentType]

    return spec


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(load: Any, spec: ModelSpec) -> PolicyFailed:
    with pytest.raises(PolicyFailed) as caught:
        load(spec)
    return caught.value


@ON_EACH
def test_the_gradient_reaches_every_expert_that_a_token_went_to(family: str, spec, load, learn) -> None:
    policy = load(spec(family))
    assert sorted(policy.facts["adapted_parameters"]) == EXPERTS
    ours = {name: p for name, p in policy.base.adapters.parameters("mine").items() if ".experts." in name}
    assert len(ours) == 2 * 2 * 2  # layers, weights, factors
    before = {name: p.detach().clone() for name, p in ours.items()}
    losses = [learn(policy, 0) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, before[name]) for name, p in ours.items())


@ON_EACH
def test_the_experts_alone_can_lower_the_loss(family: str, spec, load, learn) -> None:
    """The negative control of the test above, in which q_proj learns too."""
    policy = load(spec(family, rank=8, alpha=64))
    others = [p for name, p in policy.base.adapters.parameters("mine").items() if ".experts." not in name]
    held = [p.detach().clone() for p in others]
    losses: list[float] = []
    for _ in range(4):
        losses.append(learn(policy, 0))
        with torch.no_grad():
            for p, value in zip(others, held, strict=True):
                p.copy_(value)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@ON_EACH
def test_a_saved_learner_goes_on_bit_for_bit(family: str, dtype: str, spec, load, learn, tmp_path: Path) -> None:
    model = spec(family, dtype)
    whole, first = load(model), load(model)
    losses = [learn(whole, step) for step in range(6)]
    assert [learn(first, step) for step in range(3)] == losses[:3]
    first.save(tmp_path / "half")
    second = load(model, weights_from=tmp_path / "half", optimizer_from=tmp_path / "half")
    assert [learn(second, step) for step in range(3, 6)] == losses[3:]
    whole.save(tmp_path / "whole")
    second.save(tmp_path / "second")
    assert files(tmp_path / "whole") == files(tmp_path / "second")


@pytest.mark.parametrize("modules", [["q_proj"], "all-linear"])
@ON_EACH
def test_plain_peft_loads_what_was_saved_and_gives_the_same_log_probs(
    family: str, modules: Any, spec, load, learn, some_sequences, family_folder, tmp_path: Path
) -> None:
    policy = load(spec(family, target_modules=modules))
    untouched = policy.score(some_sequences(5)).log_probs
    for step in range(4):
        learn(policy, step)
    policy.save(tmp_path)
    ours = policy.score(some_sequences(5)).log_probs
    assert (ours - untouched).abs().max() > 0.1
    plain: Any = AutoModelForCausalLM.from_pretrained(family_folder(family), dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "model"))

    def theirs(model: Any) -> torch.Tensor:
        other = Policy(policy.base)
        other.base.scorer, kept = Scorer(model), other.base.scorer
        try:
            return other.score(some_sequences(5)).log_probs
        finally:
            other.base.scorer = kept

    torch.testing.assert_close(theirs(adapted.base_model.model), ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs(adapted.merge_and_unload()), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@ON_EACH
def test_learners_on_one_base_are_what_each_would_be_alone(
    family: str, dtype: str, spec, load, base, learn, some_sequences, tmp_path: Path
) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "left": {},
        "right": {"rank": 2},
        "few": {"target_parameters": None, "target_modules": ["q_proj", "o_proj"]},
    }
    shared: Base = base(spec(family, dtype))
    untouched = Policy(shared).score(some_sequences(3)).log_probs

    def make(name: str, on: Base | None) -> Learner:
        return load(spec(family, dtype, **shapes[name]), on=on, name=name, seed=len(name))

    together, alone = ({name: make(name, on) for name in shapes} for on in (shared, None))
    for step in range(4):
        for name in shapes:
            assert learn(together[name], step) == learn(alone[name], step)
    for name in shapes:
        together[name].save(tmp_path / "together" / name)
        alone[name].save(tmp_path / "alone" / name)
        assert files(tmp_path / "together" / name) == files(tmp_path / "alone" / name)
    assert torch.equal(Policy(shared).score(some_sequences(3)).log_probs, untouched)


def test_neighbours_adapt_the_same_weights_or_none(spec, load, base) -> None:
    shared = base(spec("gpt_oss"))
    load(spec("gpt_oss"), on=shared, name="left")
    with pytest.raises(PolicyFailed, match="same set of parameters") as failed:
        load(spec("gpt_oss", target_parameters=["experts.down_proj"]), on=shared, name="right")
    assert failed.value.code == "lora_target_modules"
    assert not any(".right." in name for name, _ in shared.model.named_parameters())
    load(spec("gpt_oss"), on=shared, name="right")


def test_what_an_earlier_learner_adapted_does_not_change_how_a_later_one_is_saved(
    spec, load, base, learn, tmp_path: Path
) -> None:
    """A forward pass with an adapter on one weight of a module moves it behind the module's others."""
    shared = base(spec("gpt_oss"))
    names = [name for name, _ in shared.model.named_parameters()]
    earlier = load(spec("gpt_oss", target_parameters=["experts.gate_up_proj"]), on=shared, name="earlier")
    learn(earlier, 0)
    earlier.unload()
    assert [name for name, _ in shared.model.named_parameters()] != names, "or the order need not be restored"
    later, alone = load(spec("gpt_oss"), on=shared), load(spec("gpt_oss"))
    for policy, folder in ((later, "later"), (alone, "alone")):
        learn(policy, 0)
        policy.save(tmp_path / folder)
    assert files(tmp_path / "later") == files(tmp_path / "alone")


def test_the_last_learner_leaves_the_base_as_it_was(spec, load, base, learn, some_sequences) -> None:
    shared = base(spec("qwen3_moe"))
    bare, untouched = dict(shared.model.named_parameters()), Policy(shared).score(some_sequences(3)).log_probs
    policy = load(spec("qwen3_moe"), on=shared)
    learn(policy, 0)
    policy.unload()
    assert {n: id(p) for n, p in shared.model.named_parameters()} == {n: id(p) for n, p in bare.items()}
    assert torch.equal(Policy(shared).score(some_sequences(3)).log_probs, untouched)


# ---------------------------------------------------------------- what is said and refused


def test_the_warning_about_all_linear_says_how_to_include_the_experts(spec, load) -> None:
    left = load(spec("gpt_oss", target_modules="all-linear", target_parameters=None)).facts
    [warning] = left["warnings"]
    assert "experts.gate_up_proj" in warning and "target_parameters takes their names, or experts" in warning
    assert left["adapted_parameters"] == []
    [warning] = load(spec("gpt_oss", target_modules="all-linear")).facts["warnings"]
    assert "experts.gate_up_proj," not in warning and "router.weight" in warning and "or experts" not in warning
    part = load(spec("gpt_oss", target_modules="all-linear", target_parameters=["experts.down_proj"])).facts
    assert part["adapted_parameters"] == EXPERTS[:1]
    assert "experts.gate_up_proj" in part["warnings"][0] and "experts.down_proj," not in part["warnings"][0]


def test_peft_includes_some_families_experts_in_all_linear(spec, load) -> None:
    facts = load(spec("qwen3_moe", target_modules="all-linear", target_parameters=None)).facts
    assert sorted(facts["adapted_parameters"]) == [
        "model.layers.*.mlp.experts.down_proj",
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.gate.weight",
    ]
    assert facts["warnings"] == []


def test_every_weight_that_is_named_must_be_there(spec, load) -> None:
    error = refused(load, spec("gpt_oss", target_parameters=["experts.down_proj", "experts.gate_up_porj"]))
    assert (error.code, error.subject) == ("lora_target_modules", "target_parameters")
    assert "'experts.gate_up_porj'" in error.detail and "did you mean 'experts.gate_up_proj'?" in error.detail
    assert "experts.down_proj, experts.gate_up_proj" in str(error.hint)


def test_a_model_without_routed_experts_has_none_to_adapt(spec, load) -> None:
    error = refused(load, spec("llama"))
    assert (error.code, error.subject) == ("lora_target_modules", "target_parameters") and "no routed experts" in error.detail


def test_a_weight_of_an_adapted_linear_layer_is_refused(spec, load) -> None:
    error = refused(load, spec("gpt_oss", target_parameters=["q_proj.weight"]))
    assert error.code == "lora_target_modules" and "not a valid target" in error.detail


def test_a_linear_layer_is_not_silently_replaced_by_experts_of_its_name(spec, load, base, learn, some_sequences) -> None:
    shared = base(spec("deepseek_v3"))
    untouched = Policy(shared).score(some_sequences(3)).log_probs
    with pytest.raises(PolicyFailed, match=r"on down_proj: .* weights of the routed experts") as failed:
        load(spec("deepseek_v3", target_modules=["o_proj", "down_proj"], target_parameters=None), on=shared)
    assert failed.value.code == "lora_target_modules"
    assert torch.equal(Policy(shared).score(some_sequences(3)).log_probs, untouched)
    [warning] = load(spec("deepseek_v3", target_modules="all-linear"), on=shared, name="all").facts["warnings"]
    assert "shared_experts.down_proj.weight" in warning and "mlp.gate_proj.weight" in warning
    alone = load(spec("deepseek_v3", target_modules=["o_proj"], target_parameters=["shared_experts.down_proj.weight"]))
    assert alone.facts["adapted_parameters"] == ["model.layers.*.mlp.shared_experts.down_proj.weight"]
    losses = [learn(alone, 0) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_dropout_is_refused_before_the_queue() -> None:
    with pytest.raises(ValidationError, match="dropout must be 0 with target_parameters"):
        Lora(dropout=0.1, target_parameters="experts")


def test_dropout_on_experts_that_all_linear_includes_is_refused_with_the_remedy(spec, load) -> None:
    error = refused(load, spec("qwen3_moe", target_modules="all-linear", target_parameters=None, dropout=0.1))
    assert error.code == "lora_target_modules" and "model.adapter.dropout to 0" in str(error.hint)


def test_a_checkpoint_of_other_weights_does_not_fit(spec, load, learn, tmp_path: Path) -> None:
    policy = load(spec("gpt_oss", target_parameters=["experts.down_proj"]))
    policy.save(tmp_path)
    assert json.loads((tmp_path / "model" / "adapter_config.json").read_text())["target_parameters"] == ["experts.down_proj"]
    for parameters in ("experts", None):
        with pytest.raises(PolicyFailed) as failed:
            load(spec("gpt_oss", target_parameters=parameters), weights_from=tmp_path)
        assert failed.value.code == "checkpoint_mismatch"
