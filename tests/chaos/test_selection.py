"""Some faults of the table, for every run of the tests; all of them: make chaos."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from chaos.faults import Fault, bring, broken_checkpoint, flip_a_byte, kill_child_at, zombie
from chaos.rig import Rig, rl_spec

SPEC = rl_spec(16)
SELECTION = [
    Fault("kill -9 of the child", partial(kill_child_at, point="between rename and row", spec=SPEC), 60),
    Fault("zombie", partial(zombie, point="mid update", at_pass=9, spec=SPEC), 60),
    Fault("one byte flipped", partial(broken_checkpoint, break_=flip_a_byte, spec=SPEC, step=6), 60),
]


@pytest.mark.timeout(900)
def test_a_kill_a_zombie_and_a_flipped_byte_change_nothing(rigs: Callable[..., Rig], undisturbed: Any) -> None:
    """One test, so that what takes long, a torch loaded and an undisturbed run, is there for all three."""
    assert {fault.name: bring(fault, rigs, undisturbed).problems for fault in SELECTION} == {
        fault.name: [] for fault in SELECTION
    }
