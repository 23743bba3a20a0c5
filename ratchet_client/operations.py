"""The operations of a session as typed functions: what is sent, and how its answer is read. Nothing is sent here.

Numbers may be lists, numpy arrays or torch tensors. Small operations are JSON, of which several go in one request; large ones
are safetensors.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar, cast

from ratchet_client.tensors import Tensor, plain, ragged, tensor

T = TypeVar("T")

LARGE = 2048  # numbers; from here on a body or an answer is safetensors

Numbers = Any  # a list of numbers, a numpy array, a torch tensor
Row = Mapping[str, Numbers]  # tokens, target_tokens, and what the loss takes
Objective = str | Mapping[str, Any]  # a preset's name, or an object as in a job's spec
Optimizer = Mapping[str, Any]  # learning_rate, betas, eps, weight_decay, max_grad_norm


@dataclass(frozen=True)
class Operation(Generic[T]):
    """What is asked. With `tensors` it is safetensors, and `head` is their head; else `head` is the whole JSON."""

    head: dict[str, Any]
    read: Callable[[dict[str, Any]], T]
    tensors: Mapping[str, Tensor] | None = None
    large_answer: bool = False

    @property
    def kind(self) -> str:
        return self.head["kind"]


# ---------------------------------------------------------------- what comes back


@dataclass
class Answer:
    """One sampled answer. Give it a `reward` or an `advantage` (one, or one a token) before it is trained on."""

    tokens: list[int]  # with its end token, if it has one
    log_probs: list[float]  # of the tokens, when they were sampled
    text: str = ""
    finish_reason: Literal["stop", "length"] = "stop"
    reward: float | Sequence[float] | None = None
    advantage: float | Sequence[float] | None = None
    mask: Sequence[int] | None = None  # 1 on the tokens to learn from; None: all
    top_ids: list[list[int]] | None = None  # [tokens, k]
    top_log_probs: list[list[float | None]] | None = None

    @property
    def truncated(self) -> bool:
        """Whether it was cut at the token limit."""
        return self.finish_reason == "length"


@dataclass
class Group:
    """A prompt and the answers that were sampled to it."""

    prompt_tokens: list[int]
    answers: list[Answer]
    prompt_log_probs: list[float | None] | None = None  # None at the first token
    top_prompt_ids: list[list[int]] | None = None  # [tokens, k]
    top_prompt_log_probs: list[list[float | None]] | None = None


Scored = Group | Mapping[str, Any]  # {prompt_tokens, answers: [{tokens, log_probs, reward or advantage, mask, truncated}]}


@dataclass(frozen=True)
class Forward:
    """Log-probs of the targets, one list a row (of an answer's tokens, one a group's answer), and metrics."""

    log_probs: list[list[Any]]
    metrics: dict[str, float]

    @property
    def loss(self) -> float:
        """The sum over all tokens and rows."""
        return self.metrics["loss:sum"]


@dataclass(frozen=True)
class Evaluation:
    """What the graders gave. Lists are by row, and in them by answer."""

    metrics: dict[str, float]  # eval/reward/mean and so on, as the session's curves have them
    texts: list[list[str]]
    rewards: list[list[float | None]]  # None: it could not be graded, see `errors`
    scores: list[list[dict[str, float | None]]]  # by grader
    errors: list[list[dict[str, str]]]


class Saved(TypedDict):
    checkpoint_id: str
    name: str
    step: int


# ---------------------------------------------------------------- what is asked


def forward(
    rows: Iterable[Row] | None = None,
    *,
    loss: str = "cross_entropy",
    config: Mapping[str, float] | None = None,
    groups: Iterable[Scored] | None = None,
    objective: Objective | None = None,
    temperature: float = 1.0,
) -> Operation[Forward]:
    """Log-probs and the loss, without a gradient: of `rows` with a named `loss`, or of `groups` with an `objective`."""
    return _passed("forward", rows, loss, config, groups, objective, temperature)


def forward_backward(
    rows: Iterable[Row] | None = None,
    *,
    loss: str = "cross_entropy",
    config: Mapping[str, float] | None = None,
    groups: Iterable[Scored] | None = None,
    objective: Objective | None = None,
    temperature: float = 1.0,
) -> Operation[Forward]:
    """`forward`, and the gradient is added to what the next `optim_step` takes.

    A row has `tokens`, `target_tokens` (as many, or K for each) and what the loss takes: weights, log_probs, advantages, mask.
    Losses are sums over tokens and rows.
    """
    return _passed("forward_backward", rows, loss, config, groups, objective, temperature)


def optim_step(optimizer: Optimizer | None = None) -> Operation[dict[str, float]]:
    """One AdamW step from the gradients so far. Returns grad_norm, learning_rate and skipped."""
    return Operation(_given(kind="optim_step", optimizer=optimizer), _metrics)


def train_step(
    groups: Iterable[Scored],
    *,
    objective: Objective,
    optimizer: Optimizer | None = None,
    minibatches: int = 1,
    epochs: int = 1,
    temperature: float = 1.0,
    microbatch_tokens: int | Literal["auto"] = "auto",
) -> Operation[dict[str, float]]:
    """Advantages, minibatches and optimizer steps on scored answers, as one update: all of it or nothing. Returns metrics."""
    head = _given(kind="train_step", objective=_objective(objective), optimizer=optimizer)
    head |= {"minibatches": minibatches, "epochs": epochs, "temperature": temperature, "microbatch_tokens": microbatch_tokens}
    return _of_groups(head, groups, _metrics)


def sample(
    texts: Sequence[str] | None = None,
    *,
    prompts: Sequence[Numbers] | None = None,
    num_samples: int = 1,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ends: bool = True,
    seed: int | None = None,
    prompt_log_probs: bool = False,
    top_prompt_log_probs: int = 0,
    top_log_probs: int = 0,
) -> Operation[list[Group]]:
    """Answers of the session's weights as they are at its turn: a group for each text, or for each prompt (tokens)."""
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling |= {"stop": list(stop), "stop_ids": list(stop_ids), "ends": ends}
    told = {"prompt_log_probs": prompt_log_probs, "top_prompt_log_probs": top_prompt_log_probs, "top_log_probs": top_log_probs}
    head = _given(kind="sample", seed=seed) | {"num_samples": num_samples, "sampling": sampling, **told}
    asked = [plain(prompt) for prompt in prompts] if prompts is not None else None
    width = 2 + 2 * max(top_log_probs, top_prompt_log_probs)
    large = len(asked or texts or ()) * num_samples * max_tokens * width > LARGE
    tensors = None
    if asked is not None and sum(map(len, asked)) > LARGE:
        tensors = ragged("prompt_tokens", "prompt_cu_seqlens", asked)
    else:
        head |= _given(prompts=asked, texts=None if texts is None else list(texts))
    return Operation(head, lambda answer: _groups(answer, num_samples), tensors, large)


