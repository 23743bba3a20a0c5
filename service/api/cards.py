"""The card of a checkpoint: a README.md that says what it is, where it comes from, and how to load it.

It is made on request and is not a file of the checkpoint, so that two equal runs save equal bytes.
"""

import json
from typing import Any

from fastapi import Response

from service.api.schema import version
from service.edge.auth import CallerDep
from service.edge.context import ContextDep
from service.edge.problems import responses
from service.edge.router import Router
from service.store import aliases, checkpoints
from service.store.tables import Checkpoint, Job
from service.telemetry import one_line

router = Router(prefix="/v1", tags=["checkpoints"])

LOAD_FULL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
"""
LOAD_LORA = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({source}{revision})
model = PeftModel.from_pretrained(base, "model")
tokenizer = AutoTokenizer.from_pretrained("model")
"""
TINY_LORA = "The base is Ratchet's own `tiny`, which is made and not downloaded: `ratchet sample` loads it."


@router.get(
    "/checkpoints/{checkpoint_id}/card",
    response_class=Response,
    responses={200: {"content": {"text/markdown": {"schema": {"type": "string"}}}}} | responses(404),
)
def read_card(context: ContextDep, caller: CallerDep, checkpoint_id: str) -> Response:
    """The README.md of a checkpoint, by its id or an alias: base model, objective, data, steps, metrics, how to load it."""
    with context.store.begin(readonly=True) as session:
        chain = checkpoints.lineage(session, caller.project, aliases.checkpoint(session, caller.project, checkpoint_id).id)
        text = card(chain)
    return Response(text, media_type="text/markdown; charset=utf-8")


def card(chain: list[tuple[Checkpoint, Job | None]]) -> str:
    """`chain`: the checkpoint and its ancestors, back to the first, each with its job if that still exists."""
    (row, job), (oldest, first) = chain[0], chain[-1]
    source = oldest.model.get("source")
    revision = oldest.model.get("revision") if first is None else first.resolved.get("revision")
    facts = {
        "checkpoint": row.id,
        "base model": f"{source} at {revision}" if revision else source,
        "weights": f"a {row.adapter} adapter" if row.adapter == "lora" else "all of the model",
        "step": row.step if job is None else f"{row.step} of {job.max_steps}",
        "earlier checkpoints": ", ".join(ancestor.id for ancestor, _ in chain[1:]),
        **({} if job is None else _of_job(job)),
        "made by": f"Ratchet {version()}",
    }
    lines = [f"| {name} | {_code(value)} |" for name, value in facts.items() if value not in (None, "")]
    measured = [f"| {_code(name)} | {value:.6g} |" for name, value in sorted(row.metrics.items()) if _is_number(value)]
    parts = [f"# {_code(row.id if job is None else job.name)}", "| | |\n|---|---|\n" + "\n".join(lines)]
    if measured:
        parts.append("Evaluated when it was saved:\n\n| metric | |\n|---|---|\n" + "\n".join(measured))
    parts.append(_loading(row, source, revision))
    return "\n\n".join(parts) + "\n"


def _of_job(job: Job) -> dict[str, Any]:
    objective, data, resolved = job.spec.get("objective") or {}, job.spec.get("data") or {}, job.resolved
    train = data.get("train") or {}
    graders = (job.spec.get("reward") or {}).get("graders") or []
    return {
        "job": job.id,
        "kind": job.kind,
        "objective": objective.get("preset") or ("of its own axes" if objective else None),
        "data": " ".join(str(train[name]) for name in ("source", "id", "task") if train.get(name)),
        "data sha256": job.data_sha256,
        "spec sha256": job.spec_sha256,
        "graders": ", ".join(str(grader.get("name") or grader.get("kind")) for grader in graders),
        "learning rate": (job.spec.get("optimizer") or {}).get("learning_rate"),
        "architecture": resolved.get("architecture"),
        "parameters": resolved.get("parameters"),
        "dtype": resolved.get("dtype"),
        "trained with": ", ".join(f"{name} {number}" for name, number in (resolved.get("versions") or {}).items()),
    }


def _loading(row: Checkpoint, source: str | None, revision: str | None) -> str:
    if row.adapter == "full":
        code = LOAD_FULL
    elif source == "tiny" or source is None:
        return f"## How to load it\n\n{TINY_LORA}"
    else:
        pinned = f", revision={json.dumps(revision)}" if revision else ""
        code = LOAD_LORA.format(source=json.dumps(source), revision=pinned)
    return f"## How to load it\n\nFrom this folder:\n\n```python\n{code}```"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _code(value: object) -> str:
    """The value as inline code in one table line, so that a job's name can be neither Markdown nor terminal control codes."""
    text = one_line(" ".join(str(value).split())).replace("|", "/").replace("`", "'")
    return f"`{text}`"
