"""The reward section of a spec: graders and their weights."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.metric_names import taken_from_graders
from service.spec.addresses import host_of, names_user
from service.spec.patterns import check_size, check_sizes
from service.spec.schemas import check_bounds
from service.spec.section import MOST, MOST_COUNTED, Section
from service.spec.templates import Template

TAKEN = taken_from_graders()


class GraderBase(Section):
    name: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="the grader's name; its metric is reward/NAME; default: the kind"),
    ] = None
    weight: Annotated[
        float, Field(ge=-MOST, le=MOST, description="the score's weight in the reward, which is the weighted sum of all scores")
    ] = 1.0
    extract: Annotated[
        str | None,
        Field(
            max_length=1000,
            description="regular expression; its last match (or the first group in it that matched) is graded; no match: 0",
        ),
    ] = None

    @field_validator("name")
    @classmethod
    def leaves_metrics_alone(cls, value: str | None) -> str | None:
        if value in TAKEN:
            raise ValueError(f"reward/{value} is a metric of every job; names that are taken: {', '.join(TAKEN)}")
        return value

    @field_validator("extract")
    @classmethod
    def extract_is_bounded(cls, value: str | None) -> str | None:
        return None if value is None else check_size(value)

    @property
    def patterns(self) -> dict[str, str]:
        """Its regular expressions by field. That they are some is seen by `service.rewards.texts`."""
        return {} if self.extract is None else {"extract": self.extract}


Reference = Annotated[
    Template, Field(description='the right answer, a template over the row\'s columns, for example "{answer}"')
]


class ExactGrader(GraderBase):
    """1 if the answer is the reference, else 0."""

    kind: Literal["exact"]
    reference: Reference
    strip: Annotated[bool, Field(description="ignore white space at both ends")] = True
    case_sensitive: Annotated[bool, Field(description="whether upper and lower case differ")] = True


class ContainsGrader(GraderBase):
    """1 if the reference stands somewhere in the answer, else 0."""

    kind: Literal["contains"]
    reference: Reference
    case_sensitive: Annotated[bool, Field(description="whether upper and lower case differ")] = True


class RegexGrader(GraderBase):
    """1 if the pattern matches, else 0; a match that takes longer than a second is an error of that sample."""

    kind: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1, max_length=10_000, description="regular expression (Python's syntax)")]
    full: Annotated[bool, Field(description="the whole answer must match, not only a part of it")] = False

    @field_validator("pattern")
    @classmethod
    def pattern_is_bounded(cls, value: str) -> str:
        return check_size(value)

    @property
    def patterns(self) -> dict[str, str]:
        return {**super().patterns, "pattern": self.pattern}


class NumberGrader(GraderBase):
    """1 if the answer's final number or formula equals the reference's, else 0 (sympy and math-verify; docs/graders.md).

    Only the last 4,096 characters of an answer are read; one that takes longer than five seconds of CPU time is an error of
    that sample.
    """

    kind: Literal["number"]
    reference: Reference
    tolerance: Annotated[
        float, Field(ge=0, lt=1, description="how far off a number may be, as a share of the reference: 0.01 is one percent")
    ] = 0.0
    units: Annotated[
        Literal["if_given", "required", "ignored"],
        Field(description="whether the answer must have the reference's unit: only if it gives a unit, always, or never"),
    ] = "if_given"
    percent: Annotated[
        Literal["hundredths", "sign"],
        Field(description="what % means; hundredths: 50% is 0.5; sign: the sign is ignored, and 50% is 50"),
    ] = "hundredths"


class JsonSchemaGrader(GraderBase):
    """1 if the answer is JSON that fits the schema, else 0."""

    kind: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema", description="a JSON Schema")]

    @field_validator("json_schema")
    @classmethod
    def schema_is_bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_bounds(value)


class SimilarityGrader(GraderBase):
    """How alike answer and reference are, 0 to 1 (rapidfuzz)."""

    kind: Literal["similarity"]
    reference: Reference
    metric: Annotated[
        Literal["ratio", "partial_ratio", "token_sort_ratio", "token_set_ratio", "jaro_winkler", "position"],
        Field(description="a measure of rapidfuzz, or position: the share of characters that are correct at their position"),
    ] = "ratio"


class LengthGrader(GraderBase):
    """1 inside [min_tokens, max_tokens], falling linearly to 0 over `slack` tokens outside."""

    kind: Literal["length"]
    min_tokens: Annotated[int, Field(ge=0, le=MOST_COUNTED, description="shortest answer that gets 1")] = 0
    max_tokens: Annotated[int, Field(ge=1, le=MOST_COUNTED, description="longest answer that gets 1")]
    slack: Annotated[
        int,
        Field(
            ge=0,
            le=MOST_COUNTED,
            description="how many tokens beyond the bounds the score takes to fall to 0; 0: it falls at once",
        ),
    ] = 0

    @model_validator(mode="after")
    def counts_the_whole_answer(self) -> Self:
        if self.extract is not None:
            raise ValueError("extract does not go with length, which counts the tokens of the whole answer")
        return self

    @model_validator(mode="after")
    def bounds_are_ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must not exceed max_tokens, got {self.min_tokens} > {self.max_tokens}")
        return self


class ReasoningGymGrader(GraderBase):
    """The task's own scorer with the source's configuration, 0 to 1; a text that it cannot read gets 0. Some scorers pay
    wrong answers (docs/graders.md). For rows of the source reasoning_gym."""

    kind: Literal["reasoning_gym"]
    strict: Annotated[
        bool,
        Field(
            description="give 1 only for the task's own answer and 0 for every other; white space at the ends does not count"
        ),
    ] = False


class HttpGrader(GraderBase):
    """Your own reward service: gets batches of samples by POST and answers their rewards."""

    kind: Literal["http"]
    url: Annotated[
        str, Field(pattern=r"^https?://[^\s]+$", max_length=2048, description="the URL to which batches of samples are posted")
    ]
    secret: Annotated[
        str | None, Field(description="name of an operator's secret (RATCHET_GRADER_SECRETS) that signs each batch")
    ] = None
    timeout_s: Annotated[
        float, Field(gt=0, le=600, description="time limit of one attempt in seconds, including its answer")
    ] = 30.0
    max_retries: Annotated[
        int, Field(ge=0, le=10, description="how many times a failed request is repeated, with growing pauses")
    ] = 3
    batch_size: Annotated[int, Field(ge=1, le=1024, description="samples in one request")] = 64

    @field_validator("url")
    @classmethod
    def names_a_host(cls, value: str) -> str:
        host_of(value)
        if names_user(value):
            raise ValueError(
                "a URL with a user name or password would be shown with the spec; use `secret` to sign the batches"
            )
        return value


Grader = Annotated[
    ExactGrader
    | ContainsGrader
    | RegexGrader
    | NumberGrader
    | JsonSchemaGrader
    | SimilarityGrader
    | LengthGrader
    | ReasoningGymGrader
    | HttpGrader,
    Field(discriminator="kind"),
]


class RewardSpec(Section):
    """What a better answer is: a weighted sum of graders."""

    graders: Annotated[
        list[Grader], Field(min_length=1, max_length=16, description="the graders; each gives a score, usually from 0 to 1")
    ]
    on_error: Annotated[
        Literal["mask", "zero", "fail"],
        Field(description="a sample that could not be graded is left out (mask), gets 0 (zero), or fails the job (fail)"),
    ] = "mask"
    max_error_rate: Annotated[
        float, Field(ge=0, le=1, description="the job pauses if a larger share of the samples than this could not be graded")
    ] = 0.2

    @model_validator(mode="after")
    def patterns_are_bounded_together(self) -> Self:
        check_sizes(pattern for grader in self.graders for pattern in grader.patterns.values())
        return self

    @model_validator(mode="after")
    def names_differ(self) -> Self:
        names = [grader.name or grader.kind for grader in self.graders]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"graders must have names of their own, but two are called {name!r}; give each a `name`")
        return self
