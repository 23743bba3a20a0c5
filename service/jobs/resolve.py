"""From a parsed spec to the one that will run: fill in every default, look up every name, report all errors at once."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from service.doorbell import class_of
from service.errors import FieldError, InvalidRequest, NotFound
from service.jobs.chats import Chats
from service.jobs.data import Data, DataRows, Row, open_source, split
from service.jobs.gym import check_task
from service.jobs.gym_rows import RowMaker
from service.jobs.held_out import check_seeds, copied_rows, learnt_rows, shared_seeds
from service.jobs.reference_checks import Formula, check_references
from service.jobs.resolve_model import resolve_model, tokenizer_folder
from service.jobs.resolve_reward import check_metrics, check_reward, wrong_ways
from service.jobs.resolve_rollout import check_rollout, rollout_warnings
from service.jobs.row_checks import check_rows, without_overlong
from service.settings import Settings
from service.spec.data import DatasetSource, InlineSource, ReasoningGymSource, SplitSource, TrainSource
from service.spec.job import RLSpec, SupervisedSpec
from service.spec.storable import not_storable
from service.spec.templates import columns_of
from service.spec.work import MOST_GPUS
from service.store import clock, datasets, workers
from service.store.session import Store
from service.store.tables import Dataset
from service.validation import invalid
from service.validation.words import counted

T = TypeVar("T")

DEFAULT_EVAL_TOKENS = 64
GYM_ROW = {"question": "", "answer": "", "metadata": {}}  # the columns of every task; only the worker makes rows


class _Unmade(DataRows):
    """So many rows, of which only the columns are known."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def _row(self, index: int) -> Row:
        return GYM_ROW


@dataclass(frozen=True)
class Resolved:
    """What `create_job` stores and a worker runs."""

    spec: dict[str, Any]  # every default filled in, the objective as its axes; legal input again
    spec_sha256: str
    data_sha256: str
    kind: str
    max_steps: int
    from_checkpoint_id: str | None
    estimates: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    dataset_paths: dict[str, Path] = field(default_factory=dict)
    formulas: list[Formula] = field(default_factory=list)  # references that service.rewards.references must read
    chats: Chats | None = None  # what service.rewards.chats must render
    base_key: str | None = None  # of sessions and samplers


def resolve(store: Store, settings: Settings, project: str, spec: RLSpec | SupervisedSpec) -> Resolved:
    """Look up everything that the spec names. Raises InvalidRequest with one FieldError for each fault."""
    errors = not_storable(spec.model_dump(by_alias=True))
    if errors:  # the rest could not even be quoted
        raise invalid(errors)
    with store.begin(readonly=True) as session:
        model, context = resolve_model(session, settings, project, spec.model, errors)
        chats = not errors and spec.data.chat is not None
        uploaded = _datasets(session, project, spec, errors)
        errors += _check_gpus(session, spec)
    tokenizer = tokenizer_folder(store, project, model) if chats else None
    paths = {key: store.blobs.fetch(dataset.path) for key, dataset in uploaded.items()}
    spec = _filled(spec.model_copy(update={"model": model}))
    data = _open(spec, paths, errors)
    errors += check_reward(spec, settings)
    if data is not None and data.eval is not None:
        errors += check_seeds(spec.data)
    errors += check_metrics(spec)
    errors += check_rollout(spec, settings)
    errors += _check_context(spec, context)
    formulas: list[Formula] = []
    if data is not None:
        wrong = check_rows(spec, data, uploaded)
        errors += wrong
        if not wrong:
            unread, formulas = check_references(spec, data)
            errors += unread
    if errors or data is None:
        raise _refused(errors)
    full = spec.model_dump(mode="json", by_alias=True)
    taken, overlong = without_overlong(spec, data)
    estimates = _estimates(spec, taken)
    return Resolved(
        spec=full,
        spec_sha256=sha256_of(full),
        data_sha256=sha256_of(_data_facts(spec, uploaded)),
        kind=spec.kind,
        max_steps=spec.limits.max_steps,
        from_checkpoint_id=None if model.from_checkpoint is None else model.from_checkpoint.id,
        estimates=estimates,
        warnings=[
            *_warnings(spec, estimates),
            *overlong,
            *copied_rows(spec.data, data),
            *learnt_rows(spec.data, taken),
            *(shared_seeds(spec.data) if data.eval is not None else ()),
        ],
        dataset_paths=paths,
        formulas=formulas,
        chats=None if tokenizer is None else Chats(tokenizer, spec, data),
    )


