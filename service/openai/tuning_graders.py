"""OpenAI's graders as a job's reward. What a job's graders cannot do is refused by name."""

import ast
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from service.errors import FieldError
from service.spec.section import Section
from service.validation import invalid

OUTPUT = "{{sample.output_text}}"
VARIABLE = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
COLUMN = re.compile(r"item\.([A-Za-z_][A-Za-z0-9_-]*)")
SIMILARITIES = {"fuzzy_match": "ratio"}
ELSEWHERE = "give your own scoring as a reward service: {type: score_model, model: https://...} (docs/openai.md)"

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Text = Annotated[str, Field(max_length=65_536)]


class _Grader(Section):
    name: Annotated[Name, Field(description="its metric is reward/NAME")]


class _OfText(_Grader):
    input: Annotated[Text, Field(description=f"what is graded: {OUTPUT}")]
    reference: Annotated[Text, Field(description="the right answer; {{item.NAME}} stands for a column of the row")]

    @field_validator("input")
    @classmethod
    def grades_the_answer(cls, value: str) -> str:
        if VARIABLE.sub(lambda found: "{{" + found[1] + "}}", value.strip()) != OUTPUT:
            raise ValueError(f"only the answer itself is graded: {OUTPUT}")
        return value


class StringCheckGrader(_OfText):
    """eq: exactly the reference. like, ilike: the reference stands in the answer, as it is or in any case."""

    type: Literal["string_check"]
    operation: Literal["eq", "like", "ilike"]

    @field_validator("operation", mode="before")
    @classmethod
    def not_ne(cls, value: Any) -> Any:
        if value == "ne":
            raise ValueError(f"`ne` is not offered; {ELSEWHERE}")
        return value

    def graders(self) -> list[dict[str, Any]]:
        reference = template(self.reference)
        if self.operation == "eq":
            return [{"kind": "exact", "name": self.name, "reference": reference, "strip": False}]
        contains = {"kind": "contains", "name": self.name, "reference": reference}
        return [contains | {"case_sensitive": self.operation == "like"}]


class TextSimilarityGrader(_OfText):
    """How alike answer and reference are."""

    type: Literal["text_similarity"]
    evaluation_metric: Literal["fuzzy_match"]

    @field_validator("evaluation_metric", mode="before")
    @classmethod
    def ours(cls, value: Any) -> Any:
        if not isinstance(value, str) or value not in SIMILARITIES:
            raise ValueError(f"only fuzzy_match is offered; for others {ELSEWHERE}")
        return value

    def graders(self) -> list[dict[str, Any]]:
        metric = SIMILARITIES[self.evaluation_metric]
        return [{"kind": "similarity", "name": self.name, "reference": template(self.reference), "metric": metric}]


class GraderMessage(Section):
    role: Literal["user", "system", "developer"]
    content: Text
    type: Literal["message"] = "message"


Reward = Annotated[float, Field(ge=-1e9, le=1e9)]


