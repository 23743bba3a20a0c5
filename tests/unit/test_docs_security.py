"""docs/security.md: its table of bounds is the code's."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
ROWS = re.findall(r"^\| [^|]+ \| `([\w.]+)` \| ([^|]+) \| [^|]+ \|$", TEXT, re.MULTILINE)
BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def told(text: str) -> Any:
    """The number that a cell gives, in bytes, seconds or pieces; of two numbers both."""
    if " and " in text:
        return [told(part) for part in text.split(" and ")]
    number, _, unit = text.partition(" ")
    return float(number.replace(",", "")) * BYTES.get(unit, 1)


def set_by(name: str) -> Any:
    if name.startswith("RATCHET_"):
        return Settings.model_fields[name.removeprefix("RATCHET_").lower()].default
    module, _, constant = name.rpartition(".")
    value = getattr(import_module(module), constant)
    return [value["per_key"], value["in_all"]] if isinstance(value, dict) else value


@pytest.mark.parametrize(("name", "default"), ROWS)
def test_each_bound_has_the_default_that_is_told(name: str, default: str) -> None:
    assert told(default) == set_by(name)


def test_no_bound_that_can_be_set_is_missing() -> None:
    bounds = {f"RATCHET_{name.upper()}" for name in Settings.model_fields if name.startswith(("max_", "key_"))}
    assert len(bounds) == 10 and bounds <= {name for name, _ in ROWS}


def test_every_row_of_the_table_was_read() -> None:
    table = TEXT.split("| bound | set by |")[1].split("\n\n")[0]
    assert len(ROWS) == table.count("\n| ") == len({name for name, _ in ROWS})
