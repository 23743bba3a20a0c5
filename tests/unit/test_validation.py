"""From pydantic's complaints to pointers and words."""

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, model_validator

from job_specs import RL
from service.errors import InvalidRequest
from service.spec.job import JobSpec
from service.validation import below, complaints, nearest, parse, shown
from service.validation.words import quoted


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Circle(Section):
    kind: Literal["circle"]
    radius: Annotated[float, Field(gt=0, le=10, description="of the circle")]


class Square(Section):
    kind: Literal["square", "box"]
    side: int = 1
    circle: str = ""  # a key that is also a tag


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


class Label(Section):
    text: Annotated[str, Field(min_length=1, max_length=5, pattern="^[a-z]+$")]


class Drawing(Section):
    shapes: list[Shape] = []
    first: Shape | None = None
    named: dict[str, Shape] = {}
    label: list[Label] | Label | Literal["none"] | int = "none"
    corners: tuple[float, float] = (0, 0)
    counts: dict[int, int] = {}
    password: int = 0
    key: SecretStr | None = None
    class_: Annotated[Literal["thin", "thick"], Field(alias="class")] = "thin"
    free: dict = {}

    @model_validator(mode="after")
    def rule(self):
        if self.label == 13:
            raise ValueError("label must not be 13, it brings bad luck")
        return self


def errors(raw, model: Any = Drawing, pointer=""):
    with pytest.raises(InvalidRequest) as refused:
        parse(model, raw, pointer)
    return refused.value.errors


def one(raw, model: Any = Drawing):
    found = errors(raw, model)
    assert len(found) == 1, found
    return found[0]


def test_what_is_right_comes_back_as_the_model():
    drawing = parse(Drawing, {"shapes": [{"kind": "circle", "radius": "2"}]})
    assert isinstance(drawing, Drawing)
    assert isinstance(drawing.shapes[0], Circle)
    assert parse(TypeAdapter(Shape), {"kind": "box"}) == Square(kind="box")
    assert parse(Shape, {"kind": "box"}) == Square(kind="box")


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        ({"shapes": [{"kind": "circle", "radius": 1}, {"kind": "square", "side": "x"}]}, "/shapes/1/side"),
        ({"first": {"kind": "circle", "radius": 11}}, "/first/radius"),
        ({"named": {"a/b~c": {"kind": "box", "side": 1.5}}}, "/named/a~1b~0c/side"),
        ({"first": {"kind": "square", "circle": 3}}, "/first/circle"),
        ({"first": {"kind": "square", "square": 3}}, "/first/square"),
        ({"corners": [0, "x"]}, "/corners/1"),
        ({"counts": {"x": 1}}, "/counts/x"),
        ({"counts": {"1": "y"}}, "/counts/1"),
        ({"class": "thinn"}, "/class"),
        ({"label": [{"text": "ab"}, {"text": "AB"}]}, "/label/1/text"),
        ({"label": 13}, "/label"),
    ],
)
def test_pointers_hold_keys_and_numbers_and_no_tags(raw, pointer):
    assert one(raw).pointer == pointer


def test_unknown_keys_name_the_nearest_legal_one():
    wrong = one({"first": {"kind": "circle", "radius": 1, "raduis": 2}})
    assert (wrong.pointer, wrong.code) == ("/first/raduis", "unknown_key")
    assert wrong.detail == "unknown key 'raduis'; did you mean 'radius'?"
    assert wrong.allowed == ["kind", "radius"]
    assert one({"Class": "thin"}).detail.endswith("did you mean 'class'?")
    assert "belongs to /first/radius" in one({"radius": 1}).detail
    assert "legal: class, corners" in one({"zzz": 1}).detail


def test_wrong_and_missing_tags_name_the_legal_ones():
    wrong = one({"first": {"kind": "circel"}})
    assert (wrong.pointer, wrong.got, wrong.allowed) == ("/first/kind", "circel", ["circle", "square", "box"])
    assert wrong.detail == "must be one of circle, square, box, got 'circel'; did you mean 'circle'?"
    missing = one({"shapes": [{}]})
    assert (missing.pointer, missing.code, missing.allowed) == ("/shapes/0/kind", "missing", ["circle", "square", "box"])
    assert one({"first": 3}).detail == "must be an object, got 3"
    assert one("x", Shape).pointer == ""


