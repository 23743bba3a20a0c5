"""Follows pydantic's `loc` through a model, to the place in the caller's document and to what is legal there.

A `loc` also contains tags of discriminated unions and labels of plain unions, which are not keys of the document. Only the
model can distinguish them from keys.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

MAX_SEARCHED = 200  # places to search for a misplaced key


@dataclass
class Place:
    """The end of a pydantic location: the place in the caller's document, and in the model."""

    pointer: str
    annotation: Any
    name: str = ""  # the last key
    root: Any = None  # the first model on the way, searched for the right place of an unknown key
    owner: type[BaseModel] | None = None  # the model whose field the last key names
    field: FieldInfo | None = None
    union: str | None = None  # the pointer of the innermost plain union on the way

    @property
    def legal_keys(self) -> list[str]:
        return sorted(_fields(self.owner)) if self.owner else []

    def tags(self, discriminator: str) -> list[str]:
        """The legal values of the discriminator of the union at this place."""
        members, _ = _members(self.annotation)
        return [str(tag) for member in members for tag in _tags(_bare(member), discriminator)]


def escape(key: str | int) -> str:
    """A key, escaped for a JSON pointer (RFC 6901)."""
    return str(key).replace("~", "~0").replace("/", "~1")


def walk(annotation: Any, loc: tuple[int | str, ...], pointer: str = "") -> Place:
    """The place that `loc` names, in a document whose `pointer` part was parsed as `annotation`."""
    place = Place(pointer, annotation)
    for item in loc:
        members, discriminator = _members(place.annotation)
        if len(members) > 1:
            if discriminator is None:
                place.union = place.pointer
            place.annotation = _member(members, discriminator, item)
        elif item != "[key]":  # "[key]" means that the key of a mapping is wrong, not its value
            place.pointer += f"/{escape(item)}"
            place.name = str(item)
            _descend(place, members[0], item)
    return place


def legal_elsewhere(root: Any, key: str) -> str | None:
    """The pointer of the shallowest place below `root` where this key is legal; in a union also the kind that has it."""
    return _legal_places(root).get(key)


@cache
def _legal_places(root: Any) -> dict[str, str]:
    """Every key that is legal somewhere below `root`, with its shallowest place."""
    places: dict[str, str] = {}
    queue: list[tuple[str, Any]] = [("", root)]
    for pointer, annotation in queue:
        _, discriminator = _members(annotation)
        for model in _models(annotation):
            fields = _fields(model)
            tags = _tags(model, discriminator) if discriminator else ()
            beside = f" of {discriminator} {' or '.join(map(str, tags))}" if tags else ""
            for name in fields:
                places.setdefault(name, f"{pointer}/{escape(name)}{beside}")
            if len(queue) < MAX_SEARCHED:
                queue += [(f"{pointer}/{escape(name)}", _annotation(field)) for name, field in fields.items()]
    return places


def pointer_of(annotation: Any, path: str) -> str:
    """The pointer of a dotted path of fields, up to the last legal one: `rollout.group_size` -> /rollout/group_size."""
    pointer = ""
    for name in path.split("."):
        legal = [_fields(model)[name] for model in _models(annotation) if name in _fields(model)]
        if not legal:
            break
        pointer += f"/{escape(name)}"
        annotation = legal[0].annotation
    return pointer


def _descend(place: Place, annotation: Any, item: int | str) -> None:
    """Go one level down in the document."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    place.owner = place.field = None
    if _is_model(annotation):
        place.root = place.root or annotation
        place.owner, place.field = annotation, _fields(annotation).get(str(item))
        place.annotation = _annotation(place.field)
    elif origin is dict:
        place.annotation = arguments[1]
    elif origin is tuple and Ellipsis not in arguments and isinstance(item, int) and item < len(arguments):
        place.annotation = arguments[item]
    else:
        place.annotation = arguments[0] if arguments and origin in (list, tuple, set, frozenset) else Any


def _annotation(field: FieldInfo | None) -> Any:
    """A field's annotation, with the discriminator that pydantic removed from it."""
    if field is None:
        return Any
    return Annotated[field.annotation, field] if field.discriminator else field.annotation


def _members(annotation: Any) -> tuple[list[Any], str | None]:
    """The annotation without Annotated and None: one member, or a union's members and its discriminator."""
    discriminator: str | None = None
    while True:
        if hasattr(annotation, "__value__"):  # type X = ...
            annotation = annotation.__value__
        elif get_origin(annotation) is Annotated:
            for extra in annotation.__metadata__:
                discriminator = discriminator or getattr(extra, "discriminator", None)
            annotation = annotation.__origin__
        elif get_origin(annotation) in (Union, UnionType):
            members = [member for member in get_args(annotation) if member is not NoneType]
            if len(members) > 1:
                return members, discriminator
            annotation = members[0]
        else:
            return [annotation], None


def _bare(annotation: Any) -> Any:
    return _members(annotation)[0][0]


def _member(members: list[Any], discriminator: str | None, label: int | str) -> Any:
    """The member of a union that pydantic's tag or label names."""
    words = re.findall(r"\w+", str(label))
    for member in members:
        bare = _bare(member)
        if discriminator is not None:
            fits = label in _tags(bare, discriminator)
        elif get_origin(bare) is Literal:
            fits = words[:1] == ["literal"]
        else:
            fits = getattr(get_origin(bare) or bare, "__name__", None) in words
        if fits:
            return member
    return Any


def _tags(model: Any, discriminator: str) -> tuple[Any, ...]:
    field = _fields(model).get(discriminator) if _is_model(model) else None
    return get_args(field.annotation) if field is not None else ()


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for member in _members(annotation)[0]:
        if _is_model(_bare(member)):
            yield _bare(member)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The legal keys, as callers write them, with their fields."""
    return {field.alias or name: field for name, field in model.model_fields.items()}
