"""`python -m service.spec` prints docs/spec.md: every field of a job spec, from the models themselves."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from service.spec.job import JobSpec

HEAD = """# The job spec: every field

Printed from the models (`make reference`); unknown keys are refused. A field without a default must be given. `ratchet validate
job.yaml` shows a spec with every default filled in.
"""
REF = "#/$defs/"
TAGS = ("kind", "source")  # they tell which member of a union a section is
# Bounds of a value, of a text's characters, of an array's items.
BOUNDS = (("minimum", "maximum", ""), ("minLength", "maxLength", " characters"), ("minItems", "maxItems", " of them"))
Schema = dict[str, Any]


def main() -> None:
    schema = TypeAdapter(JobSpec).json_schema(by_alias=True)
    sections = schema["$defs"]
    print(HEAD)
    written = set[str]()
    for kind, reference in sorted(schema["discriminator"]["mapping"].items()):
        name = reference.removeprefix(REF)
        print(f"## `kind: {kind}`\n\n{described(sections[name])}\n")
        print("\n".join(table(sections[name], sections)) + "\n")
        for pointer, section in below(sections[name], sections):
            if section not in written:
                written.add(section)
                print(f"### {heading(pointer, sections[section])}\n\n{described(sections[section])}\n")
                print("\n".join(table(sections[section], sections)) + "\n")


def described(section: Schema) -> str:
    return section.get("description", "").replace("\n", " ")


def heading(pointer: str, section: Schema) -> str:
    """The section's place, and in a union which member it is."""
    tags = [(name, section["properties"].get(name, {}).get("const")) for name in TAGS]
    return f"`{pointer}`" + "".join(f", `{name}: {value}`" for name, value in tags if value)


def table(section: Schema, sections: Schema) -> Iterator[str]:
    yield "| field | what may stand there | default | |"
    yield "|---|---|---|---|"
    for name, field in section["properties"].items():
        words = (kinds(field, sections), default_of(name, field, section), field.get("description", ""))
        yield f"| `{name}` | {' | '.join(map(cell, words))} |"


def default_of(name: str, field: Schema, section: Schema) -> str:
    if name in section.get("required", ()):
        return ""
    if "default" not in field:
        return "empty"
    return "its own defaults" if isinstance(field["default"], dict) else f"`{compact(field['default'])}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def kinds(field: Schema, sections: Schema) -> str:
    """The types of a field, in words."""
    if "$ref" in field:
        return "object"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{compact(value).strip(chr(34))}`" for value in field["enum"])
    for union in ("anyOf", "oneOf"):
        if union in field:
            return " or ".join(dict.fromkeys(kinds(member, sections) for member in field[union]))
    kind = field.get("type", "any JSON value")
    if kind == "array" and "items" in field:
        kind = f"array of {kinds(field['items'], sections)}"
    return ", ".join([kind, *bounds(field)])


def bounds(field: Schema) -> Iterator[str]:
    for least, most, of_what in BOUNDS:
        low, high = field.get(least), field.get(most)
        if low is not None and high is not None:
            yield f"{low} to {high}{of_what}"
        elif low is not None or high is not None:
            yield f"{'at most' if low is None else 'at least'} {high if low is None else low}{of_what}"
    if "exclusiveMinimum" in field:
        yield f"above {field['exclusiveMinimum']}"
    if "exclusiveMaximum" in field:
        yield f"below {field['exclusiveMaximum']}"
    if "pattern" in field:
        yield f"matches `{field['pattern']}`"


def below(section: Schema, sections: Schema, pointer: str = "") -> Iterator[tuple[str, str]]:
    """Every section below this one, with its dotted path."""
    for name, field in section["properties"].items():
        for reference in references(field):
            place = f"{pointer}.{name}".strip(".")
            yield place, reference
            yield from below(sections[reference], sections, place)


def references(field: Any) -> Iterator[str]:
    if isinstance(field, dict):
        if "$ref" in field:
            yield field["$ref"].removeprefix(REF)
        for name, value in field.items():
            if name not in ("default", "discriminator"):
                yield from references(value)
    elif isinstance(field, list):
        for value in field:
            yield from references(value)


if __name__ == "__main__":
    main()