def test_bounds_say_what_is_allowed():
    assert one({"first": {"kind": "circle", "radius": 11}}).detail == "must be at most 10.0, got 11"
    assert one({"first": {"kind": "circle", "radius": 0}}).detail == "must be greater than 0.0, got 0"
    assert one({"first": {"kind": "circle"}}).detail == "is required (of the circle)"
    assert one({"label": {"text": ""}}).detail == "must be at least 1 characters long, got ''"
    assert one({"corners": [1]}).pointer == "/corners/1"
    assert one({"corners": [1, 2, 3]}).detail == "must be at most 2 long, got an array of 3 items"


def test_a_plain_union_is_one_complaint_about_all_its_members():
    wrong = one({"label": True and "x"})
    assert wrong.pointer == "/label"
    assert wrong.detail == "must be an array or an object or none or an integer, got 'x'"
    assert one(5, str | list[str] | list[int]).detail == "must be a string or an array, got 5"


def test_of_a_plain_union_only_the_member_that_fits_is_heard():
    wrong = errors({"label": {"text": "toolong", "colour": 1}})
    assert {error.pointer for error in wrong} == {"/label/text", "/label/colour"}


def test_many_complaints_are_counted_and_cut():
    with pytest.raises(InvalidRequest) as refused:
        parse(Drawing, {"shapes": [{}] * 70})
    assert len(refused.value.errors) == 50
    assert refused.value.detail == "/shapes/0/kind: is required: one of circle, square, box (and 69 more)"


def test_a_prefix_stands_before_every_pointer():
    assert errors({"zzz": 1}, pointer="/spec")[0].pointer == "/spec/zzz"
    with pytest.raises(InvalidRequest) as refused, below("/spec"):
        parse(Drawing, {"zzz": 1})
    assert refused.value.errors[0].pointer == "/spec/zzz"
    assert refused.value.detail.startswith("/spec/zzz: ")


def test_rules_over_several_fields_point_to_the_one_they_begin_with():
    spec = RL | {"update": {"minibatches": 7}}
    assert one(spec, JobSpec).pointer == "/update/minibatches"
    spec["update"] = {}
    spec["model"] = {"source": "tiny", "tiny": {"hidden_size": 9}}
    assert one(spec, JobSpec).pointer == "/model/tiny/hidden_size"


def test_secrets_never_come_back():
    for raw in ({"password": "hunter2"}, {"key": ["hunter2"]}, {"first": "tml-hunter2hunter2"}, {"first": "http://hunter2@x"}):
        assert "hunter2" not in json.dumps([error.as_dict() for error in errors(raw)])
    assert shown("https://user:hunter2@host/path") == "https://(not shown)@host/path"
    assert shown("hunter2", "api_key") == "(not shown)"
    assert shown("12 tokens", "max_tokens") == "12 tokens"  # a name that only looks like one


def test_values_are_shortened():
    assert shown({"a": 1}) == "an object with 1 key"
    assert shown([1, 2]) == "an array of 2 items"
    assert len(shown("x" * 1000)) == 80
    assert len(shown(10**1000)) == 80
    assert shown(float("nan")) == "nan"
    assert [quoted(value) for value in (None, True, 1, 1.5, "a")] == ["null", "true", "1", "1.5", "'a'"]


def test_the_nearest_word_is_near():
    assert nearest("clip_hihg", ["clip_low", "clip_high"]) == "clip_high"
    assert nearest("GSPO", ["grpo", "gspo"]) == "gspo"
    assert nearest("zzz", ["clip_low"]) is None


def test_only_the_first_complaints_are_put_into_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a search for the word that was meant; all are counted."""
    searched = []
    monkeypatch.setattr(complaints, "did_you_mean", lambda word, legal: searched.append(word) or "")
    with pytest.raises(InvalidRequest, match=r"\(and 9999 more\)") as refused:
        parse(Drawing, {f"key{number}": 1 for number in range(10_000)})
    assert len(refused.value.errors) == 50 and len(searched) == 200
