"""Objectives as they are asked for: the three written forms, presets as data, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from service.errors import InvalidRequest
from service.spec import axes
from service.spec.objective import ObjectiveSpec
from service.spec.presets import BASE, PRESETS
from service.spec.tensors import OF_A_JOB, uses
from service.validation import parse
from workers.objectives import Objective, advantage, aggregate, correct, kl, ratio, select, surrogate


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid")
    objective: ObjectiveSpec


def resolve(spec):
    return ObjectiveSpec.model_validate(spec).resolve()


def refused(spec):
    with pytest.raises(InvalidRequest) as caught:
        parse(Document, {"objective": spec})
    return {error.pointer: error.detail for error in caught.value.errors}


# ---------------------------------------------------------------- written forms


def test_the_three_written_forms_of_an_axis():
    by_kind = resolve({"preset": "gspo", "aggregate": "token"})
    assert by_kind["aggregate"] == {"kind": "token", "length_power": 0.0}
    parameters = resolve({"preset": "gspo", "surrogate": {"clip_high": 5e-4}})
    assert parameters["surrogate"] == {"kind": "ppo", "clip_low": 3e-4, "clip_high": 5e-4, "dual_clip": None}
    whole = resolve({"preset": "gspo", "surrogate": {"kind": "cispo", "weight_max": 3}})
    assert whole["surrogate"] == {"kind": "cispo", "weight_min": [0.0, 0.0], "weight_max": [3.0, 3.0]}


def test_another_kind_drops_the_presets_parameters_and_the_same_kind_keeps_them():
    assert resolve({"preset": "gspo", "surrogate": "two_sided"})["surrogate"]["clip_low"] == 0.2
    assert resolve({"preset": "gspo", "surrogate": {"kind": "ppo"}})["surrogate"]["clip_low"] == 3e-4


def test_every_axis_may_be_its_head_alone():
    spec = resolve({"ratio": "sequence", "advantage": "leave_one_out", "kl": "loss", "correct": "mask", "anchor": "rollout"})
    assert spec["ratio"] == {"kind": "sequence"}
    assert spec["advantage"]["centre"] == "leave_one_out"
    assert spec["kl"] == {"place": "loss", "estimator": "k3", "gradient": "plain", "reference": "ref", "coef": 0.04}
    assert spec["correct"]["action"] == "mask"
    assert spec["anchor"] == "rollout"


def test_the_whole_form_of_the_documentation_is_taken_as_it_stands():
    written = {
        "ratio": "sequence",
        "anchor": "old",
        "surrogate": {"kind": "ppo", "clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": None},
        "aggregate": {"kind": "seq", "length_power": 0},
        "advantage": {"centre": "group_mean", "scale": "group_std", "eps": 1e-6},
        "kl": {"place": "loss", "estimator": "k3", "gradient": "plain", "reference": "ref", "coef": 0.04},
        "correct": {"level": "token", "action": "truncate", "cap": 2.0},
        "select": {"truncated": False, "zero_variance": True},
    }
    resolved = resolve(written)
    for name, value in written.items():
        if isinstance(value, dict):
            assert resolved[name].items() >= value.items()
    assert resolved["preset"] is None
    assert resolve(resolved) == resolved


def test_nothing_said_means_a_clipped_token_ratio_and_nothing_else():
    spec = ObjectiveSpec()
    assert spec == ObjectiveSpec.model_validate({})
    assert spec.kl.place == "none"
    assert needs(spec) == {"old_log_probs"}
    assert ObjectiveSpec.model_validate("gspo") == ObjectiveSpec(preset="gspo")


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_preset_is_plain_json_and_resolves_to_itself(preset):
    resolved = resolve(preset)
    assert set(resolved) == {"preset", *BASE}
    again = json.loads(json.dumps(resolved))
    assert again == resolved == resolve(again)
    Objective(resolved)


def test_the_presets_of_the_main_road():
    gspo, token, grpo = resolve("gspo"), resolve("gspo_token"), resolve("grpo")
    assert gspo["ratio"] == {"kind": "sequence"}
    assert gspo["aggregate"]["kind"] == grpo["aggregate"]["kind"] == "seq"
    assert gspo["surrogate"] == {"kind": "ppo", "clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": None}
    assert {name for name in gspo if gspo[name] != token[name]} == {"preset", "ratio"}
    assert grpo["kl"] == {"place": "loss", "estimator": "k3", "gradient": "plain", "reference": "ref", "coef": 0.04}
    assert grpo["advantage"] == {"centre": "group_mean", "scale": "group_std", "eps": 1e-6, "several": "sum_then_normalize"}


def test_presets_have_distinct_objectives():
    """But for verl's gspo, which is gspo_token: that is the point of the parity preset."""
    seen: dict[str, str] = {}
    for preset in set(PRESETS) - {"verl_gspo"}:
        key = json.dumps({name: value for name, value in resolve(preset).items() if name != "preset"})
        assert key not in seen, f"{preset} is {seen.get(key)}"
        seen[key] = preset


