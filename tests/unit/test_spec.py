"""What a spec may say: each refusal has a pointer to the place and says what is allowed."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

import service.app  # noqa: F401 - the documents of its routes
from job_specs import RL, SUPERVISED
from service.errors import FieldError, InvalidRequest
from service.rewards.texts import wrong_texts
from service.spec.job import JobSpec, RLSpec, SupervisedSpec
from service.spec.section import Section
from service.validation import parse


def changed(base: dict[str, Any], pointer: str, value: Any) -> dict[str, Any]:
    """The spec with the value at the pointer set; lists are extended by an index at their end."""
    spec = copy.deepcopy(base)
    *path, last = pointer.strip("/").split("/")
    place: Any = spec
    for key in path:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    if isinstance(place, list):
        place[int(last) :] = [value]
    else:
        place[last] = value
    return spec


def errors(spec: dict[str, Any]) -> list[FieldError]:
    """What the models refuse, else what the sandbox does: both are told before a job is queued."""
    try:
        parsed = parse(JobSpec, spec)
    except InvalidRequest as refused:
        return refused.errors
    wrong = wrong_texts(parsed.reward)
    assert wrong, "the spec is taken"
    return wrong


def test_the_smallest_specs_are_complete() -> None:
    assert isinstance(parse(JobSpec, RL), RLSpec)
    assert isinstance(parse(JobSpec, SUPERVISED), SupervisedSpec)


def test_the_defaults_of_the_kinds() -> None:
    spec = parse(JobSpec, RL)
    assert isinstance(spec, RLSpec)
    assert (spec.rollout.prompts_per_step, spec.rollout.group_size, spec.update.minibatches) == (32, 8, 4)
    assert (spec.eval.every_steps, spec.limits.max_steps, spec.seed, spec.resources.class_) == (10, 100, 0, "any")


@pytest.mark.parametrize(
    ("pointer", "value", "at", "says"),
    [
        ("/rollout/group_sise", 8, "/rollout/group_sise", "did you mean 'group_size'"),
        ("/lerning_rate", 1e-3, "/lerning_rate", "unknown key"),
        ("/kind", "rll", "/kind", "did you mean 'rl'"),
        ("/model/source", "", "/model/source", "at least 1 character"),
        ("/model", {}, "/model", "name a `source`"),
        ("/model", {"source": "org/model", "tiny": {}}, "/model/tiny", "tiny goes with `source: tiny`"),
        ("/model/tiny", {"hidden_size": 100, "heads": 3}, "/model/tiny", "even multiple of heads"),
        ("/model/adapter", {"kind": "lora", "rank": 0}, "/model/adapter/rank", "at least 1"),
        ("/model/adapter", {"kind": "lora", "target_modules": []}, "/model/adapter/target_modules", "at least 1"),
        ("/model/from_checkpoint", "job_123", "/model/from_checkpoint/id", "an alias (digits@production)"),
        ("/data/train", {"source": "inline", "rows": []}, "/data/train/rows", "at least 1"),
        ("/data/train", {"source": "dataset", "id": "nonsense"}, "/data/train/id", "^ds_"),
        ("/data/train", {"source": "file"}, "/data/train/source", "must be one of dataset, inline, reasoning_gym"),
        ("/data/eval", {"source": "split", "rows": 0}, "/data/eval/rows", "at least 1"),
        ("/data/prompt", "{q", "/data/prompt", "write {{ and }} for braces"),
        ("/data/prompt", "{q.__class__}", "/data/prompt", "takes {column} only"),
        ("/data/prompt", None, "/data", "exactly one of `prompt`"),
        ("/data/chat", "messages", "/data", "exactly one of `prompt`"),
        ("/objective/preset", "gsop", "/objective/preset", "did you mean 'gspo'"),
        ("/objective/surrogate", {"clip_high": 1.2}, "/objective/surrogate", "for an absolute bound of 1.2 write 0.2"),
        ("/objective", {"preset": "ppo"}, "/objective/advantage/centre", "a job has no advantages beside its rewards"),
        ("/objective/ratio", "segment", "/objective/ratio", "a job has no segment_ids"),
        ("/objective/select", {"top_entropy": 0.2}, "/objective/select/top_entropy", "top_entropy is not offered in a job"),
        (
            "/rollout/group_size",
            1,
            "/rollout/group_size",
            "rollout.group_size is 1, but the advantage compares answers of a group",
        ),
        ("/rollout/temperature", 0, "/rollout/temperature", "at least 1e-06, got 0"),
        ("/eval/temperature", 1e-9, "/eval/temperature", "must be 0 (greedy), or at least 1e-06, got 1e-09"),
        ("/rollout/temperature", float("nan"), "/rollout/temperature", ""),
        ("/rollout/stop", [""], "/rollout/stop/0", "at least 1 character"),
        (
            "/update/minibatches",
            7,
            "/update/minibatches",
            "update.minibatches must divide prompts_per_step x group_size, got 7 and 256",
        ),
        ("/update/microbatch_tokens", 0, "/update/microbatch_tokens", ""),
        ("/update/microbatch_tokens", "all", "/update/microbatch_tokens", "auto"),
        ("/optimizer/learning_rate", float("inf"), "/optimizer/learning_rate", ""),
        ("/optimizer/betas", [0.9, 1.0], "/optimizer/betas/1", "less than 1"),
        ("/limits/max_runtime_s", float("inf"), "/limits/max_runtime_s", ""),
        ("/limits/max_steps", "many", "/limits/max_steps", "an integer"),
        ("/limits/max_steps", "3", "/limits/max_steps", "an integer, got '3'"),
        ("/limits/max_steps", True, "/limits/max_steps", "an integer, got true"),
        ("/optimizer/learning_rate", "1e-5", "/optimizer/learning_rate", "a number, got '1e-5'"),
        ("/optimizer/betas", [0.9, False], "/optimizer/betas/1", "a number, got false"),
        ("/objective/surrogate", {"clip_high": "0.2"}, "/objective/surrogate/clip_high", "a number, got '0.2'"),
        ("/early_stopping", {}, "/early_stopping", "give `patience`, `target` or both"),
        ("/early_stopping", {"patience": 2}, "/early_stopping", "give data.eval"),
        ("/checkpoints/keep_best", {}, "/checkpoints/keep_best", "give data.eval"),
        ("/resources/class", "tpu", "/resources/class", "any, cpu, gpu"),
        ("/tags", [""], "/tags/0", "at least 1 character"),
        ("/reward/graders", [], "/reward/graders", "at least 1"),
        ("/reward/graders/1", {"kind": "exact", "reference": "{a}"}, "/reward/graders", "two are called 'exact'"),
        ("/reward/graders/0/extract", "(", "/reward/graders/0/extract", "not a regular expression: missing )"),
        ("/reward/graders/0", {"kind": "regex", "pattern": "[a"}, "/reward/graders/0/pattern", "not a regular expression"),
        ("/reward/graders/0", {"kind": "regexp"}, "/reward/graders/0/kind", "did you mean 'regex'"),
        (
            "/reward/graders/0",
            {"kind": "json_schema", "schema": {"type": "strin"}},
            "/reward/graders/0/schema",
            "not a JSON Schema",
        ),
        (
            "/reward/graders/0",
            {"kind": "length", "min_tokens": 9, "max_tokens": 8},
            "/reward/graders/0/min_tokens",
            "must not exceed",
        ),
        (
            "/reward/graders/0",
            {"kind": "length", "max_tokens": 8, "extract": "a"},
            "/reward/graders/0/extract",
            "extract does not go with length",
        ),
        ("/reward/graders/0", {"kind": "http", "url": "ftp://x/"}, "/reward/graders/0/url", "https?"),
        ("/reward/graders/0", {"kind": "http", "url": "http:///score"}, "/reward/graders/0/url", "names no host"),
        ("/reward/graders/0", {"kind": "http", "url": "http://x:99999/"}, "/reward/graders/0/url", "not a URL"),
        ("/reward/graders/0", {"kind": "http", "url": "http://me:pw@x/"}, "/reward/graders/0/url", "use `secret`"),
        ("/reward/max_error_rate", 1.5, "/reward/max_error_rate", "at most 1"),
        ("/resources", {"sharding": "optimizer"}, "/resources", "ask for gpus: 2 or more"),
        ("/resources", {"gpus": 2, "sharding": "weights"}, "/resources/sharding", "optimizer"),
        ("/resources", {"sharding": "full"}, "/resources", "ask for gpus: 2 or more"),
    ],
)
def test_what_is_wrong_is_said_where_it_stands(pointer: str, value: Any, at: str, says: str) -> None:
    found = errors(changed(RL, pointer, value))
    assert any(error.pointer.startswith(at) and says in error.detail for error in found), found


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("/model/tiny/seed", 2**64),
        ("/optimizer/weight_decay", 2**63),
        ("/optimizer/weight_decay", 10**400),
        ("/objective/kl", {"place": "loss", "coef": 1e308}),
        ("/reward/graders/0/weight", -1e308),
        ("/limits/stall_timeout_s", 1e308),
        ("/limits/budget/worker_s", 1e308),
        ("/early_stopping/min_delta", 1e308),
        ("/resources/gpus", True),
        ("/resources/gpus", 1.0),
        ("/resources/gpus", "1"),
    ],
)
def test_a_number_that_nothing_can_be_computed_of_is_refused_where_it_stands(pointer: str, value: Any) -> None:
    [error] = errors(changed(changed(RL, "/early_stopping", {"target": 1.0}), pointer, value))[:1]
    assert error.pointer.startswith(pointer) and error.detail.startswith("must be ") and ", got " in error.detail


def numbers(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number of a JSON schema, and where it stands; not those of tensors."""
    if isinstance(schema, dict) and "log_probs" not in schema.get("properties", ()):
        if schema.get("type") in ("number", "integer"):
            yield place, schema
        for name, inner in schema.items():
            if name not in ("default", "example", "examples"):
                yield from numbers(inner, f"{place}/{name}")
    elif isinstance(schema, list):
        for number, inner in enumerate(schema):
            yield from numbers(inner, f"{place}/{number}")


