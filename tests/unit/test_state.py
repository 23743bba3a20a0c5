import pytest

from service.states import ACTIONS, FINAL, HELD, MOVES, Status, allowed_actions, is_legal
from service.store import jobs

S = Status


def test_every_status_is_reachable_and_every_way_can_end() -> None:
    assert set(MOVES) == set(Status)
    reached = {S.VALIDATING}
    while new := {target for source in reached for target in MOVES[source]} - reached:
        reached |= new
    assert reached == set(Status)
    ending = set(FINAL)
    while new := {source for source in MOVES if MOVES[source] & ending} - ending:
        ending |= new
    assert ending == set(Status)


def test_final_statuses_are_the_three_that_lead_nowhere() -> None:
    assert {S.SUCCEEDED, S.FAILED, S.CANCELLED} == FINAL


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (S.QUEUED, S.SUCCEEDED),
        (S.RUNNING, S.CANCELLED),
        (S.RUNNING, S.PAUSED),
        (S.PAUSED, S.RUNNING),
        (S.CANCELLING, S.FAILED),
        (S.FAILED, S.QUEUED),
        (S.QUEUED, S.QUEUED),
    ],
)
def test_moves_that_are_not_in_the_table_are_illegal(source: Status, target: Status) -> None:
    assert not is_legal(source, target)


def test_what_people_may_ask_for_is_always_a_legal_move() -> None:
    for moves in ACTIONS.values():
        for source, target in moves.items():
            assert is_legal(source, target)


@pytest.mark.parametrize(
    ("status", "allowed"),
    [
        (S.QUEUED, ["pause", "cancel", "fork"]),
        (S.RUNNING, ["pause", "cancel", "fork"]),
        (S.PAUSING, ["cancel", "fork"]),
        (S.PAUSED, ["resume", "cancel", "fork"]),
        (S.CANCELLING, ["fork"]),
        (S.SUCCEEDED, ["fork", "delete"]),
    ],
)
def test_allowed_actions(status: Status, allowed: list[str]) -> None:
    assert allowed_actions(status) == allowed


def test_the_store_knows_the_same_statuses() -> None:
    """The query modules stand below the table of states and spell these out again."""
    assert set(jobs.FINAL) == FINAL
    assert set(jobs.HELD) == HELD
