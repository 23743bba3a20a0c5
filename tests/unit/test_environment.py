"""Settings that cannot be used are told by the variable's name, in plain words, before anything starts."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["service", "workers.app"])
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"PORT": "many"}, "RATCHET_PORT: must be an integer, got 'many'"),
        ({"LOG_LEVEL": "LOUD"}, "RATCHET_LOG_LEVEL: must be one of DEBUG, INFO, WARNING, ERROR, got 'LOUD'"),
        ({"LEASE_TTL_S": "1"}, "lease_renew_s < lease_self_stop_s < lease_ttl_s must hold, got "),
    ],
)
def test_settings_that_cannot_be_used_are_told_by_name(module: str, variables: dict[str, str], says: str) -> None:
    environment = {**os.environ, **{f"RATCHET_{name}": value for name, value in variables.items()}}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: the settings cannot be used: ") and says in done.stderr
    assert "Traceback" not in done.stderr and "Value error" not in done.stderr
