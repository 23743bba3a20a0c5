"""What an operation of a session may say in JSON: one model a kind. `asked` turns it into what is logged."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from sqlalchemy.orm import Session

from service.errors import FieldError, NotFound
from service.losses.numbers import tensor
from service.relay.tensors import Tensor, Tensors
from service.sessions.codec import pack
from service.spec.aliases import is_alias
from service.spec.model import CheckpointName
from service.spec.objective import ObjectiveSpec
from service.spec.reward import Grader, RewardSpec
from service.spec.section import MOST, MOST_COUNTED, Section
from service.spec.templates import columns_of
from service.spec.training import COLDEST, Beta, MicrobatchTokens
from service.store import aliases
from service.store.operations import Asked
from service.validation import invalid
from service.validation.words import counted

MOST_SEQ = 2**53
MOST_ROWS = 65_536  # of one operation
NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"

Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
Flag = Annotated[int | bool, Field(ge=0, le=1)]


class _Operation(Section):
    seq: Annotated[
        int, Field(ge=1, le=MOST_SEQ, description="its place: 1, 2, 3 ...; a repeat of the same one gets the same answer")
    ]


class AdamStep(Section):
    """AdamW for one step. The moments are the session's."""

    learning_rate: Annotated[float, Field(ge=0, le=1, description="of this step")] = 1e-4
    betas: Annotated[tuple[Beta, Beta], Field(strict=False, description="decay of the two moments")] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, le=MOST, description="added to the root of the second moment")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=MOST, description="decoupled")] = 0.0
    max_grad_norm: Annotated[float | None, Field(gt=0, le=MOST, description="gradients are scaled down to it; null: never")] = (
        1.0
    )


class LossRow(Section):
    """One sequence: the model reads `tokens`, and at each of them `target_tokens` has what should come next."""

    tokens: Annotated[Tokens, Field(description="what the model reads")]
    target_tokens: Annotated[
        Tokens | list[Tokens], Field(description="as many as tokens; or K for each of them, for distillation")
    ]
    weights: Annotated[list[Number] | list[list[Number]] | None, Field(description="cross_entropy: as target_tokens")] = None
    log_probs: Annotated[list[Number] | None, Field(description="of the targets, when they were sampled")] = None
    advantages: Annotated[list[Number] | None, Field(description="one for each token; 0 on a prompt")] = None
    mask: Annotated[list[Flag] | None, Field(description="gspo: 1 on the tokens that were sampled")] = None
    clip_low_threshold: Annotated[list[Number] | None, Field(description="ppo, cispo: the ratio's lower bound a token")] = None
    clip_high_threshold: Annotated[list[Number] | None, Field(description="ppo, cispo: the ratio's upper bound a token")] = None

    @model_validator(mode="after")
    def lengths_agree(self) -> Self:
        for name in ("target_tokens", *PER_TOKEN):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(
                    f"{name} must have one entry for each of the {counted(len(self.tokens), 'token')}, got {len(values)}"
                )
        widths = {len(row) for row in self.target_tokens if isinstance(row, list)}
        if len(widths) > 1:
            raise ValueError(f"target_tokens must have as many targets for each token, got {sorted(widths)[:5]}")
        if self.weights is not None and _width(self.weights) != _width(self.target_tokens):
            raise ValueError("weights must have the form of target_tokens: one for each target")
        return self


PER_TOKEN = ("weights", "log_probs", "advantages", "mask", "clip_low_threshold", "clip_high_threshold")


def _width(values: Sequence[Any]) -> int | None:
    return len(values[0]) if isinstance(values[0], list) else None


