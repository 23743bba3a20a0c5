"""Whatever a spec may say at its outermost ends: a job that was accepted ends well, or with a code that is its owner's.

The values are drawn from the JSON schema that callers see, so a new field is drawn as soon as it is there.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from service.errors import InvalidRequest
from service.failures import CODES
from service.jobs import lease as leases
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.spec.job import JobSpec
from service.spec.section import MOST
from service.store import jobs
from service.validation import parse
from workers import runner
from workers.tenure.keeper import Keeper

Schema = dict[str, Any]
SCHEMA: Schema = TypeAdapter(JobSpec).json_schema(by_alias=True)
SECTIONS: dict[str, Schema] = SCHEMA["$defs"]

ROWS = [{"q": f"{n:02d}", "a": f"{n:02d}"[::-1]} for n in range(8)]
SMALL = {"source": "tiny", "tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16, "context": 32}}
DATA = {
    "train": {"source": "inline", "rows": ROWS},
    "eval": {"source": "split", "rows": 2},
    "prompt": "rev {q}>",
    "answer": "{a}",
}
GRADERS = [{"kind": "exact", "reference": "{a}"}, {"kind": "length", "max_tokens": 3}]
BASES: dict[str, Schema] = {
    "rl": {
        "kind": "rl",
        "model": SMALL,
        "data": DATA,
        "objective": {"preset": "gspo"},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 3},
        "update": {"minibatches": 2},
        "reward": {"graders": GRADERS},
        "eval": {"max_completion_tokens": 3},
        "limits": {"max_steps": 1},
    },
    "supervised": {
        "kind": "supervised",
        "model": SMALL,
        "data": DATA,
        "update": {"batch_size": 2},
        "reward": {"graders": GRADERS},
        "eval": {"max_completion_tokens": 3},
        "limits": {"max_steps": 1},
    },
}
# What costs time and memory and is no number to compute with: each is drawn small.
COSTLY = {
    "prompts_per_step", "group_size", "max_completion_tokens", "minibatches", "epochs", "batch_size", "max_steps",
    "hidden_size", "layers", "heads", "intermediate_size", "context", "rank",
}  # fmt: skip
# What names things outside of the spec, or texts with a grammar of their own.
NAMES = {
    "source",
    "revision",
    "from_checkpoint",
    "name",
    "tags",
    "metadata",
    "target_modules",
    "target_parameters",
    "extract",
    "stop",
    "class",
    "gpus",
    "sharding",
}
TEXTS = {"reference": "{a}", "pattern": "[0-9]+", "schema": {"type": "integer"}, "metric": "eval/reward/mean"}
# What is not of this process.
LEFT_OUT = {"HttpGrader", "VllmEngine", "ReasoningGymGrader", "DatasetSource", "ReasoningGymSource"}


def values(schema: Schema, name: str = "") -> st.SearchStrategy[Any]:
    """Legal values of a JSON schema, at their ends and far from them; `name` is the field's."""
    if "$ref" in schema:
        return objects(schema["$ref"].rsplit("/", 1)[-1])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if name in TEXTS:
        return st.just(TEXTS[name])
    for union in ("anyOf", "oneOf"):
        if union in schema and schema.get("type") not in ("number", "integer"):
            members = [one for one in schema[union] if one.get("$ref", "").rsplit("/", 1)[-1] not in LEFT_OUT]
            return st.one_of(*(values(one, name) for one in members))
    kind: str = schema["type"]
    if kind in ("number", "integer"):
        return numbers(schema, name)
    if kind == "array":
        if "prefixItems" in schema:
            return st.tuples(*(values(one, name) for one in schema["prefixItems"])).map(list)
        return st.lists(values(schema["items"], name), min_size=schema.get("minItems", 0), max_size=2)
    return {"boolean": st.booleans(), "null": st.none()}[kind]


