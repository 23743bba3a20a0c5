"""Answers that are kept."""

import pytest

from service.edge.remembered import Recent, Remembered


def test_an_answer_is_kept_for_twenty_times_its_cost() -> None:
    now, asked = [0.0], []

    def ask() -> int:
        asked.append(now[0])
        now[0] += 0.5
        return len(asked)

    kept = Remembered[int](clock=lambda: now[0])
    assert [kept.get(ask), kept.get(ask)] == [1, 1]
    now[0] = 10.4
    assert kept.get(ask) == 1
    now[0] = 10.5
    assert kept.get(ask) == 2 and asked == [0.0, 10.5]


def test_a_question_that_failed_is_asked_again() -> None:
    kept = Remembered[int]()
    with pytest.raises(ZeroDivisionError):
        kept.get(lambda: 1 // 0)
    assert kept.get(lambda: 7) == 7


def test_what_was_seen_a_moment_ago_is_kept_for_its_time_and_the_newest_alone():
    now = [0.0]
    recent = Recent[str, int](most=2, for_s=5.0, clock=lambda: now[0])
    for number, key in enumerate("abc"):
        recent.put(key, number)
    assert [recent.get(key) for key in "abc"] == [None, 1, 2]
    now[0] = 4.0
    recent.put("b", 9)
    now[0] = 6.0
    assert [recent.get(key) for key in "bc"] == [9, None]