class Answer(Section):
    """One sampled answer to its group's prompt."""

    tokens: Annotated[Tokens, Field(description="what was sampled, its end token included")]
    log_probs: Annotated[list[Number] | None, Field(description="as the sampler gave them, one a token")] = None
    reward: Annotated[Number | list[Number] | None, Field(description="one, or one of each grader")] = None
    advantage: Annotated[Number | list[Number] | None, Field(description="instead of a reward: one, or one a token")] = None
    mask: Annotated[list[Flag] | None, Field(description="1 on the tokens to learn from; default: all")] = None
    truncated: Annotated[bool, Field(description="whether it was cut at the token limit")] = False

    @model_validator(mode="after")
    def lengths_agree(self) -> Self:
        for name in ("log_probs", "mask"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(
                    f"{name} must have one entry for each of the {counted(len(self.tokens), 'token')}, got {len(values)}"
                )
        if isinstance(self.advantage, list) and len(self.advantage) != len(self.tokens):
            raise ValueError(
                f"advantage must be one number, or one for each of the {counted(len(self.tokens), 'token')}, "
                f"got {len(self.advantage)}"
            )
        if (self.reward is None) == (self.advantage is None):
            raise ValueError("give either a `reward` or an `advantage`")
        return self


class Group(Section):
    """A prompt and the answers that were sampled to it."""

    prompt_tokens: Annotated[Tokens, Field(description="what the answers continue")]
    answers: Annotated[list[Answer], Field(min_length=1, max_length=4096, description="they are compared with each other")]


def _alike(groups: list[Group]) -> list[Group]:
    """All answers bring the same: rewards of one width or advantages of one form, and log_probs all or none."""
    answers = [answer for group in groups for answer in group.answers]
    for what, forms in (
        ("reward (one number, or as many graders)", {_form(answer.reward) for answer in answers}),
        ("advantage (one number, or one a token)", {isinstance(answer.advantage, list) for answer in answers}),
        ("log_probs", {answer.log_probs is None for answer in answers}),
    ):
        if len(forms) > 1:
            raise ValueError(f"all answers must have {what} in the same form")
    if len(answers) > MOST_ROWS:
        raise ValueError(f"an operation takes at most {MOST_ROWS} answers, got {len(answers)}")
    return groups


def _form(reward: float | list[float] | None) -> int | None:
    return None if reward is None else len(reward) if isinstance(reward, list) else 0


Groups = Annotated[
    list[Group], Field(min_length=1, max_length=MOST_ROWS, description="groups of scored answers"), AfterValidator(_alike)
]
Temperature = Annotated[float, Field(ge=COLDEST, le=10, description="that the answers were sampled with")]


class Forward(_Operation):
    """Log-probs, and with forward_backward the gradient of the loss, which is added to what optim_step takes."""

    kind: Literal["forward", "forward_backward"]
    loss: Annotated[str | None, Field(max_length=64, description="a sum over tokens: cross_entropy, ppo ...; with rows")] = None
    config: Annotated[dict[str, Number], Field(description="the loss's settings")] = Field(default_factory=dict)
    rows: Annotated[list[LossRow] | None, Field(min_length=1, max_length=MOST_ROWS, description="with loss")] = None
    objective: Annotated[ObjectiveSpec | None, Field(description="a preset or its axes; with groups")] = None
    groups: Annotated[Groups | None, Field(description="with objective")] = None
    temperature: Temperature = 1.0

    @model_validator(mode="after")
    def one_form(self) -> Self:
        named, grouped = (self.loss is not None, self.rows is not None), (self.objective is not None, self.groups is not None)
        if (named, grouped) not in (((True, True), (False, False)), ((False, False), (True, True))):
            raise ValueError("give `loss` and `rows`, or `objective` and `groups`")
        widths = {_width(row.target_tokens) for row in self.rows or []}
        if len(widths) > 1:
            raise ValueError("all rows must have target_tokens of one form: one a token, or the same K")
        given = {name: sum(getattr(row, name) is not None for row in self.rows or []) for name in PER_TOKEN}
        for name, count in given.items():
            if 0 < count < len(self.rows or []):
                raise ValueError(f"{name} is in {count} of {counted(len(self.rows or []), 'row')}; it must be in all or none")
        return self


class TrainStep(_Operation):
    """Advantages, minibatches and optimizer steps on scored answers, as one update: all of it or nothing."""

    kind: Literal["train_step"]
    objective: Annotated[ObjectiveSpec, Field(description="the loss: a preset, and any of its axes overridden")]
    groups: Groups
    optimizer: Annotated[AdamStep, Field(description="of each optimizer step")] = AdamStep()
    minibatches: Annotated[int, Field(ge=1, le=1024, description="optimizer steps per pass; must divide the answers")] = 1
    epochs: Annotated[int, Field(ge=1, le=64, description="passes over the answers")] = 1
    temperature: Temperature = 1.0
    microbatch_tokens: MicrobatchTokens = "auto"

    @model_validator(mode="after")
    def minibatches_divide(self) -> Self:
        answers = sum(len(group.answers) for group in self.groups)
        if answers % self.minibatches:
            raise ValueError(f"minibatches must divide the number of answers, got {self.minibatches} and {answers}")
        return self


class OptimStep(_Operation):
    """One optimizer step from the gradients so far."""

    kind: Literal["optim_step"]
    optimizer: Annotated[AdamStep, Field(description="AdamW of this step")] = AdamStep()


class Sampling(Section):
    """The distribution to sample from."""

    max_tokens: Annotated[int, Field(ge=1, le=131_072, description="an answer ends here at the latest")] = 64
    temperature: Annotated[float, Field(ge=0, le=10, description="0 is greedy")] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, description="nucleus; 1 is off")] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MOST_COUNTED, description="the k likeliest tokens; 0 is off")] = 0
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=16, description="texts that end an answer (kept in it)")
    ] = Field(default_factory=list)
    stop_ids: Annotated[list[Token], Field(max_length=64, description="tokens that end an answer")] = Field(
        default_factory=list
    )
    ends: Annotated[bool, Field(description="whether the model's own end token ends an answer")] = True