def evaluate(
    rows: Iterable[Mapping[str, Any]],
    graders: Sequence[Mapping[str, Any]],
    *,
    num_samples: int = 1,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> Operation[Evaluation]:
    """Answers of the session's weights as they are at its turn, greedy by default, graded by the service: metrics under eval/.

    A row has a `prompt` (a text), and the columns that graders name; `graders` are those of a job's `reward`."""
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "stop": list(stop)}
    sent = {"rows": [dict(row) for row in rows], "graders": [dict(grader) for grader in graders], "num_samples": num_samples}
    return Operation(_given(kind="eval", seed=seed) | sent | {"sampling": sampling}, lambda answer: Evaluation(**answer))


def save(
    name: str,
    *,
    purpose: Literal["training", "sampler"] = "training",
    ttl_s: float | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Operation[Saved]:
    """Save a checkpoint under a name. `sampler`: without the optimizer's state. It is durable when this is answered."""
    head = _given(kind="save_checkpoint", name=name, ttl_s=ttl_s, metadata=metadata)
    return Operation(head | {"purpose": purpose, "overwrite": overwrite}, lambda answer: cast(Saved, answer))


def load(checkpoint: str, *, optimizer: bool = True) -> Operation[str]:
    """Take the weights of a checkpoint (its id, or an alias: what that points at when this is accepted), and the optimizer's
    state unless it shall start anew. Returns the checkpoint's id."""
    return Operation({"kind": "load_checkpoint", "checkpoint": checkpoint, "optimizer": optimizer}, _checkpoint_id)


def finish() -> Operation[str]:
    """Save a last checkpoint and end the session as succeeded. Returns the checkpoint's id."""
    return Operation({"kind": "finish"}, _checkpoint_id)


# ---------------------------------------------------------------- to the wire


def _passed(
    kind: str,
    rows: Iterable[Row] | None,
    loss: str,
    config: Mapping[str, float] | None,
    groups: Iterable[Scored] | None,
    objective: Objective | None,
    temperature: float,
) -> Operation[Forward]:
    if (rows is None) == (groups is None) or (groups is None) != (objective is None):
        raise TypeError(f"{kind} takes rows with a loss, or groups with an objective")
    if groups is not None and objective is not None:
        head = {"kind": kind, "objective": _objective(objective), "temperature": temperature}
        return _of_groups(head, groups, _forward)
    sent = [{name: plain(value) for name, value in row.items() if value is not None} for row in rows or ()]
    head = {"kind": kind, "loss": loss, "config": dict(config or {})}
    numbers = sum(map(_count, (value for row in sent for value in row.values())))
    if numbers <= LARGE:
        return Operation(head | {"rows": sent}, _forward)
    return Operation(head, _forward, _row_tensors(sent), large_answer=True)


def _row_tensors(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Raises ValueError if the rows do not bring the same, or differ in length within themselves."""
    names = rows[0].keys()
    for number, row in enumerate(rows):
        if row.keys() != names:
            odd = ", ".join(sorted(row.keys() ^ names))
            raise ValueError(f"all rows must bring the same tensors; row {number} and row 0 differ in {odd}")
        for name, values in row.items():
            if len(values) != len(row["tokens"]):
                raise ValueError(f"row {number}: {name} has {len(values)} entries for {len(row['tokens'])} tokens")
    tensors = ragged("tokens", "cu_seqlens", [row["tokens"] for row in rows])
    for name in names - {"tokens"}:
        first = rows[0][name][0]
        wide = (len(first),) if isinstance(first, list | tuple) else ()
        values = (value for row in rows for value in row[name])
        flat = (number for value in values for number in value) if wide else values
        tensors[name] = tensor("I32" if name == "target_tokens" else "F32", flat, *wide)
    return tensors


def _of_groups(head: dict[str, Any], groups: Iterable[Scored], read: Callable[[dict[str, Any]], T]) -> Operation[T]:
    sent = [_group(group) for group in groups]
    answers = [answer for group in sent for answer in group["answers"]]
    numbers = sum(len(group["prompt_tokens"]) for group in sent)
    numbers += sum(_count(value) for answer in answers for value in answer.values() if isinstance(value, list))
    if numbers <= LARGE:
        return Operation(head | {"groups": sent}, read)
    return Operation(head, read, _group_tensors(sent, answers), large_answer=read is _forward)


def _group(group: Scored) -> dict[str, Any]:
    if isinstance(group, Group):
        return {"prompt_tokens": group.prompt_tokens, "answers": [_answer(answer) for answer in group.answers]}
    answers = [_answer(answer) for answer in group["answers"]]
    return {"prompt_tokens": plain(group["prompt_tokens"]), "answers": answers}


def _answer(answer: Answer | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(answer, Answer):
        answer = {
            "tokens": answer.tokens,
            "log_probs": answer.log_probs,
            "reward": answer.reward,
            "advantage": answer.advantage,
            "mask": answer.mask,
            "truncated": answer.truncated,
        }
    listed = {name: plain(value) for name, value in answer.items() if value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in listed.items()}


def _group_tensors(groups: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Raises ValueError if not all answers bring the same."""
    for name in ("reward", "advantage", "log_probs"):
        if len({(name in answer, name == "reward" and _count(answer.get(name))) for answer in answers}) > 1:
            raise ValueError(f"all answers must have a {name} of the same form, or none")
    if ("reward" in answers[0]) == ("advantage" in answers[0]):
        raise ValueError("give each answer either a reward or an advantage")
    tensors = ragged(
        "prompt_tokens", "prompt_cu_seqlens", [group["prompt_tokens"] for group in groups for _ in group["answers"]]
    )
    tensors |= ragged("completion_tokens", "completion_cu_seqlens", [answer["tokens"] for answer in answers])
    tensors["group_ids"] = tensor("I64", (number for number, group in enumerate(groups) for _ in group["answers"]))
    if "log_probs" in answers[0]:
        tensors["rollout_log_probs"] = tensor("F32", (value for answer in answers for value in answer["log_probs"]))
    if any("mask" in answer for answer in answers):
        masks = (answer.get("mask", [1] * len(answer["tokens"])) for answer in answers)
        tensors["response_mask"] = tensor("F32", (value for mask in masks for value in mask))
    if any(answer.get("truncated") for answer in answers):
        tensors["truncated"] = tensor("F32", (bool(answer.get("truncated")) for answer in answers))
    name = "reward" if "reward" in answers[0] else "advantage"
    entries = [answer[name] for answer in answers]
    flat = (value for entry in entries for value in (entry if isinstance(entry, list) else [entry]))
    several = (len(entries[0]),) if name == "reward" and isinstance(entries[0], list) else ()
    tensors[f"{name}s"] = tensor("F64", flat, *several)
    return tensors


def _objective(objective: Objective) -> dict[str, Any]:
    return {"preset": objective} if isinstance(objective, str) else dict(objective)


def _count(value: Any) -> int:
    """How many numbers."""
    if not isinstance(value, list | tuple):
        return 1
    return sum(map(len, value)) if value and isinstance(value[0], list | tuple) else len(value)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


# ---------------------------------------------------------------- from the wire


def _metrics(answer: dict[str, Any]) -> dict[str, float]:
    return answer["metrics"]


def _forward(answer: dict[str, Any]) -> Forward:
    return Forward(answer["log_probs"], answer["metrics"])


def _checkpoint_id(answer: dict[str, Any]) -> str:
    return answer["checkpoint_id"]


def _groups(answer: dict[str, Any], num_samples: int) -> list[Group]:
    by_answer = zip(
        answer["tokens"],
        answer["log_probs"],
        answer["texts"],
        answer["finish_reasons"],
        _rows(answer, "top_ids", len(answer["tokens"])),
        _rows(answer, "top_log_probs", len(answer["tokens"])),
        strict=True,
    )
    answers = [
        Answer(tokens, log_probs, text, reason, top_ids=ids, top_log_probs=tops)
        for tokens, log_probs, text, reason, ids, tops in by_answer
    ]
    prompts = answer["prompt_tokens"]
    told = (_rows(answer, name, len(prompts)) for name in ("prompt_log_probs", "top_prompt_ids", "top_prompt_log_probs"))
    return [
        Group(prompt, answers[number * num_samples : (number + 1) * num_samples], *more)
        for number, (prompt, *more) in enumerate(zip(prompts, *told, strict=True))
    ]


def _rows(answer: dict[str, Any], name: str, count: int) -> list[Any]:
    return answer.get(name) or [None] * count