def test_schema_and_mathematics_know_the_same_names():
    """Both sides are lists of names; here they are held against each other."""

    def kinds(models, key="kind"):
        return {kind for model in models for kind in model.model_fields[key].annotation.__args__}

    assert kinds(axes.AnyRatio.__args__) == set(ratio.RATIOS)
    assert kinds(axes.AnySurrogate.__args__) == set(surrogate.SURROGATES)
    assert kinds(axes.AnyAggregate.__args__) == set(aggregate.AGGREGATES)
    assert kinds([axes.Advantage], "centre") == set(advantage.CENTRES)
    assert kinds([axes.Advantage], "scale") == set(advantage.SCALES)
    assert kinds([axes.Advantage], "several") == set(advantage.SEVERAL)
    assert kinds([axes.Kl], "estimator") == set(kl.ESTIMATORS)
    assert kinds([axes.Kl], "gradient") == set(kl.GRADIENTS)
    assert kinds([axes.Correct], "level") == set(correct.LEVELS)
    assert kinds([axes.Correct], "action") == {"none", *correct.ACTIONS}
    assert set(axes.Select.model_fields) == set(select.SELECTORS)


def needs(spec, given=OF_A_JOB):
    """The tensors that are missing of a batch."""
    return uses(ObjectiveSpec.model_validate(spec), given).needed.keys() - given


def test_what_each_objective_needs():
    assert needs("grpo") == {"old_log_probs", "ref_log_probs"}
    assert needs("dppo") == {"rollout_log_probs"}
    assert not needs("cross_entropy")
    assert needs("ppo", frozenset({"advantages"})) == {"old_log_probs"}  # a KL in rewards that are not there
    assert needs("rloo") == {"old_log_probs", "ref_log_probs"}
    assert "segment_ids" in needs({"ratio": "segment"})
    assert "segment_ids" not in needs({"ratio": {"kind": "segment", "chunk": 8}})
    assert "ref_log_probs" not in needs({"preset": "grpo", "kl": {"coef": 0}})
    assert needs({"correct": "truncate"}) == {"old_log_probs", "rollout_log_probs"}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("bound", ["clip_low", "clip_high"])
def test_a_clip_of_1_2_is_refused_with_what_is_allowed(bound):
    errors = refused({"preset": "gspo", "surrogate": {bound: 1.2}})
    assert list(errors) == [f"/objective/surrogate/{bound}"]
    allowed = {"clip_low": "at least 0 and below 1", "clip_high": "at least 0 and at most 1, or 2 and more"}[bound]
    assert allowed in errors[f"/objective/surrogate/{bound}"]
    assert "got 1.2" in errors[f"/objective/surrogate/{bound}"]