class Sample(_Operation):
    """Answers of the session's weights as they are at its turn."""

    kind: Literal["sample"]
    prompts: Annotated[list[Tokens] | None, Field(min_length=1, max_length=4096, description="as tokens")] = None
    texts: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None, Field(min_length=1, max_length=4096, description="or as texts")
    ] = None
    num_samples: Annotated[int, Field(ge=1, le=1024, description="answers to each prompt")] = 1
    sampling: Annotated[Sampling, Field(description="how they are drawn")] = Sampling()
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="the same seed draws the same; default: of the session")] = (
        None
    )
    prompt_log_probs: Annotated[bool, Field(description="of the prompts' own tokens too")] = False
    top_prompt_log_probs: Annotated[int, Field(ge=0, le=128, description="the k likeliest at each place of the prompts")] = 0
    top_log_probs: Annotated[int, Field(ge=0, le=128, description="the k likeliest at each place of the answers")] = 0

    @model_validator(mode="after")
    def one_form(self) -> Self:
        if (self.prompts is None) == (self.texts is None):
            raise ValueError("give either `prompts` (tokens) or `texts`")
        return self


class Eval(_Operation):
    """Answers of the session's weights as they are at its turn, graded here: metrics under eval/."""

    kind: Literal["eval"]
    rows: Annotated[
        list[dict[str, Any]],
        Field(min_length=1, max_length=4096, description="each with its `prompt`, a text, and the columns that graders name"),
    ]
    graders: Annotated[
        list[Grader], Field(min_length=1, max_length=16, description="as in a job's `reward`, but not http and reasoning_gym")
    ]
    num_samples: Annotated[int, Field(ge=1, le=1024, description="answers to each prompt")] = 1
    sampling: Annotated[Sampling, Field(description="how they are drawn; greedily unless you say otherwise")] = Sampling(
        temperature=0.0
    )
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="the same seed draws the same; default: of the session")] = (
        None
    )

    @model_validator(mode="after")
    def can_be_graded(self) -> Self:
        RewardSpec(graders=self.graders)  # names and patterns
        if len(self.rows) * self.num_samples > MOST_ROWS:
            raise ValueError(f"an operation may have {MOST_ROWS} answers, got {len(self.rows)} x {self.num_samples}")
        for kind in ("http", "reasoning_gym"):
            if any(grader.kind == kind for grader in self.graders):
                raise ValueError(f"the grader {kind} works in jobs only; sample, and grade the answers yourself")
        for number, row in enumerate(self.rows):
            if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise ValueError(f"row {number} needs a `prompt`, a text")
            missing = sorted(self._named - row.keys())
            if missing:
                raise ValueError(f"row {number} has no column {missing[0]!r}, which a grader names")
        return self

    @property
    def _named(self) -> set[str]:
        """Columns that graders name."""
        templates = (getattr(grader, "reference", None) for grader in self.graders)
        return {name for template in templates if template is not None for name in columns_of(template)}


