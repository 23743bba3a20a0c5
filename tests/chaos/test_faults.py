"""Every fault of the table, and what the oracle says (make chaos). RATCHET_CHAOS_TIMES brings each more than once."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from chaos.faults import FAULTS, Fault, bring
from chaos.rig import Rig

TIMES = int(os.environ.get("RATCHET_CHAOS_TIMES", "1"))


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("time", range(TIMES))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_nothing_is_lost_and_nothing_counted_twice(
    fault: Fault, time: int, rigs: Callable[..., Rig], undisturbed: Any, record_property: Callable[[str, object], None]
) -> None:
    record_property("fault", fault.name)
    record_property("bound_s", fault.bound_s)
    verdict = bring(fault, rigs, undisturbed)
    record_property("recovered_s", verdict.recovered_s)
    assert verdict.problems == []