@pytest.mark.parametrize(
    ("spec", "pointer", "says"),
    [
        ({"preset": "gpso"}, "/objective/preset", "must be one of ppo, grpo, "),
        ({"preset": "gpso"}, "/objective/preset", "got 'gpso'; did you mean 'gspo'?"),
        ("grop", "/objective/preset", "did you mean 'grpo'"),
        ({"preset": "gspo", "surrogate": {"clip_lo": 0.1}}, "/objective/surrogate/clip_lo", "clip_low"),
        ({"presett": "gspo"}, "/objective/presett", "preset"),
        ({"ratio": "sequnce"}, "/objective/ratio/kind", "sequence"),
        ({"surrogate": {"kind": "cispo", "clip_low": 0.2}}, "/objective/surrogate/clip_low", "clip_low"),
        ({"surrogate": {"clip_low": "much"}}, "/objective/surrogate/clip_low", "number"),
        ({"surrogate": {"clip_high": float("nan")}}, "/objective/surrogate/clip_high", "finite"),
        ({"surrogate": {"dual_clip": 0.5}}, "/objective/surrogate/dual_clip", "greater than 1"),
        ({"surrogate": {"kind": "cispo", "weight_min": 6}}, "/objective/surrogate/weight_min", "weight_max"),
        ({"preset": "topr", "surrogate": {"weight_min": [2, 0]}}, "/objective/surrogate/weight_min", "2 > 1"),
        ({"preset": "topr", "surrogate": {"weight_min": -1}}, "/objective/surrogate/weight_min", "at least 0"),
        ({"preset": "topr", "surrogate": {"weight_max": "x"}}, "/objective/surrogate/weight_max", "must be a number"),
        ({"surrogate": {"kind": "cispo", "weight_max": 0}}, "/objective/surrogate/weight_max", "greater than 0"),
        ({"surrogate": {"kind": "cispo", "weight_max": [5, 0]}}, "/objective/surrogate/weight_max/1", "greater than 0"),
        ({"preset": "vespo", "surrogate": {"k": [1, -1]}}, "/objective/surrogate/k/1", "at least 0"),
        ({"surrogate": {"kind": "sapo", "tau_positive": 0}}, "/objective/surrogate/tau_positive", "greater than 0"),
        ({"aggregate": {"kind": "constant", "constant": 0}}, "/objective/aggregate/constant", "greater than 0"),
        ({"ratio": {"kind": "segment", "chunk": 0}}, "/objective/ratio/chunk", "at least 1"),
        ({"preset": "gspo", "kl": {"coef": 0.1}}, "/objective/kl/place", "required"),
        ({"correct": {"cap": 2}}, "/objective/correct/action", "required"),
        ({"select": {"top_entropy": 1.5}}, "/objective/select/top_entropy", "at most 1"),
        ({"preset": "gspo", "ratio": "one"}, "/objective/ratio/kind", "surrogate none"),
        ({"preset": "gdpo", "kl": "reward"}, "/objective/kl/place", "normalize_then_sum"),
        ({"kl": {"place": "reward", "gradient": "straight_through"}}, "/objective/kl/gradient", "plain"),
        (
            {"ratio": "one", "surrogate": "none", "kl": {"place": "loss", "gradient": "ratio_weighted"}},
            "/objective/kl/gradient",
            "token_ratio_weighted",
        ),
        ({"correct": {"action": "mask", "low": 3}}, "/objective/correct/low", "low must not exceed high, got 3 > 2"),
        ({"correct": {"action": "truncate", "floor": 2.5}}, "/objective/correct/floor", "floor must not exceed cap"),
        ({"anchor": "new"}, "/objective/anchor", "old, rollout"),
        (7, "/objective", "object"),
    ],
)
def test_what_is_wrong_is_said_where_it_stands(spec, pointer, says):
    errors = refused(spec)
    assert list(errors) == [pointer]
    assert says in errors[pointer]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from([*BASE, "preset", "clip"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.sampled_from(["gspo", "token", "seq", "ppo", "none", "loss", "x"]),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(st.sampled_from(["kind", "place", "clip_low", "k"]), inner, max_size=3)
            ),
            max_leaves=4,
        ),
        max_size=4,
    )
)
def test_any_json_is_taken_or_refused_and_never_breaks(sent):
    try:
        spec = parse(Document, {"objective": sent}).objective
    except InvalidRequest:
        return  # with a pointer and a message, as the test above asks for
    Objective(spec.resolve())


def test_the_schema_documents_every_parameter_and_the_short_forms():
    schema = ObjectiveSpec.model_json_schema()
    assert {
        "type": "string",
        "enum": ["token", "sequence", "sequence_token", "product", "product_token", "one", "segment"],
    }.items() <= (schema["properties"]["ratio"]["anyOf"][1].items())
    assert set(schema["properties"]["preset"]["enum"]) == {*PRESETS, None}
    undocumented = [
        f"{model}.{name}"
        for model, definition in schema["$defs"].items()
        for name, field in definition["properties"].items()
        if name != "kind" and "description" not in field
    ]
    assert undocumented == []


# ---------------------------------------------------------------- what is warned of


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"preset": "gspo", "surrogate": {"clip_low": 0.2}}, "hardly ever acts"),
        ({"preset": "gspo_token", "aggregate": "token"}, "more weight"),
        ({"ratio": "product"}, "long answers"),
        ({"preset": "dppo", "correct": "truncate"}, "twice"),
    ],
)
def test_what_is_legal_and_probably_not_meant_is_warned_of(spec, says):
    warnings = ObjectiveSpec.model_validate(spec).warnings()
    assert any(says in warning for warning in warnings), warnings


def test_a_single_update_makes_every_clip_a_no_op():
    assert any("no clip acts" in warning for warning in ObjectiveSpec(preset="gspo").warnings(updates_per_rollout=1))
    assert ObjectiveSpec(preset="gspo").warnings(updates_per_rollout=4) == []
    assert ObjectiveSpec(preset="gmpo").warnings() == []  # its clip is on the log ratio of a token
