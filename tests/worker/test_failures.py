"""What an exception in the training process means for the job: whose fault it is, and whether it is tried again."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from service.errors import InvalidRequest, JobFailed
from service.store.session import make_engine
from workers.tenure.failures import failure_of


def test_a_database_that_is_away_is_tried_again() -> None:
    engine = make_engine("postgresql+psycopg://postgres@127.0.0.1:1/nowhere")
    with pytest.raises(OperationalError) as caught, engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    failure = failure_of(caught.value)
    assert (failure.code, failure.category, failure.retryable) == ("store_unavailable", "infra", True)
    assert "127.0.0.1" not in failure.detail


def test_a_full_disk_is_tried_again() -> None:
    failure = failure_of(OSError(28, "No space left on device"))
    assert (failure.code, failure.category, failure.retryable) == ("io_error", "infra", True)
    assert "No space left" in failure.detail


def test_what_the_caller_asked_for_is_not_tried_again() -> None:
    for error in (
        JobFailed("grader_unhealthy", "down"),
        InvalidRequest("no such task", code="unknown_task"),
        MemoryError("big"),
    ):
        failure = failure_of(error)
        assert (failure.category, failure.retryable) == ("user", False)


def test_our_own_fault_is_named_without_its_text() -> None:
    failure = failure_of(ValueError("secret of the process"))
    assert (failure.code, failure.category, failure.retryable) == ("internal_error", "internal", False)
    assert "secret" not in failure.detail