def sha256_of(value: Any) -> str:
    """The sha256 of the value's canonical JSON: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


# ---------------------------------------------------------------- data


def _datasets(session: Session, project: str, spec: RLSpec | SupervisedSpec, errors: list[FieldError]) -> dict[str, Dataset]:
    by_part: dict[str, Dataset] = {}
    for part, source in (("train", spec.data.train), ("eval", spec.data.eval)):
        if isinstance(source, DatasetSource):
            try:
                by_part[source.id] = datasets.get(session, project, source.id)
            except NotFound as error:
                errors.append(FieldError(f"/data/{part}/id", error.detail, "dataset_not_found", source.id))
    return by_part


def _open(spec: RLSpec | SupervisedSpec, paths: dict[str, Path], errors: list[FieldError]) -> Data | None:
    """The rows as the worker will have them, or None if a source cannot be opened. The reasons are added to `errors`."""
    train = _attempt(lambda: _source(spec.data.train, paths, "/data/train"), errors)
    held_out = None
    source = spec.data.eval
    if isinstance(source, SplitSource):
        rows = train
        parts = None if rows is None else _attempt(lambda: split(rows, source, spec.seed), errors)
        train, held_out = parts or (train, None)
    elif source is not None:
        held_out = _attempt(lambda: _source(source, paths, "/data/eval"), errors)
    if train is None:
        return None
    return Data.of(spec.data, train, held_out)


def _source(source: TrainSource, paths: dict[str, Path], pointer: str) -> DataRows | None:
    if isinstance(source, DatasetSource) and source.id not in paths:
        return None  # reported already
    if isinstance(source, ReasoningGymSource):
        # With some configs a row takes forever to make. Only the number of rows and their columns are needed here.
        check_task(source, pointer)
        return _Unmade(min(source.size, source.max_rows or source.size))
    try:
        return open_source(source, paths.__getitem__, pointer, RowMaker())
    except FileNotFoundError:
        detail = "the dataset's file is not here; API and workers share one data directory, or one bucket (RATCHET_BLOB_URL)"
        raise invalid([FieldError(f"{pointer}/id", detail, "files_missing")]) from None


def _attempt(work: Callable[[], T], errors: list[FieldError]) -> T | None:
    try:
        return work()
    except InvalidRequest as error:
        errors.extend(error.errors)
        return None


def _data_facts(spec: RLSpec | SupervisedSpec, uploaded: dict[str, Dataset]) -> dict[str, Any]:
    """The facts that the data hash covers: contents, not names or times."""
    data = spec.data.model_dump(mode="json")
    return {
        "train": _source_facts(spec.data.train, uploaded),
        "eval": {"source": "split", "rows": spec.data.eval.rows, "copies": spec.data.eval.copies, "seed": spec.seed}
        if isinstance(spec.data.eval, SplitSource)
        else spec.data.eval and _source_facts(spec.data.eval, uploaded),
        **{key: data[key] for key in ("prompt", "chat", "answer")},
    }


def _source_facts(source: TrainSource, uploaded: dict[str, Dataset]) -> dict[str, Any]:
    match source:
        case DatasetSource():
            return {"source": "dataset", "sha256": uploaded[source.id].sha256, "max_rows": source.max_rows}
        case InlineSource():
            return {"source": "inline", "sha256": sha256_of(source.rows), "max_rows": source.max_rows}
        case ReasoningGymSource():
            return {**source.model_dump(mode="json", exclude={"shuffle"}), "version": version("reasoning-gym")}


# ---------------------------------------------------------------- defaults, estimates, warnings


def _filled(spec: RLSpec | SupervisedSpec) -> RLSpec | SupervisedSpec:
    """The spec with the defaults that depend on another section."""
    longest = spec.eval.max_completion_tokens or (
        spec.rollout.max_completion_tokens if isinstance(spec, RLSpec) else DEFAULT_EVAL_TOKENS
    )
    changes: dict[str, Any] = {"eval": spec.eval.model_copy(update={"max_completion_tokens": longest})}
    if isinstance(source := spec.data.eval, SplitSource):  # in a spec of an older version it is not said, and copies are kept
        source = source.model_copy(update={"copies": source.copies or "left_out"})
        changes["data"] = spec.data.model_copy(update={"eval": source})
    if spec.reward is not None:
        graders = [grader.model_copy(update={"name": grader.name or grader.kind}) for grader in spec.reward.graders]
        changes["reward"] = spec.reward.model_copy(update={"graders": graders})
    if isinstance(spec, RLSpec):  # one switch with two names
        truncated = spec.rollout.mask_truncated or spec.objective.select.truncated
        select = spec.objective.select.model_copy(update={"truncated": truncated})
        changes["objective"] = spec.objective.model_copy(update={"select": select})
        changes["rollout"] = spec.rollout.model_copy(update={"mask_truncated": truncated})
    return spec.model_copy(update=changes)


def _check_gpus(session: Session, spec: RLSpec | SupervisedSpec) -> list[FieldError]:
    """An error if workers of the class are there, and none of them has so many GPUs."""
    name, gpus = spec.resources.class_, spec.resources.gpus
    if gpus == 1:
        return []
    offered = [worker.resource_classes for worker in workers.alive(session, clock.now(session))]
    most = [max(n for n in range(1, MOST_GPUS + 1) if class_of(name, n) in classes) for classes in offered if name in classes]
    if not most or gpus <= max(most):
        return []
    allowed = f"at most {counted(max(most), 'GPU')} (without GPUs: processes; RATCHET_GPUS_PER_JOB)"
    detail = f"workers here give a job {allowed}, got {gpus}"
    return [FieldError("/resources/gpus", detail, "too_many_gpus", gpus, max(most))]


def _check_context(spec: RLSpec | SupervisedSpec, context: int | None) -> list[FieldError]:
    if context is None:
        return []
    asked = {"/eval/max_completion_tokens": spec.eval.max_completion_tokens} if spec.data.eval and spec.reward else {}
    if isinstance(spec, RLSpec):
        asked = {"/rollout/max_completion_tokens": spec.rollout.max_completion_tokens, **asked}
        asked |= {"/rollout/max_prompt_tokens": spec.rollout.max_prompt_tokens}
    return [
        FieldError(
            pointer, f"the model's context holds {context} tokens, prompt and answer together, got {tokens}", "context", tokens
        )
        for pointer, tokens in asked.items()
        if tokens is not None and tokens >= context
    ]


def _estimates(spec: RLSpec | SupervisedSpec, data: Data) -> dict[str, Any]:
    """Upper bounds on the job's work if it runs to max_steps. They do not estimate time."""
    steps, rows = spec.limits.max_steps, len(data.train)
    held_out = 0 if data.eval is None else len(data.eval)
    every = spec.eval.every_steps
    evaluations = 0 if data.eval is None else 1 + -(-steps // every)
    graded = evaluations * held_out if spec.reward is not None else 0
    passes = 1 if not spec.eval.also_greedy or spec.eval.temperature == 0 else 2
    eval_completions = graded * passes
    sampled = eval_completions * (spec.eval.max_completion_tokens or 0)
    prompts, completions, updates = steps, 0, steps
    if isinstance(spec, RLSpec):
        prompts *= spec.rollout.prompts_per_step
        completions = prompts * spec.rollout.group_size
        sampled += completions * spec.rollout.max_completion_tokens
        updates *= spec.update.minibatches * spec.update.epochs
    else:
        prompts *= spec.update.batch_size
    learnt = {} if isinstance(spec, RLSpec) or spec.model.source != "tiny" else {"learnt_tokens_per_epoch": _learnt(data)}
    return {
        "train_rows": rows,
        "eval_rows": held_out,
        "prompts_per_epoch": rows,
        "epochs": round(prompts / rows, 3),
        **learnt,
        "evaluations": evaluations,
        "completions": completions + eval_completions,
        "sampled_tokens_at_most": sampled,
        "optimizer_steps": updates,
    }


def _learnt(data: Data) -> int:
    """How many tokens the tiny model learns in an epoch: the characters of the answers, and an end token for each."""
    return sum(len(data.answer(row) or "") + 1 for row in data.train)


def _warnings(spec: RLSpec | SupervisedSpec, estimates: dict[str, Any]) -> list[str]:
    """Warnings about settings that are valid but probably a mistake."""
    warnings: list[str] = []
    data, warmup, updates = spec.data, spec.optimizer.schedule.warmup_steps, estimates["optimizer_steps"]
    if data.prompt is not None and not columns_of(data.prompt):
        warnings.append("data.prompt names no column: every prompt is the same")
    if warmup >= updates:
        warnings.append(
            f"the learning rate is still warming up at the end: "
            f"{counted(warmup, 'warm-up step')}, {counted(updates, 'optimizer step')} in all"
        )
    warnings += wrong_ways(spec)
    if isinstance(spec, RLSpec):
        warnings += spec.objective.warnings(updates_per_rollout=spec.update.minibatches * spec.update.epochs)
        warnings += rollout_warnings(spec)
        if spec.model.dtype == "bfloat16" or (spec.model.dtype == "auto" and spec.resources.class_ == "gpu"):
            rounding = spec.objective.rounding_in_bfloat16(spec.rollout.max_completion_tokens)
            warnings += [] if rounding is None else [rounding]
        if spec.rollout.prompts_per_step > estimates["train_rows"]:
            warnings.append(
                f"a step of {counted(spec.rollout.prompts_per_step, 'prompt')} "
                f"repeats some of the {counted(estimates['train_rows'], 'row')}"
            )
    return warnings


def _refused(errors: list[FieldError]) -> InvalidRequest:
    """As `invalid`, but with the code model_not_found or missing_extra if all errors have it."""
    error = invalid(errors)
    if len({field_error.code for field_error in errors}) == 1 and errors[0].code in ("model_not_found", "missing_extra"):
        error.code = errors[0].code
    return error