class SaveCheckpoint(_Operation):
    """Save the weights under a name."""

    kind: Literal["save_checkpoint"]
    name: Annotated[str, Field(pattern=NAME, description="of letters, digits, dots, - and _")]
    purpose: Annotated[
        Literal["training", "sampler"], Field(description="sampler: without the optimizer's state, to sample from")
    ] = "training"
    ttl_s: Annotated[float | None, Field(gt=0, le=315_360_000, description="deleted so long after; default: never")] = None
    overwrite: Annotated[bool, Field(description="replace one of the same name; else that is an error")] = False
    metadata: Annotated[dict[str, Any], Field(description="yours; stored and given back")] = Field(default_factory=dict)


class LoadCheckpoint(_Operation):
    """Take the weights of a checkpoint of this project, of the same base and adapter."""

    kind: Literal["load_checkpoint"]
    checkpoint: CheckpointName
    optimizer: Annotated[bool, Field(description="and the optimizer's state; else it starts anew")] = True


class Finish(_Operation):
    """Save a last checkpoint, and end the session as succeeded."""

    kind: Literal["finish"]


OperationBody = Annotated[
    Forward | TrainStep | OptimStep | Sample | Eval | SaveCheckpoint | LoadCheckpoint | Finish, Field(discriminator="kind")
]


class Operations(Section):
    """Several operations, logged together or not at all."""

    operations: Annotated[list[OperationBody], Field(min_length=1, max_length=256)]


OperationRequest = OperationBody | Operations


# ---------------------------------------------------------------- to what is logged


def asked(body: OperationBody, pointer: str = "") -> Asked:
    """The operation as it is logged: its request in bytes, and its cost in tokens. `pointer`: to the body."""
    head, tensors, cost = body.model_dump(mode="json", include=HEADS.get(body.kind)), Tensors(), 1
    head.pop("seq", None)
    match body:
        case Forward(rows=list(rows)):
            head = {"kind": body.kind, "loss": body.loss, "config": body.config}
            tensors, cost = _of_rows(rows)
        case Forward(groups=list(groups)) | TrainStep(groups=groups):
            tensors, cost = _of_groups(groups)
            cost *= body.epochs if isinstance(body, TrainStep) else 1
            assert body.objective is not None
            head["objective"] = body.objective.model_dump(mode="json", by_alias=True)
        case Sample():
            if body.prompts is not None:
                tensors = _ragged("prompt_tokens", body.prompts, "i", "prompt_cu_seqlens")
            else:
                head["texts"] = body.texts
            prompts = sum(map(len, body.prompts or body.texts or []))
            cost = prompts + body.num_samples * body.sampling.max_tokens * len(body.prompts or body.texts or [])
            head["checkpoint"] = None
        case Eval():
            head["graders"] = [grader.model_dump(mode="json", by_alias=True) for grader in body.graders]
            head["texts"], head["top_log_probs"] = [row["prompt"] for row in body.rows], 0
            cost = sum(map(len, head["texts"])) + body.num_samples * body.sampling.max_tokens * len(body.rows)
        case _:
            pass
    return Asked(body.kind, body.seq, pack(head, tensors), cost, lookup=lookup_of(head, pointer))