LEAST, MOST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def bounded(number: dict[str, Any]) -> bool:
    """At both ends; a number in several ranges has its least in one of them."""
    parts = [number, *number.get("anyOf", ())]
    return any(name in part for name in LEAST for part in parts) and any(name in number for name in MOST)


def sections(of: type[BaseModel] = Section) -> Iterator[type[BaseModel]]:
    yield from of.__subclasses__()
    for one in of.__subclasses__():
        yield from sections(one)


def test_every_number_that_may_be_sent_has_bounds() -> None:
    documents = {JobSpec, *sections()}  # what `service.app` takes, too
    found = {(place, bounded(one)) for document in documents for place, one in numbers(TypeAdapter(document).json_schema())}
    assert len(found) > 100
    assert {place for place, has in found if not has} == set()


def test_everything_wrong_is_said_at_once() -> None:
    spec = changed(changed(changed(RL, "/rollout/group_sise", 1), "/optimizer/learning_rate", -1), "/seed", "x")
    assert {error.pointer for error in errors(spec)} >= {"/rollout/group_sise", "/optimizer/learning_rate", "/seed"}


def test_a_password_in_a_url_is_not_repeated() -> None:
    found = errors(changed(RL, "/reward/graders/0", {"kind": "http", "url": "http://me:hunter2@x/"}))
    assert "hunter2" not in repr(found)


