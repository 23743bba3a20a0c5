"""Settings that cannot be used are told by the variable's name, in plain words, before anything starts."""

import os
from pathlib import Path

import pytest

from chaos.rig import Zygote


@pytest.mark.parametrize("module", ["service", "workers.app"])
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"PORT": "many"}, "RATCHET_PORT: must be an integer, got 'many'"),
        ({"LOG_LEVEL": "LOUD"}, "RATCHET_LOG_LEVEL: must be one of DEBUG, INFO, WARNING, ERROR, got 'LOUD'"),
        ({"LEASE_TTL_S": "1"}, "lease_renew_s < lease_self_stop_s < lease_ttl_s must hold, got "),
    ],
)
def test_settings_that_cannot_be_used_are_told_by_name(
    module: str, variables: dict[str, str], says: str, zygote: Zygote, tmp_path: Path
) -> None:
    environment = {**os.environ, **{f"RATCHET_{name}": value for name, value in variables.items()}}
    assert zygote.child([module], environment, tmp_path / "log").wait() == 1
    said = (tmp_path / "log").read_text()
    assert said.startswith("error: the settings cannot be used: ") and says in said
    assert "Traceback" not in said and "Value error" not in said
