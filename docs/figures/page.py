"""The parts of docs/objectives.md that are made from code, so that they cannot go stale.

python docs/figures/page.py          # writes them anew, between their marks
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import computed
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from service.spec import axes
from service.spec.objective import ObjectiveSpec
from service.spec.presets import BASE, PRESETS
from service.spec.section import Section
from service.validation import field_errors

PAGE = Path(__file__).parents[1] / "objectives.md"
BLOCK = re.compile(r"(<!-- (\w+): written by docs/figures/page.py -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)

# ---------------------------------------------------------------- presets


def presets() -> str:
    rows = ["| preset | in words | sets | paper |", "|---|---|---|---|"]
    for name, preset in PRESETS.items():
        sets = "<br>".join(f"`{axis}: {flow(written(axis, value))}`" for axis, value in preset.axes.items())
        paper = "" if preset.arxiv is None else f"[{preset.arxiv}](https://arxiv.org/abs/{preset.arxiv})"
        rows.append(f"| `{name}` | {preset.summary} | {sets or 'nothing'} | {paper} |")
    return "\n".join(rows)


def base() -> str:
    lines = [f"{axis}: {flow(written(axis, value))}" for axis, value in BASE.items() if value]
    return "\n".join(["```yaml", *lines, "```"])


def written(axis: str, value: Any) -> Any:
    """As a caller would write it: a kind alone where there is nothing beside it, and no parameters that are off."""
    if not isinstance(value, Mapping):
        return value
    set_ones = {name: one for name, one in value.items() if one is not None}
    return next(iter(set_ones.values())) if list(set_ones) in (["kind"], ["place"], ["action"]) else set_ones


def flow(value: Any) -> str:
    """YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {flow(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- parameters

ELSEWHERE: dict[str, tuple[type[Section], ...]] = {
    "ratio": get_args(axes.AnyRatio),
    "aggregate": get_args(axes.AnyAggregate),
    "advantage": (axes.Advantage,),
    "kl": (axes.Kl,),
    "correct": (axes.Correct,),
    "select": (axes.Select,),
}


def surrogates() -> str:
    """Every surrogate with its formula and its parameters."""
    rows = ["| surrogate | loss of a token | parameters |", "|---|---|---|"]
    for model in get_args(axes.AnySurrogate):
        kinds = " · ".join(f"`{kind}`" for kind in get_args(model.model_fields["kind"].annotation))
        parameters = [f"`{name}` {default(field)}" for name, field in model.model_fields.items() if name != "kind"]
        rows.append(f"| {kinds} | {' '.join(model.__doc__.split())} | {', '.join(parameters)} |")
    return "\n".join(rows)


def parameters() -> str:
    """Those of the other axes that are not a choice among names."""
    rows = ["| parameter | default | |", "|---|---|---|"]
    for axis, models in ELSEWHERE.items():
        found: dict[str, FieldInfo] = {}
        for model in models:
            found = model.model_fields | found  # the first that has it describes it
        rows += [
            f"| `{axis}.{name}` | {default(field)} | {field.description} |"
            for name, field in found.items()
            if get_origin(field.annotation) is not Literal
        ]
    return "\n".join(rows)


def default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, tuple):
        return flow(list(value))
    return json.dumps(value) if value is None or isinstance(value, bool) else f"{value:g}"


# ---------------------------------------------------------------- guards

REFUSED: list[dict[str, Any]] = [
    {"surrogate": {"clip_high": 1.2}},
    {"surrogate": {"kind": "cispo", "weight_min": 6.0}},
    {"ratio": "one"},
    {"preset": "gpso"},
]
WARNED: list[dict[str, Any]] = [
    {"preset": "gspo", "surrogate": {"clip_low": 0.2, "clip_high": 0.2}},
    {"preset": "gspo", "aggregate": "token"},
    {"ratio": "product"},
    {"anchor": "rollout", "correct": "truncate"},
]


def refused() -> str:
    rows = ["| objective | is refused, because |", "|---|---|"]
    for sent in REFUSED:
        try:
            ObjectiveSpec.model_validate(sent)
        except ValidationError as error:
            said = field_errors(ObjectiveSpec, error.errors())[0].detail
            said = re.sub(r"(one of \w+, \w+, ).*, got", r"\1..., got", said)  # the presets are listed above
            rows.append(f"| `{json.dumps(sent)}` | {said} |")
    return "\n".join(rows)


def warned() -> str:
    rows = ["| objective | warning |", "|---|---|"]
    rows += [f"| `{json.dumps(sent)}` | {ObjectiveSpec.model_validate(sent).warnings()[0]} |" for sent in WARNED]
    said = ObjectiveSpec.model_validate("grpo").warnings(updates_per_rollout=1)[0]
    return "\n".join([*rows, f"| any, in a job with one update per rollout | {said} |"])


BLOCKS = {
    "presets": presets,
    "base": base,
    "surrogates": surrogates,
    "parameters": parameters,
    "refused": refused,
    "warned": warned,
    "example": computed.example,
    "aggregates": computed.aggregates,
    "spread": computed.spread,
    "independence": computed.independence,
    "shares": computed.shares,
    "measured": computed.measured,
}


def filled(page: str) -> str:
    return BLOCK.sub(lambda block: block[1] + BLOCKS[block[2]]() + block[3], page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
