"""What the main thread asks of the heartbeat: to write while the store comes and goes."""

from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from service.doorbell import Doorbell
from service.errors import LeaseLost
from service.jobs.lease import Lease
from service.settings import Settings
from service.store.session import Store
from workers import heartbeat as module
from workers.heartbeat import Heartbeat
from workers.log_tail import LogTail

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
AWAY = OperationalError("COMMIT", {}, Exception("the server closed the connection"))


@pytest.fixture
def heartbeat(store: Store, settings: Settings, doorbell: Doorbell, monkeypatch: pytest.MonkeyPatch) -> Heartbeat:
    monkeypatch.setattr(module, "AGAIN_S", 0.0)
    return Heartbeat(store, settings, doorbell, Lease("job_1", 1, "w"), stall_timeout_s=60, tail=LogTail(settings))


def failing(*errors: Exception) -> Any:
    left = list(errors)

    def write() -> str:
        if left:
            raise left.pop(0)
        return "written"

    return write


def test_a_write_is_tried_until_the_store_is_back(heartbeat: Heartbeat) -> None:
    assert heartbeat.patiently(failing(AWAY, AWAY)) == "written"


def test_it_is_given_up_when_the_lease_may_be_anothers(heartbeat: Heartbeat) -> None:
    heartbeat._lose("could not renew for 45 s")
    with pytest.raises(LeaseLost, match="could not renew"):
        heartbeat.patiently(failing(AWAY))


def test_other_errors_are_not_for_waiting(heartbeat: Heartbeat) -> None:
    with pytest.raises(ValueError, match="no"):
        heartbeat.patiently(failing(ValueError("no")))
