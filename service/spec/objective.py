"""The objective of a spec: a preset, any axis of which can be overridden.

An axis is written as its kind (`"aggregate": "token"`), as an object with `kind` and parameters, or as parameters alone,
which change the preset's. Validation completes every axis. A resolved objective is itself valid and resolves to itself. The
mathematics is in `workers.objectives`.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticKnownError

from service.spec import axes
from service.spec.presets import BASE, PRESETS
from service.spec.section import Section


class _OrKind:
    """In the JSON schema: an axis may also be written as its kind alone, that is the value of `key`."""

    def __init__(self, key: str, *models: type[Section]) -> None:
        kinds = [kind for model in models for kind in get_args(model.model_fields[key].annotation)]
        self.schema = {"type": "string", "enum": kinds, "description": f"short for an object with this `{key}`"}

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), self.schema]}


# The key that a bare string stands for, and that decides whether the preset's parameters still apply.
_HEADS = {"ratio": "kind", "surrogate": "kind", "aggregate": "kind", "advantage": "centre", "kl": "place", "correct": "action"}
# Axes that a preset may leave switched off. Parameters alone do not switch them on: the switch must be given, too.
_SWITCHES = {"kl", "correct"}
# Rms of a token's log ratio, in nats, between two passes of a model in bfloat16 that differ by rounding alone. Measured on
# SmolLM2-135M; docs/objectives.md says how.
BFLOAT16_NOISE = 0.06
WIDE_SEQUENCE_CLIP = 0.05  # a sequence ratio never moves this much, so the libraries' default of 0.2 never clips
# For these axes another kind has other parameters, so the preset's are dropped.
_TAGGED = {"ratio", "surrogate", "aggregate"}


def _known_preset(name: str | None) -> str | None:
    if name is not None and name not in PRESETS:
        # As pydantic says it of a Literal, so that the error lists what is allowed.
        raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, PRESETS))})
    return name


def preset_axes(name: str | None) -> dict[str, Any]:
    """BASE with the preset's axes in place of its own; BASE itself for no preset or an unknown one."""
    changed = PRESETS[name].axes if name in PRESETS else {}
    return {axis: _laid_over(axis, base, changed.get(axis)) for axis, base in BASE.items()}


def _laid_over(axis: str, base: Any, override: Any) -> Any:
    """Complete one axis, in any of its written forms, from the one that it overrides."""
    head = _HEADS.get(axis)
    if override is None:
        return base
    if isinstance(override, str) and head is not None:
        override = {head: override}
    if not isinstance(override, Mapping) or not isinstance(base, Mapping):
        return override  # the anchor; or a value that pydantic will refuse
    if axis in _TAGGED and override.get(head, base[head]) != base[head]:
        return dict(override)
    if axis in _SWITCHES and head not in override and base[head] == "none":
        return dict(override)  # pydantic then reports the missing switch
    return {**base, **override}