def lookup_of(head: dict[str, Any], pointer: str = "") -> Callable[[Session, str], bytes] | None:
    """What looks up the checkpoint that a `load_checkpoint` names by an alias. It raises InvalidRequest."""
    if head["kind"] != "load_checkpoint" or not is_alias(head["checkpoint"]):
        return None

    def lookup(session: Session, project: str) -> bytes:
        try:
            found = aliases.checkpoint(session, project, head["checkpoint"])
        except NotFound as error:
            fault = FieldError(f"{pointer}/checkpoint", error.detail, "checkpoint_not_found", head["checkpoint"])
            raise invalid([fault]) from error
        return pack({**head, "checkpoint": found.id}, {})

    return lookup


HEADS: dict[str, set[str]] = {
    "forward": {"kind", "temperature"},
    "forward_backward": {"kind", "temperature"},
    "train_step": {"kind", "optimizer", "minibatches", "epochs", "temperature", "microbatch_tokens"},
    "sample": {
        "kind",
        "num_samples",
        "sampling",
        "seed",
        "prompt_log_probs",
        "top_prompt_log_probs",
        "top_log_probs",
    },
}


def _of_rows(rows: list[LossRow]) -> tuple[Tensors, int]:
    tensors = _ragged("tokens", [row.tokens for row in rows], "i", "cu_seqlens")
    width = _width(rows[0].target_tokens)
    for name, typecode in (("target_tokens", "i"), *((name, "f") for name in PER_TOKEN)):
        if getattr(rows[0], name) is None:
            continue
        wide = width if name in ("target_tokens", "weights") else None
        values = (value for row in rows for value in getattr(row, name))
        numbers = array(typecode, values if wide is None else (number for value in values for number in value))
        tensors[name] = tensor(numbers) if wide is None else tensor(numbers, len(numbers) // wide, wide)
    return tensors, sum(len(row.tokens) for row in rows)


def _of_groups(groups: list[Group]) -> tuple[Tensors, int]:
    pairs = [(group, answer) for group in groups for answer in group.answers]
    answers = [answer for _, answer in pairs]
    tensors = _ragged("prompt_tokens", [group.prompt_tokens for group, _ in pairs], "i", "prompt_cu_seqlens")
    tensors |= _ragged("completion_tokens", [answer.tokens for answer in answers], "i", "completion_cu_seqlens")
    tensors["group_ids"] = tensor(array("q", (number for number, group in enumerate(groups) for _ in group.answers)))
    if answers[0].log_probs is not None:
        tensors["rollout_log_probs"] = tensor(array("f", (value for answer in answers for value in answer.log_probs or [])))
    if any(answer.mask is not None for answer in answers):
        masks = (answer.mask if answer.mask is not None else [1] * len(answer.tokens) for answer in answers)
        tensors["response_mask"] = tensor(array("f", (float(value) for mask in masks for value in mask)))
    if any(answer.truncated for answer in answers):
        tensors["truncated"] = tensor(array("f", (float(answer.truncated) for answer in answers)))
    name, given = ("rewards", [answer.reward for answer in answers])
    if given[0] is None:
        name, given = "advantages", [answer.advantage for answer in answers]
    flat = array("d", (value for entry in given for value in _listed(entry)))
    several = name == "rewards" and isinstance(given[0], list)
    tensors[name] = tensor(flat, len(given), len(flat) // len(given)) if several else tensor(flat)
    return tensors, sum(len(group.prompt_tokens) + len(answer.tokens) for group, answer in pairs)


def _listed(value: Any) -> Iterable[float]:
    return value if isinstance(value, list) else [value]


def _ragged(name: str, rows: Sequence[Sequence[int]], typecode: str, cuts: str) -> dict[str, Tensor]:
    """The rows, flat, and where each begins."""
    numbers = array(typecode, (value for row in rows for value in row))
    return {name: tensor(numbers), cuts: tensor(array("q", accumulate(map(len, rows), initial=0)))}