def test_a_supervised_job_needs_answers() -> None:
    [error] = errors(changed(SUPERVISED, "/data/answer", None))
    assert "supervised job learns it" in error.detail and error.pointer == "/data/answer"


def test_a_group_of_one_is_legal_without_a_group_baseline() -> None:
    spec = changed(changed(RL, "/rollout/group_size", 1), "/objective/advantage", {"centre": "none", "scale": "none"})
    assert isinstance(parse(JobSpec, spec), RLSpec)


@pytest.mark.parametrize(
    "source",
    [
        {"source": "reasoning_gym", "task": "chain_sum", "config": {"size": 5}},
        {"source": "reasoning_gym", "task": "chain_sum", "config": {"seed": 5}},
    ],
)
def test_seed_and_size_of_a_task_stand_beside_its_config(source: dict[str, Any]) -> None:
    assert any("beside `config`, not inside" in error.detail for error in errors(changed(RL, "/data/train", source)))


@pytest.mark.parametrize(
    "pattern",
    ["(a{9999}){9999}", "a{999999999}", "(?:" * 300 + "a" + "){2}" * 300, "(" * 5000 + "a" + ")" * 5000, "a{2}" * 2000],
)
def test_a_pattern_that_would_take_all_memory_is_refused_before_it_is_compiled(pattern: str) -> None:
    spec = changed(RL, "/reward/graders/0", {"kind": "regex", "pattern": pattern})
    assert any(error.pointer == "/reward/graders/0/pattern" for error in errors(spec))


