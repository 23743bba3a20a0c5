"""The axes of an objective as they may be asked for: each kind with its parameters. What the names compute stands in
`workers.objectives`, one file an axis."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from pydantic_core import PydanticKnownError

from service.spec.section import MOST, MOST_COUNTED, Section


def _low_offset(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"must be at least 0 and below 1: {_OFFSETS}, got {value:g}")
    return value


def _high_offset(value: float) -> float:
    """An upper bound is far away or it is close: between 1 and 2 it is an absolute one that was written by mistake."""
    if not (0 <= value <= 1 or value >= 2):
        hint = f" (for an absolute bound of {value:g} write {value - 1:g})" if value > 1 else ""
        raise ValueError(f"must be at least 0 and at most 1, or 2 and more: {_OFFSETS}, got {value:g}{hint}")
    return value


_OFFSETS = "the ratio stays in [1 - clip_low, 1 + clip_high]"
ClipLow = Annotated[
    float,
    AfterValidator(_low_offset),
    Field(json_schema_extra={"minimum": 0, "exclusiveMaximum": 1}, description="offset: the ratio stays above 1 - clip_low"),
]
ClipHigh = Annotated[
    float,
    Field(
        le=MOST,
        json_schema_extra={"anyOf": [{"minimum": 0, "maximum": 1}, {"minimum": 2}]},
        description="offset: the ratio stays below 1 + clip_high",
    ),
    AfterValidator(_high_offset),
]
NotNegative = Annotated[float, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
LengthPower = Annotated[float, Field(ge=-4, le=4)]
Chunk = Annotated[int, Field(ge=1, le=MOST_COUNTED)]


# ---------------------------------------------------------------- ratio


class Ratio(Section):
    """token: each token its own · sequence: their geometric mean (GSPO) · sequence_token: the same value, gradients a token
    (GSPO-token) · product: of the whole answer · product_token: its value, gradients a token · one: no ratio (REINFORCE)."""

    kind: Literal["token", "sequence", "sequence_token", "product", "product_token", "one"] = "token"

    @property
    def constant(self) -> bool:
        """No gradient runs through it."""
        return self.kind == "one"

    @property
    def per_sequence(self) -> bool:
        """A mean over the whole answer, which moves by thousandths."""
        return self.kind in ("sequence", "sequence_token")

    @property
    def multiplies(self) -> bool:
        """Over all tokens of an answer."""
        return self.kind in ("product", "product_token")


class SegmentRatio(Section):
    """The geometric mean within a segment: between token (chunk 1) and sequence (one chunk)."""

    constant: ClassVar[bool] = False
    per_sequence: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False
    kind: Literal["segment"] = "segment"
    chunk: Annotated[
        Chunk | None, Field(description="answer tokens in a segment; null: the batch brings segment_ids (not in a job)")
    ] = None


# ---------------------------------------------------------------- surrogate


class Surrogate(Section):
    through_ratio: ClassVar[bool] = True  # the gradient needs a ratio that depends on the policy
    through_anchor: ClassVar[bool] = False  # it looks at the anchor's log-probs even where the ratio is constant


class Clipped(Surrogate):
    """With a ratio clipped to [1 - clip_low, 1 + clip_high]."""

    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2


class Ppo(Clipped):
    """-min(r A, clip(r) A)."""

    kind: Literal["ppo"] = "ppo"
    dual_clip: Annotated[
        float | None, Field(gt=1, le=MOST, description="bound of the ratio where the advantage is negative")
    ] = None


class TwoSided(Clipped):
    """PPO whose ratio stays below delta where the advantage is negative: dual_clip under INTELLECT-2's name."""

    kind: Literal["two_sided"] = "two_sided"
    delta: Annotated[float, Field(gt=1, le=MOST, description="bound of the ratio where the advantage is negative")] = 4.0


def _for_both(value: Any, pair: ValidatorFunctionWrapHandler) -> Any:
    """One number as a pair; what is wrong with it is said of the number, and not of pairs that nobody wrote."""
    if isinstance(value, list | tuple):
        return pair(value)
    try:
        return pair((value, value))
    except ValidationError as error:
        first = error.errors()[0]
        raise PydanticKnownError(first["type"], first.get("ctx")) from None  # pyright: ignore[reportArgumentType]


_BOTH = Field(
    strict=False, description="one bound for positive and one for negative advantages; a single number is used for both"
)
Pair = Annotated[
    tuple[NotNegative, NotNegative],
    WrapValidator(_for_both, json_schema_input_type=NotNegative | tuple[NotNegative, NotNegative]),
    _BOTH,
]
PositivePair = Annotated[
    tuple[Positive, Positive], WrapValidator(_for_both, json_schema_input_type=Positive | tuple[Positive, Positive]), _BOTH
]


