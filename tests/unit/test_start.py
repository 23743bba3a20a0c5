"""What is said before anything starts: a variable that sets nothing, a GPU that is not there."""

import logging

import pytest

from service import devices
from service.devices import missing_gpu
from service.local.place import CannotStart
from service.local.worker import check_worker_can_run
from service.settings import Settings
from service.telemetry import warn_of_unknown_variables


def test_a_misspelt_variable_is_named_with_the_one_that_was_meant(caplog: pytest.LogCaptureFixture) -> None:
    known = {"RATCHET_PORT": "1", "RATCHET_URL": "u", "RATCHET_TEST_REDIS_URL": "u", "PATH": "/bin", "RATCHET_WORKER_ID": "w"}
    with caplog.at_level(logging.WARNING):
        warn_of_unknown_variables({**known, "RATCHET_DEVISE": "tml-a-secret-value", "RATCHET_ZZZZ": "1"})
    assert [record.getMessage() for record in caplog.records] == [
        "RATCHET_DEVISE sets nothing; did you mean RATCHET_DEVICE?",
        "RATCHET_ZZZZ sets nothing",
    ]


def test_a_gpu_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "GPU_NODES", ("/nonexistent/nvidiactl",))
    assert missing_gpu("auto") is None and missing_gpu("cpu") is None
    with pytest.raises(CannotStart, match=r"RATCHET_DEVICE is cuda.*no GPU.*set it to cpu or auto"):
        check_worker_can_run(Settings(device="cuda"))
    monkeypatch.setattr(devices, "GPU_NODES", ("/dev/null",))
    assert missing_gpu("cuda") is None
