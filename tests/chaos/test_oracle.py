"""The oracle can fail: without the product's guards the same faults do damage, and it says so."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chaos.faults import LONG, LOOP, Fault, bring, broken_checkpoint, kill_child_of_session, zombie
from chaos.oracle import examine, left_behind
from chaos.points import DIGESTS, FENCING, REPLAY
from chaos.rig import Rig

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


def test_it_finds_nothing_where_nothing_happened(rigs: Callable[..., Rig], undisturbed: Any) -> None:
    rig = rigs()
    rig.start_worker()
    job_id = rig.submit(LONG)
    rig.finished(job_id)
    assert examine(rig, job_id, undisturbed(LONG)) == []
    assert left_behind(rig) == []


def test_without_fencing_a_zombie_does_damage(rigs: Callable[..., Rig], undisturbed: Any) -> None:
    fault = Fault("", partial(zombie, point="mid update", at_pass=13), 30, environment={FENCING: "off"})
    problems = bring(fault, rigs, undisturbed).problems
    assert {problem[0] for problem in problems} >= {"3", "5"}, problems


def test_without_its_log_a_session_loses_what_it_did_since_its_snapshot(rigs: Callable[..., Rig], undisturbed: Any) -> None:
    fault = Fault("", partial(kill_child_of_session, point="after an answer", spec=LOOP), 30, environment={REPLAY: "off"})
    problems = bring(fault, rigs, undisturbed).problems
    assert {problem[0] for problem in problems} >= {"1", "2"}, problems


def test_without_digests_a_torn_checkpoint_is_believed(rigs: Callable[..., Rig], undisturbed: Any) -> None:
    def zero_the_end(folder: Path) -> None:
        """As a file system may after a power cut: the length is right, the last pages were never written."""
        file = next(folder.rglob("model.safetensors"))
        content = bytearray(file.read_bytes())
        content[-8192:] = bytes(8192)
        file.write_bytes(content)

    fault = Fault("", partial(broken_checkpoint, break_=zero_the_end), 30)
    assert bring(fault, rigs, undisturbed).problems == []
    unguarded = Fault("", partial(broken_checkpoint, break_=zero_the_end), 30, environment={DIGESTS: "off"})
    problems = bring(unguarded, rigs, undisturbed).problems
    assert {problem[0] for problem in problems} >= {"1", "2"}, problems