class Cispo(Surrogate):
    """-sg(clip(r)) A log p; the bounds are absolute weights, not offsets."""

    through_ratio: ClassVar[bool] = False
    kind: Literal["cispo"] = "cispo"
    weight_min: Pair = (0.0, 0.0)
    weight_max: PositivePair = (5.0, 5.0)

    @model_validator(mode="after")
    def ordered(self) -> Self:
        for least, most in zip(self.weight_min, self.weight_max, strict=True):
            if least > most:
                raise ValueError(f"weight_min must not exceed weight_max, got {least:g} > {most:g}")
        return self


class Sapo(Surrogate):
    """-(4 / tau) sigmoid(tau (r - 1)) A."""

    kind: Literal["sapo"] = "sapo"
    tau_positive: Annotated[Positive, Field(description="temperature where the advantage is positive")] = 1.0
    tau_negative: Annotated[Positive, Field(description="temperature where the advantage is zero or negative")] = 1.05


class Gmpo(Surrogate):
    """Token log ratios clipped on the harmful side, then pooled by the ratio axis."""

    kind: Literal["gmpo"] = "gmpo"
    clip_low: Annotated[NotNegative, Field(description="the log ratio stays above -clip_low")] = 0.4
    clip_high: Annotated[NotNegative, Field(description="the log ratio stays below clip_high")] = 0.4


class TrustRegion(Surrogate):
    """-r A, without tokens whose probability left the region on the harmful side: by total variation or binary KL."""

    kind: Literal["tv", "bkl"] = "tv"
    low: Annotated[NotNegative, Field(description="largest divergence of a token that became less likely")] = 0.2
    high: Annotated[NotNegative, Field(description="largest divergence of a token that became likelier")] = 0.2


class Dro(Surrogate):
    """-(A log p - beta / 2 (log ratio)^2)."""

    through_ratio: ClassVar[bool] = False
    through_anchor: ClassVar[bool] = True
    kind: Literal["dro"] = "dro"
    beta: Annotated[NotNegative, Field(description="strength of the quadratic penalty")] = 0.05


class Vespo(Surrogate):
    """-sg(w) A log p with w = r^k exp(lam (1 - r))."""

    through_ratio: ClassVar[bool] = False
    kind: Literal["vespo"] = "vespo"
    k: Pair = (2.0, 3.0)
    lam: Pair = (3.0, 2.0)


class ClipCov(Clipped):
    """PPO in which a few tokens, drawn among those of high covariance, lose their gradient."""

    kind: Literal["clip_cov"] = "clip_cov"
    share: Annotated[float, Field(ge=0, le=1, description="share of all tokens that are drawn")] = 2e-4
    cov_low: Annotated[float, Field(ge=-MOST, le=MOST, description="smallest covariance of a token that may be drawn")] = 1.0
    cov_high: Annotated[float, Field(ge=-MOST, le=MOST, description="largest covariance of a token that may be drawn")] = 5.0


class KlCov(Surrogate):
    """-r A, plus a KL penalty on the tokens of highest covariance."""

    kind: Literal["kl_cov"] = "kl_cov"
    share: Annotated[float, Field(ge=0, le=1, description="share of all tokens that are penalised")] = 2e-4
    coef: Annotated[NotNegative, Field(description="strength of the penalty")] = 1.0


class Plain(Surrogate):
    """-r A; -A log p with the ratio `one`."""

    through_ratio: ClassVar[bool] = False
    kind: Literal["none"] = "none"


AnyRatio = Ratio | SegmentRatio
AnySurrogate = Ppo | TwoSided | Cispo | Sapo | Gmpo | TrustRegion | Dro | Vespo | ClipCov | KlCov | Plain


# ---------------------------------------------------------------- aggregate


class Aggregate(Section):
    """token: mean over tokens · seq: mean over sequences of their token means · prompt: mean over groups of their token
    means · seq_sum: mean over sequences of their token sums · sum."""

    kind: Literal["token", "seq", "prompt", "seq_sum", "sum"] = "token"
    length_power: Annotated[
        LengthPower, Field(description="each sequence is also weighted by its length to this power (LUSPO: 1)")
    ] = 0.0


class ConstantAggregate(Section):
    """Token sums over sequences times a constant (Dr. GRPO)."""

    kind: Literal["constant"] = "constant"
    constant: Annotated[
        Positive | None, Field(description="the divisor; null: the longest possible answer (in a job max_completion_tokens)")
    ] = None
    length_power: Annotated[
        LengthPower, Field(description="as in the other kinds: each sequence is also weighted by its length to this power")
    ] = 0.0


