"""The figures that other libraries gave for the same inputs, in float64."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)


def tensor(values: Any) -> Tensor:
    """Numbers as float64; non-finite ones are strings in the files."""

    def number(value: Any) -> Any:
        return [number(entry) for entry in value] if isinstance(value, list) else float(value)

    return torch.tensor(number(values), dtype=torch.float64)


@cache
def load(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())


@cache
def case(name: str) -> dict[str, Tensor]:
    """One input case: log_probs, ... , response_mask, advantages, entropy [B, T], group_index [B]."""
    raw = load("inputs")["cases"][name]
    skipped = ("description", "advantages_per_sequence")
    return {key: tensor(value) for key, value in raw.items() if key not in skipped}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    return load


@pytest.fixture(scope="session")
def cases() -> Callable[[str], dict[str, Tensor]]:
    return case


@pytest.fixture(scope="session")
def as_tensor() -> Callable[[Any], Tensor]:
    return tensor
