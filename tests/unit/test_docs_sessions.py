"""docs/sessions.md: its losses are the code's, and its operations the client's."""

import re
from pathlib import Path

from ratchet_client import Session
from ratchet_client.session import Submit
from workers.objectives.sums import HIGH, LOSSES, LOW

TEXT = (Path(__file__).parents[2] / "docs" / "sessions.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| -([^|]+) \|([^|]*)\|([^|]*)\|$", TEXT, re.MULTILINE)


def test_every_loss_has_a_row_and_every_row_a_loss() -> None:
    assert [name for name, *_ in ROWS] == list(LOSSES)


def test_the_bounds_that_are_told_are_the_defaults() -> None:
    for name, _, _, config in ROWS:
        bounds = [LOSSES[name].config[bound] for bound in (LOW, HIGH) if bound in LOSSES[name].config]
        assert [float(number) for number in re.findall(r"\d[\d.]*", config)] == bounds, name


def test_every_operation_of_the_client_has_a_row() -> None:
    table = TEXT.split("## Operations")[1].split("\n\n")[1]
    told = set(re.findall(r"`(\w+)\(", table))
    offered = {name for name in vars(Submit) if not name.startswith("_")}
    assert told == offered and all(hasattr(Session, name) for name in offered)
