"""Pydantic's errors in words for the caller: where, what came, what is allowed, what was probably meant."""

from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from service.errors import FieldError
from service.validation.foreign import hint_for_key, hint_for_kind, hint_for_value, not_offered
from service.validation.walk import Place, escape, legal_elsewhere, pointer_of
from service.validation.words import did_you_mean, is_very_near, quoted, shown

# pydantic's error types in JSON's terms; bounds are filled in from the error's context.
MUST_BE = {
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "list_type": "an array",
    "tuple_type": "an array",
    "string_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "none_required": "null",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
    "string_pattern_mismatch": "a text that matches {pattern}",
}


@dataclass
class Complaint:
    place: Place
    error: FieldError
    must_be: str | None = None  # used to merge the errors about one place of a plain union into one sentence


def complaint(place: Place, details: ErrorDetails) -> Complaint:
    """The complaint for one pydantic error; `place` is where its `loc` leads."""
    kind, context, sent = details["type"], details.get("ctx", {}), details["input"]
    got = shown(sent, place.name)
    if kind == "extra_forbidden":
        return Complaint(place, unknown_key(place.pointer, place.name, place.legal_keys, place.root))
    if kind == "missing":
        about = f" ({place.field.description})" if place.field and place.field.description else ""
        return Complaint(place, FieldError(place.pointer, f"is required{about}", "missing"))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return Complaint(place, _wrong_tag(place, str(context["discriminator"]).strip("'"), sent))
    if kind in ("literal_error", "enum"):
        legal = [option.strip("'") for option in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return _must_be(place, got, ", ".join(legal), legal)
    if kind in MUST_BE:
        return _must_be(place, got, MUST_BE[kind].format_map(context))
    detail = str(context.get("error") or details["msg"])
    if isinstance(sent, dict | list):  # a rule about several fields; its message begins with the field to change
        return Complaint(place, FieldError(place.pointer + pointer_of(place.annotation, detail.split()[0]), detail))
    return Complaint(place, FieldError(place.pointer, detail, got=got))


def unknown_key(pointer: str, key: str, legal: list[str], root: Any = None) -> FieldError:
    """`root`: the model of the whole document, used to say where else this key is legal."""
    meant = did_you_mean(key, legal)
    if not is_very_near(key, legal):
        if hint := _elsewhere_called(root, key):
            meant = f"; {hint}"
        elif where := legal_elsewhere(root, key):
            meant = f"; a key of this name belongs to {where}"
        elif _is_job(root) and (why := not_offered(key)):
            meant = f"; it {why}"
    if not meant and legal:
        meant = "; legal: " + ", ".join(legal)
    return FieldError(pointer, f"unknown key {quoted(shown(key))}{meant}", "unknown_key", allowed=legal)


def _elsewhere_called(root: Any, key: str) -> str | None:
    """Our counterpart of another library's name, if the document has a place for it, or is a job and another kind has one."""
    if (hint := hint_for_key(key)) is None:
        return None
    is_job = _is_job(root)
    if pointer_of(root, hint.partition(".")[0].split()[-1]) or (is_job and hint.startswith("`")):  # a command
        return f"here that is {hint}"
    return f"in a job of kind rl that is {hint}" if is_job else None


def _is_job(root: Any) -> bool:
    return pointer_of(root, "data.train") == "/data/train"


def _must_be(place: Place, got: Any, must_be: str, legal: list[str] | None = None) -> Complaint:
    if legal is None:
        return Complaint(place, FieldError(place.pointer, _sentence(must_be, got), "invalid", got, must_be), must_be)
    one_of = f"one of {must_be}" if len(legal) > 1 else must_be
    hint = hint_for_value(place.pointer, got)
    detail = _sentence(one_of, got) + _meant(str(got), hint, legal)
    return Complaint(place, FieldError(place.pointer, detail, "unknown_value", got, legal), must_be)


def _sentence(must_be: str, got: Any) -> str:
    return f"must be {must_be}, got {quoted(got)}"


def _wrong_tag(place: Place, key: str, sent: Any) -> FieldError:
    pointer, legal = f"{place.pointer}/{escape(key)}", place.tags(key)
    if not isinstance(sent, dict) or key not in sent:
        return FieldError(pointer, f"is required: one of {', '.join(legal)}", "missing", allowed=legal)
    got = shown(sent[key], key)
    hint = hint_for_kind(str(got)) if key == "kind" and place.root is None else hint_for_value(pointer, got)
    detail = _sentence(f"one of {', '.join(legal)}", got) + _meant(str(got), hint, legal)
    return FieldError(pointer, detail, "unknown_value", got, legal)


def _meant(got: str, hint: str | None, legal: list[str]) -> str:
    """What to write instead of a value that is not legal. `hint`: what another library's is called here."""
    if hint:
        return f"; here that is {hint}"
    why = not_offered(got)
    return f"; it {why}" if why else did_you_mean(got, legal)


def merge_unions(complaints: list[Complaint]) -> list[FieldError]:
    """For a plain union pydantic reports every member. Keep only the member that fits so far; if none does, list all."""
    fitting = {complaint.place.union for complaint in complaints if complaint.place.pointer != complaint.place.union}
    errors: dict[int, FieldError] = {}
    first_of: dict[str, tuple[int, str]] = {}
    for number, complaint in enumerate(complaints):
        pointer = complaint.place.pointer
        if pointer != complaint.place.union or complaint.must_be is None:
            errors[number] = complaint.error
        elif pointer in fitting:
            continue
        elif pointer not in first_of:
            first_of[pointer] = number, complaint.must_be
            errors[number] = complaint.error
        else:
            number, so_far = first_of[pointer]
            words = dict.fromkeys([*so_far.split(" or "), complaint.must_be])  # two members may be arrays
            must_be = " or ".join(words)
            first_of[pointer] = number, must_be
            got = complaint.error.got
            errors[number] = FieldError(pointer, _sentence(must_be, got), "invalid", got, must_be)
    return list(errors.values())
