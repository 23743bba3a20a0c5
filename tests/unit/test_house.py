"""docs/house.md names every room, so that a newcomer finds what is there and nothing that is gone."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "house.md").read_text()
SERVICE, rest = TEXT.split("### `workers/`")
WORKERS = rest.partition("## Where a new thing goes")[0]
UNTOLD = {"__init__.py", "__main__.py", "openapi.py"}  # entries, no rooms


def rooms(part: str) -> set[str]:
    """The names in the first column of the table."""
    cells = re.findall(r"^\| (`[^|]+) \|", part, re.MULTILINE)
    return {name.rstrip("/") for cell in cells for name in re.findall(r"`([\w./]+)`", cell)}


@pytest.mark.parametrize(
    ("package", "part"), [("service", SERVICE), ("workers", WORKERS.split("## Where a new thing goes")[0])]
)
def test_every_room_has_a_line_and_every_line_a_room(package: str, part: str) -> None:
    there = {
        path.name
        for path in (ROOT / package).iterdir()
        if (path.is_dir() and (path / "__init__.py").is_file()) or (path.suffix == ".py" and path.name not in UNTOLD)
    }
    assert rooms(part) == there


def test_the_files_that_it_sends_people_to_are_there() -> None:
    folders = [ROOT, ROOT / "service", ROOT / "workers"]
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)", TEXT))
    assert named and {name for name in named if not any((folder / name).is_file() for folder in folders)} == set()


def test_the_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    unlinked = [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f"(docs/{page.name})" not in readme]
    assert unlinked == []
