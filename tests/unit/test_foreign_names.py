"""Names of other libraries are refused with what they are called here."""

import re
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.spec.job import JobSpec
from service.validation import parse
from service.validation.foreign import KEYS, KINDS, NOT_OFFERED, VALUES
from service.validation.walk import pointer_of

SPEC: dict[str, Any] = {
    "kind": "rl",
    "model": {"source": "tiny"},
    "data": {"train": {"source": "inline", "rows": [{"q": "1"}]}, "prompt": "{q}"},
    "objective": {"preset": "gspo"},
    "reward": {"graders": [{"kind": "length", "max_tokens": 4}]},
}


def refusal(spec: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        parse(JobSpec, spec)
    (error,) = caught.value.errors
    return error.pointer, error.detail


@pytest.mark.parametrize("name", KEYS)
def test_every_place_that_the_table_names_is_there(name: str) -> None:
    first = KEYS[name].partition(".")[0].split()[-1]
    paths = [path for path in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", KEYS[name]) if path.startswith(f"{first}.")]
    for path in paths:
        supervised_only = path == "update.batch_size"
        assert pointer_of(JobSpec, path).replace("/", ".").strip(".") == path or supervised_only


@pytest.mark.parametrize("name", KEYS)
def test_a_key_of_another_library_is_refused_with_its_name_here(name: str) -> None:
    pointer, detail = refusal({**SPEC, name: 1})
    assert pointer == f"/{name}"
    assert KEYS[name] in detail, detail


@pytest.mark.parametrize(
    ("section", "key", "said"),
    [
        ("objective", "beta", "here that is objective.kl.coef"),
        ("objective", "epsilon", "here that is objective.surrogate.clip_low and clip_high"),
        ("objective", "loss_type", "here that is objective.preset"),
        ("objective", "importance_sampling_level", "here that is objective.ratio"),
        ("rollout", "num_generations", "here that is rollout.group_size"),
        ("optimizer", "lr", "here that is optimizer.learning_rate"),
        ("optimizer", "beta", "did you mean 'betas'?"),  # a word that is legal there, misspelt
        ("rollout", "group_sice", "did you mean 'group_size'?"),
        ("rollout", "max_steps", "a key of this name belongs to /limits/max_steps"),
        ("eval", "temprature", "did you mean 'temperature'?"),
        ("update", "temperature", "here that is rollout.temperature"),
        ("checkpoints", "output_dir", "here that is `ratchet checkpoints download"),
        ("checkpoints", "metric_for_best_model", "here that is checkpoints.keep_best.metric"),
    ],
)
def test_in_a_section_a_misspelt_word_goes_before_another_librarys(section: str, key: str, said: str) -> None:
    pointer, detail = refusal({**SPEC, section: {**SPEC.get(section, {}), key: 1}})
    assert pointer == f"/{section}/{key}"
    assert said in detail, detail


@pytest.mark.parametrize(
    ("section", "value", "pointer", "said"),
    [
        ("objective", {"preset": "dpo"}, "/objective/preset", "got 'dpo'; it is not offered: Ratchet learns from rewards"),
        ("objective", {"preset": "sft"}, "/objective/preset", "here that is kind: supervised"),
        ("objective", {"preset": "BNPO"}, "/objective/preset", "here that is the objective without a preset"),
        ("objective", {"preset": "GSPO"}, "/objective/preset", "did you mean 'gspo'?"),
        ("objective", {"aggregate": "seq-mean-token-mean"}, "/objective/aggregate/kind", "here that is seq"),
        ("objective", {"aggregate": {"kind": "dr_grpo"}}, "/objective/aggregate/kind", "here that is constant"),
        ("objective", {"kl": {"place": "loss", "estimator": "low_var_kl"}}, "/objective/kl/estimator", "here that is k3"),
        ("objective", {"advantage": {"scale": False}}, "/objective/advantage/scale", "here that is none"),
        ("objective", {"advantage": "rloo"}, "/objective/advantage/centre", "here that is leave_one_out"),
        ("reward", {"graders": [{"kind": "string_check"}]}, "/reward/graders/0/kind", "here that is exact, or contains"),
        ("reward", {"graders": [{"kind": "nmber"}]}, "/reward/graders/0/kind", "did you mean 'number'?"),
    ],
)
def test_a_value_of_another_library_says_what_to_write(section: str, value: dict[str, Any], pointer: str, said: str) -> None:
    where, detail = refusal({**SPEC, section: value})
    assert where == pointer and said in detail, detail


def test_every_value_that_is_named_as_ours_is_legal() -> None:
    for name, hint in VALUES["aggregate"].items():
        assert name and parse(JobSpec, {**SPEC, "objective": {"aggregate": hint}})
    for field, axis in (("estimator", {"kl": {"place": "loss"}}), ("scale", {"advantage": {}}), ("centre", {"advantage": {}})):
        for hint in VALUES[field].values():
            [(section, given)] = axis.items()
            assert parse(JobSpec, {**SPEC, "objective": {section: {**given, field: hint.partition(",")[0]}}})


def test_what_only_rl_has_is_said_to_a_supervised_job() -> None:
    spec = {**{k: v for k, v in SPEC.items() if k not in ("objective", "reward")}, "kind": "supervised"}
    spec["data"] = {**SPEC["data"], "answer": "{q}"}
    _, detail = refusal({**spec, "num_generations": 8})
    assert detail.endswith("in a job of kind rl that is rollout.group_size")
    assert "here that is optimizer.learning_rate" in refusal({**spec, "lr": 8})[1]


def test_every_name_that_the_page_for_trls_users_lists_is_known() -> None:
    page = (Path(__file__).parents[2] / "docs" / "from-trl.md").read_text()
    rows = re.findall(r"^\| (`[a-z].*?) \| ", page.split("`loss_type`, expressed")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) > 25 and "top_entropy_quantile" in names
    for name in names:
        assert name in KEYS or "belongs to" in refusal({**SPEC, name: 1})[1], name


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_a_name_without_a_counterpart_is_said_not_to_be_offered(name: str) -> None:
    for section in ("", "rollout", "update", "model"):
        spec = {**SPEC, section: {**SPEC.get(section, {}), name: 1}} if section else {**SPEC, name: 1}
        _, detail = refusal(spec)
        assert detail == f"unknown key '{name}'; it {NOT_OFFERED[name]}"
    paths = re.findall(r"\b(?:rollout|update|objective)(?:\.[a-z_]+)+", NOT_OFFERED[name])
    assert all(pointer_of(JobSpec, path).replace("/", ".").strip(".") == path for path in paths)
    assert name not in KEYS


def test_a_kind_without_a_counterpart_is_said_not_to_be_offered() -> None:
    assert refusal({**SPEC, "kind": "dpo"}) == (
        "/kind",
        f"must be one of rl, supervised, got 'dpo'; it {NOT_OFFERED['dpo']}",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_another_library_says_what_to_write(kind: str) -> None:
    pointer, detail = refusal({**SPEC, "kind": kind})
    assert (pointer, detail.endswith(f"; here that is {KINDS[kind]}")) == ("/kind", True), detail