AnyAggregate = Aggregate | ConstantAggregate


# ---------------------------------------------------------------- advantage, kl, correct, select


class Advantage(Section):
    """How rewards become advantages."""

    centre: Annotated[
        Literal["none", "given", "group_mean", "leave_one_out", "length_weighted", "best_minus_second"],
        Field(description="the baseline that is subtracted from the reward; given: none, the rewards are used as advantages"),
    ] = "group_mean"
    scale: Annotated[
        Literal["none", "group_std", "batch_std", "group_mean", "whiten"],
        Field(description="what the centred reward is divided by"),
    ] = "group_std"
    eps: Annotated[NotNegative, Field(description="added to the divisor")] = 1e-6
    several: Annotated[
        Literal["sum_then_normalize", "normalize_then_sum"],
        Field(description="what is done first with several rewards (GDPO: normalize)"),
    ] = "sum_then_normalize"


class Kl(Section):
    """A penalty for leaving a reference policy."""

    place: Annotated[Literal["none", "reward", "loss"], Field(description="subtracted from the reward, or added to the loss")]
    estimator: Annotated[Literal["k1", "k2", "k3", "abs"], Field(description="the estimator of a token's KL")] = "k3"
    gradient: Annotated[
        Literal["plain", "straight_through", "ratio_weighted", "token_ratio_weighted", "score"],
        Field(
            description="straight_through: the estimator's value, k2's gradient; ratio_weighted: times the ratio, unbiased off "
            "policy; token_ratio_weighted: times the token's own ratio, whatever the ratio axis; score: unbiased on policy"
        ),
    ] = "plain"
    reference: Annotated[Literal["ref", "rollout"], Field(description="the starting weights, or the policy that sampled")] = (
        "ref"
    )
    coef: Annotated[NotNegative, Field(description="the penalty's coefficient; 0: no penalty")] = 0.04

    def acts(self, *, rewards: bool) -> bool:
        """Whether it changes anything; in the reward only where there are rewards."""
        return self.coef > 0 and (self.in_loss or (self.in_reward and rewards))

    @property
    def in_loss(self) -> bool:
        return self.place == "loss"

    @property
    def in_reward(self) -> bool:
        return self.place == "reward"


CorrectionLevel = Literal["token", "geometric", "product", "segment"]


class Correct(Section):
    """A detached weight exp(old - rollout), for samplers that do not agree with the trainer."""

    level: Annotated[CorrectionLevel, Field(description="one weight a token, sequence or segment")] = "token"
    action: Annotated[
        Literal["none", "truncate", "mask"],
        Field(description="truncate: at most cap; mask: 0 outside of [low, high]; none: no weight, sequence_delta may act"),
    ]
    cap: Annotated[Positive, Field(description="for truncate: larger weights become this")] = 2.0
    floor: Annotated[NotNegative, Field(description="for truncate: smaller weights become this")] = 0.0
    low: Annotated[NotNegative, Field(description="for mask: the smallest weight that is kept")] = 0.5
    high: Annotated[Positive, Field(description="for mask: the largest weight that is kept")] = 2.0
    mask_level: Annotated[
        CorrectionLevel | None,
        Field(description="drop what is outside of [low, high] by the weight at this level; null: only mask does, at `level`"),
    ] = None
    weigh: Annotated[bool, Field(description="false: only mask; what is kept has the weight 1")] = True
    chunk: Annotated[Chunk | None, Field(description="answer tokens in a segment, for level segment")] = None
    normalize: Annotated[bool, Field(description="divide the weights by their mean over the optimizer step")] = False
    sequence_delta: Annotated[
        float | None,
        Field(
            ge=-MOST,
            le=MOST,
            description="drop sequences with a negative advantage whose mean of old - new log-probs exceeds this",
        ),
    ] = None

    @model_validator(mode="after")
    def ordered(self) -> Self:
        for least, most in (("floor", "cap"), ("low", "high")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least} must not exceed {most}, got {getattr(self, least):g} > {getattr(self, most):g}")
        return self

    @property
    def weighs(self) -> bool:
        return self.action != "none"

    @property
    def wants_segments(self) -> bool:
        return self.weighs and "segment" in (self.level, self.mask_level) and self.chunk is None


class Select(Section):
    """What is left out before the aggregation weights are computed."""

    truncated: Annotated[bool, Field(description="leave out answers that were cut at the token limit")] = False
    zero_variance: Annotated[bool, Field(description="leave out groups whose rewards are all equal")] = False
    top_entropy: Annotated[
        float | None,
        Field(gt=0, le=1, description="keep only this share of tokens, the ones of highest entropy (not in a job)"),
    ] = None
