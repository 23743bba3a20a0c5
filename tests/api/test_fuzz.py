"""schemathesis over the whole API: no 500, no status that is not documented, every answer fits its schema, every method that
is not offered is a 405, no route works without its key. For `make fuzz`, which goes on for RATCHET_TEST_FUZZ_S."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

KEY = "tml-" + "aB3dE6gH9kL2nP5rS8uV1xY4zA7cF0iJ3mO6qT9wX2Z"
FOR_S = int(os.environ.get("RATCHET_TEST_FUZZ_S", "0"))
# What a schema allows may still be refused: a cursor that is no object's id, a spec whose sections do not fit each other.
LEFT_OUT = "positive_data_acceptance"
CONFIG = f"""
[auth.openapi.bearer]
bearer = "{KEY}"
[auth.openapi.x-api-key]
api_key = "{KEY}"
"""


@pytest.mark.skipif(not FOR_S, reason="make fuzz")
@pytest.mark.timeout(FOR_S + 120)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_nothing_that_is_sent_brings_what_is_not_documented(serve, settings, tmp_path: Path) -> None:
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert program is not None, "pip install -e '.[dev]'"
    known = settings.model_copy(update={"bootstrap_key": SecretStr(KEY), "key_requests_per_s": 0})
    with serve(known) as api:
        document = api.app.openapi()
        for parameter in document["paths"]["/v1/jobs/{job_id}"]["get"]["parameters"]:
            if parameter["name"] == "wait_s":
                parameter["schema"]["maximum"] = 0.1  # of the sixty seconds of a long poll nothing is to be learnt
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        (tmp_path / "schemathesis.toml").write_text(CONFIG)
        options = ["--checks", "all", "--exclude-checks", LEFT_OUT, "--max-time", str(FOR_S), "--request-timeout", "30"]
        phases = ["--phases", "coverage,fuzzing,stateful" if FOR_S > 60 else "coverage", "--no-color", "--no-shrink"]
        # Specs of jobs have so large a schema that making some takes longer than all the rest.
        slow = [] if FOR_S > 60 else ["--exclude-operation-id", "create_job", "--exclude-operation-id", "validate_job"]
        settled = ["--continue-on-failure", "--generation-database", "none", "-n", "100000" if FOR_S > 60 else "20"]
        ran = subprocess.run(
            [program, "run", "openapi.json", "--url", api.url, *options, *phases, *slow, *settled],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert "Failures:" not in ran.stdout and "Errors:" not in ran.stdout, ran.stdout[-15_000:]
    generated = ran.stdout.rpartition(" generated")[0].rpartition(" ")[2]
    assert generated.isdecimal() and int(generated) > 20, ran.stdout[-3000:] + ran.stderr[-3000:]
