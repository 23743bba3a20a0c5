"""What clients of the Tinker wire are told of base models."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from service.settings import Settings
from service.tinker.base_models import tiny_tokenizer


def test_two_who_ask_for_the_built_in_tokenizer_at_once_both_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, both = Path.write_text, Barrier(2)

    def write(self: Path, data: str) -> int:
        count = plain(self, data)
        both.wait(10)  # neither has put its file in place
        return count

    monkeypatch.setattr(Path, "write_text", write)
    settings = Settings(environment="development", data_dir=tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(tiny_tokenizer, [settings, settings])
    assert first == second
    assert sorted(path.name for path in first.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