class ObjectiveSpec(Section):
    """The loss: a preset, and any of its axes overridden beside it."""

    preset: Annotated[
        str | None,
        AfterValidator(_known_preset),
        Field(
            description="a published objective; null: a clipped token ratio, token mean, rewards normalised in the group",
            json_schema_extra={"enum": [*PRESETS, None]},
        ),
    ] = None
    ratio: Annotated[
        axes.AnyRatio,
        Field(discriminator="kind", description="how token log ratios are pooled"),
        _OrKind("kind", *get_args(axes.AnyRatio)),
    ] = axes.Ratio()
    anchor: Annotated[
        Literal["old", "rollout"], Field(description="the ratio's denominator: the trainer's or the sampler's log-probs")
    ] = "old"
    surrogate: Annotated[
        axes.AnySurrogate,
        Field(discriminator="kind", description="the clip rule"),
        _OrKind("kind", *get_args(axes.AnySurrogate)),
    ] = axes.Ppo()
    aggregate: Annotated[
        axes.AnyAggregate,
        Field(discriminator="kind", description="how token losses become one number"),
        _OrKind("kind", *get_args(axes.AnyAggregate)),
    ] = axes.Aggregate()
    advantage: Annotated[axes.Advantage, Field(description="rewards to advantages"), _OrKind("centre", axes.Advantage)] = (
        axes.Advantage()
    )
    kl: Annotated[axes.Kl, Field(description="the KL penalty"), _OrKind("place", axes.Kl)] = axes.Kl(place="none")
    correct: Annotated[axes.Correct, Field(description="off-policy correction"), _OrKind("action", axes.Correct)] = (
        axes.Correct(action="none")
    )
    select: Annotated[axes.Select, Field(description="which answers and tokens are learned from")] = axes.Select()

    @model_validator(mode="before")
    @classmethod
    def complete(cls, sent: Any) -> Any:
        """Complete each axis from the preset."""
        if isinstance(sent, str):
            sent = {"preset": sent}
        if not isinstance(sent, Mapping):
            return sent
        name = sent.get("preset")
        bases = preset_axes(name if isinstance(name, str) else None)
        return {**sent, **{axis: _laid_over(axis, base, sent.get(axis)) for axis, base in bases.items()}}

    @model_validator(mode="after")
    def combines(self) -> Self:
        if self.ratio.constant and self.surrogate.through_ratio:
            raise ValueError(
                f"ratio.kind is {self.ratio.kind}, which has no gradient, but surrogate {self.surrogate.kind} needs one; "
                "use surrogate none (REINFORCE), or another ratio"
            )
        if self.ratio.constant and self.kl.in_loss and self.kl.gradient == "ratio_weighted":
            raise ValueError(
                "kl.gradient is ratio_weighted, but ratio one has no ratio: use token_ratio_weighted, plain or score"
            )
        if self.kl.in_reward and self.kl.gradient != "plain":
            raise ValueError(
                f"kl.gradient must be plain where kl.place is reward, got {self.kl.gradient}: a reward has no gradient"
            )
        if self.kl.in_reward and self.advantage.several == "normalize_then_sum":
            raise ValueError(
                "kl.place must be loss or none where advantage.several is normalize_then_sum: there is no one reward"
            )
        return self

    def resolve(self) -> dict[str, Any]:
        """Every axis with every parameter, as plain JSON. The result is valid input and resolves to itself."""
        return self.model_dump(mode="json")

    @property
    def has_segments(self) -> bool:
        """Whether the ratio's segments must be given in the batch."""
        return isinstance(self.ratio, axes.SegmentRatio) and self.ratio.chunk is None

    @property
    def compares_with_anchor(self) -> bool:
        """Whether the loss depends on the anchor's log-probs."""
        weighs_kl = self.kl.in_loss and self.kl.coef > 0 and self.kl.gradient == "token_ratio_weighted"
        return not self.ratio.constant or self.surrogate.through_anchor or weighs_kl

    def rounding_in_bfloat16(self, longest: int) -> str | None:
        """A warning if the clips are narrower than what rounding alone does to the ratios of answers of `longest` tokens."""
        if not isinstance(self.surrogate, axes.Clipped) or self.ratio.constant:
            return None
        pooled = longest if self.ratio.per_sequence else 1
        if isinstance(self.ratio, axes.SegmentRatio):
            pooled = min(self.ratio.chunk or 1, longest)
        expected, clip = BFLOAT16_NOISE / sqrt(pooled), min(self.surrogate.clip_low, self.surrogate.clip_high)
        if clip >= expected:
            return None
        return (
            f"in bfloat16 rounding alone moves the log of a {self.ratio.kind} ratio by about {expected:.2g} in answers of "
            f"{longest} tokens, more in shorter ones, and the clip is {clip:g}: it acts at random; use model.dtype: float32, "
            "or a wider clip"
        )

    def warnings(self, *, updates_per_rollout: int | None = None) -> list[str]:
        """Warnings about settings that are valid but probably a mistake."""
        return [text for applies, text in _guards(self, updates_per_rollout) if applies]


def _guards(spec: ObjectiveSpec, updates: int | None) -> list[tuple[bool, str]]:
    clipped = isinstance(spec.surrogate, axes.Clipped) and spec.ratio.per_sequence
    clip = max(spec.surrogate.clip_low, spec.surrogate.clip_high) if isinstance(spec.surrogate, axes.Clipped) else 0.0
    return [
        (
            clipped and clip > WIDE_SEQUENCE_CLIP,
            f"a sequence ratio moves by thousandths: a clip of {clip:g} hardly ever acts (GSPO uses 3e-4 and 4e-4)",
        ),
        (
            clipped and spec.aggregate.kind == "token",
            "a sequence ratio with aggregate token gives long answers more weight; GSPO takes the mean over sequences (seq)",
        ),
        (
            spec.ratio.multiplies,
            "a product ratio multiplies over all tokens of an answer: it leaves every bound on long answers",
        ),
        (
            spec.anchor == "rollout" and spec.correct.weighs,
            "with anchor rollout the ratio already corrects for the sampler; correct does it twice",
        ),
        (
            updates == 1,
            "one update per rollout (update.minibatches, update.epochs): the ratio is still 1, so no clip acts",
        ),
    ]
