"""schemathesis over the whole API: no 500, no status that is not documented, every answer fits its schema, every method that
is not offered is a 405, no route works without its key, what a schema forbids is refused.

In the suite: the cases that schemathesis derives from the document (its coverage phase), the same ones in every run. For
RATCHET_TEST_FUZZ_S seconds (`make fuzz`): random ones too, other ones in every run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from chaos.standin import sampler, worker

KEY = "tml-" + "aB3dE6gH9kL2nP5rS8uV1xY4zA7cF0iJ3mO6qT9wX2Z"
FOR_S = int(os.environ.get("RATCHET_TEST_FUZZ_S", "0"))
LOSS_CASES = 6000  # of each of the two operations
# What a schema allows may still be refused: a cursor that is no object's id, a spec whose sections do not fit each other.
LEFT_OUT = "positive_data_acceptance"
# A job's spec has so large a schema that its cases take longer than those of everything else.
SPECS = ["create_job", "validate_job"]
SESSIONS = ["create_session", "append_operations", "list_operations", "read_operation"]
COMPLETIONS = ["create_completion", "create_chat_completion"]
REFUSED = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]  # 413: what is too long
CONFIG = f"""
[auth.openapi.bearer]
bearer = "{KEY}"
[auth.openapi.x-api-key]
api_key = "{KEY}"
{"" if FOR_S else "[phases.coverage]"}
{"" if FOR_S else 'unexpected-methods = ["TRACE"]  # the others: test_schema.py'}
[checks.negative_data_rejection]
expected-statuses = [{", ".join(f'"{status}"' for status in REFUSED)}]
"""
SAME = ["--seed", "1", "--generation-deterministic"]
Fuzz = Callable[..., int]


@pytest.fixture
def fuzz(serve, settings, tmp_path: Path) -> Iterator[Fuzz]:
    """Runs schemathesis with these options. Answers how many cases it tried; what it complains of is an AssertionError."""
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert program is not None, "pip install -e '.[dev]'"
    known = settings.model_copy(update={"bootstrap_key": SecretStr(KEY), "key_requests_per_s": 0})
    with serve(known) as api, worker(known), sampler(known):
        document = api.app.openapi()
        for parameter in document["paths"]["/v1/jobs/{job_id}"]["get"]["parameters"]:
            if parameter["name"] == "wait_s":
                parameter["schema"]["maximum"] = 0.1  # of the sixty seconds of a long poll nothing is to be learnt
        if not FOR_S:
            leave_out_what_is_tried_elsewhere(document)
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        (tmp_path / "schemathesis.toml").write_text(CONFIG)

        def run(*options: str) -> int:
            checks = ["--checks", "all", "--exclude-checks", LEFT_OUT, "--continue-on-failure", "--request-timeout", "30"]
            quiet = ["--no-color", "--no-shrink"]
            ran = subprocess.run(
                [program, "run", "openapi.json", "--url", api.url, *checks, *quiet, *options],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            print(ran.stdout[-3000:])
            said = "\n".join(line[:500] for line in ran.stdout.splitlines())  # a body may be long
            assert "Failures:" not in said and "Errors:" not in said, said[-15_000:]
            found = re.search(r"(\d+) generated", ran.stdout)
            assert found is not None, ran.stdout[-3000:] + ran.stderr[-3000:]
            return int(found[1])

        yield run


def leave_out_what_is_tried_elsewhere(document: dict[str, Any]) -> None:
    """Thousands of cases: bodies in YAML, which becomes what JSON would have been before anything else is done (one operation
    keeps them); lists of operations, each of which is tried alone and read by the same code; and what other requests hold."""
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if path != "/v1/budget":
                operation.get("requestBody", {"content": {}})["content"].pop("application/yaml", None)
    schemas = document["components"]["schemas"]
    once = {
        "Forward": {"objective": {"preset": "gspo"}},
        "Operations": {"operations": [{"seq": 1, "kind": "optim_step"}]},
        "TrainStep": {
            "objective": {"preset": "gspo"},
            "optimizer": {"learning_rate": 0.01},
            "groups": [{"prompt_tokens": [5], "answers": [{"tokens": [6], "log_probs": [-1.0], "reward": 1.0}]}],
        },
        "Eval": {"sampling": {}},
        "SessionSpec": {"model": {"source": "tiny"}, "resources": {}},
    }
    for name, fields in once.items():
        for field, value in fields.items():
            schemas[name]["properties"][field] = {"const": value}
    schemas["Eval"]["properties"]["graders"]["items"] = {"$ref": "#/components/schemas/ExactGrader"}


def operations(option: str, names: list[str]) -> list[str]:
    return [word for name in names for word in (f"--{option}-operation-id", name)]


@pytest.mark.timeout(600)  # thousands of requests
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_every_case_of_the_document_is_answered_as_documented(fuzz: Fuzz) -> None:
    assert fuzz("--phases", "coverage", *SAME, *operations("exclude", SPECS + SESSIONS + COMPLETIONS)) > 1000


@pytest.mark.timeout(600)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("names", [SESSIONS, COMPLETIONS], ids=["sessions", "completions"])
def test_every_case_for_sessions_and_samplers_is_answered_as_documented(fuzz: Fuzz, names: list[str]) -> None:
    assert fuzz("--phases", "coverage", *SAME, *operations("include", names)) > 100


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_is_not_documented_is_noticed(fuzz: Fuzz, tmp_path: Path) -> None:
    document = json.loads((tmp_path / "openapi.json").read_text())
    operation = document["paths"]["/v1/datasets/{dataset_id}"]["get"]
    assert operation["operationId"] == "read_dataset"
    del operation["responses"]["404"]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    with pytest.raises(AssertionError, match="Undocumented status code"):
        fuzz("--phases", "coverage", *SAME, *operations("include", ["read_dataset"]))


@pytest.mark.skipif(not FOR_S, reason="make fuzz")
@pytest.mark.timeout(FOR_S + 180)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("option", ["exclude", "include"])
def test_nothing_that_is_sent_brings_what_is_not_documented(fuzz: Fuzz, option: str) -> None:
    """Everything but the specs of jobs, then these, each for half of the time."""
    random = [
        "--phases",
        "coverage,fuzzing,stateful",
        "-n",
        "100000",
        "--generation-database",
        "none",
        "--max-time",
        str(max(FOR_S // 2, 1)),
    ]
    assert fuzz(*random, *operations(option, SPECS)) > 20


@pytest.mark.skipif(not FOR_S, reason="make fuzz")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_nothing_that_is_sent_for_losses_is_an_error_of_ours(fuzz: Fuzz) -> None:
    """Some ten thousand cases; bodies that are no JSON, and tensors, are damaged in losses/test_loss_fuzz.py."""
    random = ["--phases", "coverage,fuzzing", "-n", str(LOSS_CASES), "--generation-database", "none"]
    assert fuzz(*random, *operations("include", ["compute_losses", "get_losses"])) > LOSS_CASES
