"""YAML as specs are written in it: YAML 1.2's core schema, where PyYAML reads 1.1."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

EXPONENT = "[eE][-+]?[0-9]+"


class DuplicateKey(yaml.constructor.ConstructorError):
    """A key stands twice in one mapping."""


class CoreLoader(yaml.CSafeLoader):
    """`1e-5` is a number; dates, `no` and `12:30` are strings. Keys are strings, and each stands once (DuplicateKey)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML reads it from the class; filled below)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key must be a string: put it in quotes", key.start_mark)
            if key.value in seen:
                raise DuplicateKey(None, None, f"the key {key.value!r} stands twice in one mapping", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def events(text: str | bytes) -> Iterator[Any]:
    """What PyYAML reads, before any value is built. Aliases, by which a line can expand to gigabytes, and tags are refused."""
    for event in yaml.parse(text, Loader=CoreLoader):
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases (*{event.anchor}) are not taken; write the value out"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        if getattr(event, "tag", None) is not None:
            problem = f"tags ({event.tag}) are not taken; only JSON's values are"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        yield event


def load(text: str | bytes) -> Any:
    """The value of a document. Raises yaml.YAMLError."""
    for _ in events(text):
        pass
    return yaml.load(text, Loader=CoreLoader)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", rf"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)({EXPONENT})?|[-+]?[0-9]+{EXPONENT}", list("-+0123456789.")),
    ("float", r"[-+]?\.(inf|Inf)|\.(nan|NaN)", list("-+.")),
):
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