@pytest.mark.parametrize(
    "pattern", [r"\d{4}-\d{2}-\d{2}", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"^.{1,2000}$", r"\{1\}"]
)
def test_ordinary_repeats_are_legal(pattern: str) -> None:
    assert parse(JobSpec, changed(RL, "/reward/graders/0", {"kind": "regex", "pattern": pattern}))


def test_a_schema_that_nests_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"not": schema}
    assert errors(changed(RL, "/reward/graders/0", {"kind": "json_schema", "schema": schema}))


def test_the_example_in_the_readers_hands_is_legal() -> None:
    text = """
    kind: rl
    name: addition
    model: {source: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: bfloat16, adapter: {kind: lora, target_modules: [q_proj]}}
    data:
      train: {source: dataset, id: ds_01}
      eval: {source: dataset, id: ds_01, max_rows: 256}
      prompt: "{question}\\n"
      answer: "{answer}"
    objective: {preset: gspo, surrogate: {clip_low: 3.0e-4, clip_high: 4.0e-4}, kl: {place: none}}
    reward:
      graders:
        - {name: correct, kind: number, reference: "{answer}", weight: 1.0}
        - {name: short, kind: length, max_tokens: 64, weight: 0.1}
        - {name: judge, kind: http, url: "https://rewards.internal/score", secret: judge, timeout_s: 30, weight: 0.5}
    checkpoints: {every_steps: 20, keep_last: 2, keep_best: {metric: eval/reward/mean, count: 1}}
    early_stopping: {metric: eval/reward/mean, patience: 5, min_delta: 0.002}
    """
    spec = parse(JobSpec, yaml.safe_load(text))
    assert isinstance(spec, RLSpec) and spec.reward.graders[1].name == "short"


def models(annotation: Any, seen: set[Any]) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
        seen.add(annotation)
        yield annotation
        for field in annotation.model_fields.values():
            yield from models(field.annotation, seen)
    for argument in get_args(annotation):
        yield from models(argument, seen)


def test_every_field_is_described_and_every_section_has_a_docstring() -> None:
    sections = [model for model in models(JobSpec, set()) if model.__module__.startswith("service.spec.")]
    assert len(sections) > 25
    undescribed = [
        f"{model.__name__}.{name}"
        for model in sections
        for name, field in model.model_fields.items()
        if not field.description and name not in ("kind", "source")  # tags; their section's docstring tells
    ]
    assert undescribed == []
    assert [model.__name__ for model in sections if not model.__doc__ or model.__doc__ == BaseModel.__doc__] == []


def test_every_grader_stands_in_the_docs() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "graders.md").read_text()
    kinds = re.findall(r"^\| `(\w+)` \|", docs, re.MULTILINE)
    found = errors(changed(RL, "/reward/graders/0", {"kind": "?"}))
    assert sorted(kinds) == sorted(found[0].allowed)
