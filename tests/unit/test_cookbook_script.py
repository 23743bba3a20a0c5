"""The cookbook's script touches nothing that it did not make."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "cookbook" / "recipes.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_a_folder_of_somebody_else_is_refused(script: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine" / "Qwen").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is not empty"):
        script["claim"](tmp_path / "mine")
    (tmp_path / "new" / ".ratchet").mkdir(parents=True)  # `ratchet up` was started in it
    script["claim"](tmp_path / "new")
    (tmp_path / "new" / "cache").mkdir()
    script["claim"](tmp_path / "new")


def test_a_model_is_a_link_and_a_run_without_one_has_the_small_one_again(script: dict[str, Any], tmp_path: Path) -> None:
    work, place = tmp_path / "work", script["place_model"]
    for folder in (tmp_path / "given", work / "small" / "Qwen" / "a", work / "Qwen" / "real"):
        folder.mkdir(parents=True)
    place(work, "Qwen/a", 0, tmp_path / "given")
    assert (work / "Qwen" / "a").resolve() == tmp_path / "given"
    place(work, "Qwen/a", 0, None)
    assert (work / "Qwen" / "a").resolve() == work / "small" / "Qwen" / "a"
    with pytest.raises(SystemExit, match="--model"):
        place(work, "Qwen/real", 0, tmp_path / "given")
    assert (work / "Qwen" / "real").is_dir() and not (work / "Qwen" / "real").is_symlink()


def test_an_unknown_recipe_is_said_with_the_known_ones(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes.py", str(tmp_path / "work"), "maths"])
    with pytest.raises(SystemExit):
        script["main"]()
    said = capsys.readouterr().err
    assert "no recipe maths" in said and "math_rl-async" in said and not (tmp_path / "work").exists()