class ScoreModelGrader(_Grader):
    """A reward service of your own, which gets each answer with its row (docs/graders.md, `http`)."""

    type: Literal["score_model"]
    model: Annotated[
        str,
        Field(pattern=r"^https?://[^\s]+$", max_length=2048, description="the URL of a reward service"),
    ]
    input: Annotated[list[GraderMessage], Field(max_length=1, description=f"[] or one message of {OUTPUT}")]
    range: Annotated[
        tuple[Reward, Reward] | None, Field(strict=False, description="not used: the service's rewards count as they are")
    ] = None
    secret: Annotated[str | None, Field(description="ours: name of an operator's secret that signs the batches")] = None

    @field_validator("model", mode="before")
    @classmethod
    def is_a_url(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.startswith(("http://", "https://")):
            raise ValueError("no model grades here: write the https:// URL of a reward service (docs/openai.md)")
        return value

    @field_validator("input")
    @classmethod
    def says_nothing(cls, value: list[GraderMessage]) -> list[GraderMessage]:
        if any(VARIABLE.sub(lambda found: "{{" + found[1] + "}}", one.content.strip()) != OUTPUT for one in value):
            raise ValueError(f"a reward service gets prompt, answer and row as they are; write [] or one message of {OUTPUT}")
        return value

    def graders(self) -> list[dict[str, Any]]:
        return [{"kind": "http", "name": self.name, "url": self.model, "secret": self.secret}]


class RefusedGrader(Section):
    """Graders of OpenAI's that are not offered."""

    type: Literal["python", "label_model", "endpoint"]

    @model_validator(mode="before")
    @classmethod
    def never(cls, value: Any) -> Any:
        type_ = value.get("type") if isinstance(value, dict) else None
        why = "code of callers is not run here" if type_ == "python" else "it is not offered"
        raise ValueError(f"a grader of type {type_} cannot be used: {why}; {ELSEWHERE}")

    def graders(self) -> list[dict[str, Any]]:
        raise AssertionError("unreachable")


Single = Annotated[StringCheckGrader | TextSimilarityGrader | ScoreModelGrader | RefusedGrader, Field(discriminator="type")]


class MultiGrader(Section):
    """A weighted sum of graders."""

    type: Literal["multi"]
    name: Name
    graders_: Annotated[dict[Name, Single], Field(alias="graders", min_length=1, max_length=16, description="by their names")]
    calculate_output: Annotated[
        str, Field(max_length=4096, description="a sum of the graders' names, each times a number: 0.7 * a + 0.3 * b")
    ]

    @field_validator("graders_", mode="before")
    @classmethod
    def one_alone(cls, value: Any) -> Any:
        """One grader in place of several, as the types of OpenAI's package have it."""
        alone = isinstance(value, dict) and isinstance(value.get("type"), str) and isinstance(value.get("name"), str)
        return {value["name"]: value} if alone else value

    def graders(self) -> list[dict[str, Any]]:
        weights = weights_of(self.calculate_output, set(self.graders_))
        named = {name: grader.graders()[0] | {"name": name} for name, grader in self.graders_.items()}
        return [named[name] | {"weight": weight} for name, weight in weights.items()]


Grader = Annotated[
    StringCheckGrader | TextSimilarityGrader | ScoreModelGrader | MultiGrader | RefusedGrader, Field(discriminator="type")
]


def template(text: str) -> str:
    """The text as a template of a job: {{item.NAME}} becomes {NAME}, and other braces stand for themselves.

    Raises InvalidRequest for any other variable.
    """
    parts: list[str] = []
    end = 0
    for found in VARIABLE.finditer(text):
        column = COLUMN.fullmatch(found[1])
        if column is None:
            detail = f"{found[0]!r} cannot be filled in: a reference takes {{{{item.NAME}}}}, the columns of the row"
            raise invalid([FieldError("/method/reinforcement/grader/reference", detail, "unknown_variable", found[0])])
        parts += [_escaped(text[end : found.start()]), f"{{{column[1]}}}"]
        end = found.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def weights_of(formula: str, names: set[str]) -> dict[str, float]:
    """The weight of each grader in the formula. Raises InvalidRequest if it is no weighted sum of all of them."""
    pointer = "/method/reinforcement/grader/calculate_output"
    try:
        weights = _linear(ast.parse(formula.strip(), mode="eval").body)
        if constant := weights.pop("", 0.0):
            raise ValueError(f"it adds {constant:g}, which changes nothing that is learnt; leave that out")
    except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError, OverflowError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        detail = f"only a sum of graders, each times a number, is offered (0.7 * a + 0.3 * b): {reason}"
        raise invalid([FieldError(pointer, detail, "not_linear", formula[:200])]) from None
    if set(weights) != names:
        odd = ", ".join(sorted(set(weights) ^ names))
        detail = f"it must name each grader, and nothing else; look at {odd}"
        raise invalid([FieldError(pointer, detail, "unknown_grader", formula[:200], sorted(names))])
    return weights


def _linear(node: ast.expr) -> dict[str, float]:
    """The weights of the names in a linear expression, and of '' (the constant). Raises ValueError for any other."""
    if isinstance(node, ast.Name):
        return {node.id: 1.0}
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return {"": float(node.value)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign = -1.0 if isinstance(node.op, ast.USub) else 1.0
        return {name: sign * weight for name, weight in _linear(node.operand).items()}
    if isinstance(node, ast.BinOp):
        left, right = _linear(node.left), _linear(node.right)
        if isinstance(node.op, ast.Add | ast.Sub):
            sign = -1.0 if isinstance(node.op, ast.Sub) else 1.0
            return {
                name: left.get(name, 0.0) + sign * right.get(name, 0.0) for name in [*left, *sorted(right.keys() - left.keys())]
            }
        if isinstance(node.op, ast.Mult) and (left.keys() == {""} or right.keys() == {""}):
            factor, other = (left[""], right) if left.keys() == {""} else (right[""], left)
            return {name: factor * weight for name, weight in other.items()}
        if isinstance(node.op, ast.Div) and right.keys() == {""}:
            return {name: weight / right[""] for name, weight in left.items()}
    raise ValueError(f"`{ast.unparse(node)[:80]}` is none")