def numbers(schema: Schema, name: str) -> st.SearchStrategy[Any]:
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    if name in COSTLY:
        return st.sampled_from([least, least + 1, 2 * max(least, 1)])
    most = schema["maximum"] if "maximum" in schema else schema["exclusiveMaximum"]
    if schema["type"] == "integer":
        most = most if "maximum" in schema else most - 1
        return st.sampled_from([least, least + 1, 7, most - 1, most]).filter(lambda n: least <= n <= most)
    least = least if "minimum" in schema or "anyOf" in schema else math.nextafter(least, math.inf)
    most = most if "maximum" in schema else math.nextafter(most, -math.inf)
    drawn = [least, math.nextafter(least, math.inf), 0.0, 1e-300, 1e-45, 1e-9, 0.5, 1.0, 1e5, most / 3, most, math.ceil(least)]
    return st.sampled_from(drawn).filter(lambda n: least <= n <= most)


def objects(section: str) -> st.SearchStrategy[Any]:
    schema, required, optional = SECTIONS[section], {}, {}
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()) or "const" in field:
            required[name] = values(field, name)
        elif name not in NAMES:
            optional[name] = values(field, name)
    return st.fixed_dictionaries(required, optional=optional)


@st.composite
def specs(draw: st.DrawFn) -> Schema:
    """One of the two kinds, with a few sections drawn anew; each keeps what makes it cheap."""
    kind = draw(st.sampled_from(sorted(BASES)))
    base = BASES[kind]
    fields = SECTIONS["RLSpec" if kind == "rl" else "SupervisedSpec"]["properties"]
    drawn = draw(st.sets(st.sampled_from(sorted(fields.keys() - NAMES - {"kind", "data"})), min_size=1, max_size=3))
    spec = {**base}
    for name in sorted(drawn):
        found = draw(values(fields[name], name))
        kept = spec.get(name)
        spec[name] = {**kept, **found} if isinstance(kept, dict) and isinstance(found, dict) else found
        if name == "early_stopping" and found is not None:
            spec[name] = {"patience": 1, **found}
        if name == "model":
            spec[name] = {**spec[name], "tiny": {**SMALL["tiny"], **({"seed": 2**64 - 1} if draw(st.booleans()) else {})}}
    return {name: value for name, value in spec.items() if value is not None}


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """What a number does is the same over any database."""
    shutil.copyfile(sqlite_template, tmp_path / "ratchet.db")
    return f"sqlite:///{tmp_path / 'ratchet.db'}"


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(spec=specs())
@example(spec={**BASES["rl"], "optimizer": {"learning_rate": 1.0, "weight_decay": MOST, "eps": 5e-324}})
@example(spec={**BASES["rl"], "reward": {"graders": [{**GRADERS[1], "weight": MOST}, {**GRADERS[0], "weight": -MOST}]}})
@example(spec={**BASES["rl"], "objective": {"preset": "grpo", "kl": {"place": "reward", "coef": MOST}}})
@example(
    spec={
        **BASES["rl"],
        "model": {**SMALL, "tiny": {**SMALL["tiny"], "seed": 2**64 - 1}, "adapter": {"kind": "lora", "alpha": MOST}},
    }
)
def test_a_job_that_was_accepted_ends_well_or_by_its_owner_s_fault(spec, store, settings, doorbell):
    try:
        resolved = resolve(store, settings, "default", parse(JobSpec, spec))
    except InvalidRequest:
        return
    create_job(store, doorbell, project="default", sent=spec, resolved=resolved)
    claimed = leases.claim(store, settings, "w", {"any", "cpu", "gpu"})
    assert claimed is not None
    runner.run(Keeper(store, settings, doorbell), *claimed)  # its thread is not started: no attempt is given up as stalled
    with store.begin(readonly=True) as session:
        job = jobs.find(session, claimed[1].id)
    assert job is not None
    if job.status == "paused" and job.error is None:
        assert spec["limits"]["budget"]
    elif job.status != "succeeded":
        assert job.error is not None and CODES[job.error["code"]].category == "user", (spec, job.status, job.error)
