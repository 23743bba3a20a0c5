"""A job's first rows as prompts, and the rewards of their reference answers, shown before anything is queued.

`run_preview` starts `python -m service.rewards.preview` under a time limit, because procedural sources and graders run code
that could block the API process.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from service.errors import JobFailed, RatchetError
from service.jobs.data import Data, Row, open_data
from service.rewards.probes import expected_of
from service.rewards.trial import Trial
from service.spec.addresses import Networks
from service.spec.job import JobSpec, RLSpec, SupervisedSpec
from service.validation import parse


@dataclass(frozen=True)
class Preview:
    """Each of `samples` has prompt, reference, graded, errors and probes, and learns if the job is supervised. `warnings` say
    why there are no samples, or which rewards graders give that they should not."""

    samples: list[dict[str, Any]]
    warnings: list[str]


def run_preview(
    spec: dict[str, Any],
    *,
    dataset_paths: Mapping[str, Path],
    secrets: Mapping[str, SecretStr],
    networks: Networks = (),
    rows: int = 4,
    timeout_s: float = 30.0,
) -> Preview:
    """`preview` of a resolved spec in a separate process, ended after `timeout_s`. Faults of the job become warnings."""
    named = {grader.get("secret") for grader in (spec.get("reward") or {}).get("graders", [])}
    request = {
        "spec": spec,
        "datasets": {key: str(path) for key, path in dataset_paths.items()},
        "secrets": {name: secret.get_secret_value() for name, secret in secrets.items() if name in named},
        "networks": [str(network) for network in networks],
        "rows": rows,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "service.rewards.preview"],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Preview([], [f"the sample rows were not graded: it took longer than {timeout_s:g} s"])
    if done.returncode != 0:
        return Preview([], [f"the sample rows were not graded: the process ended with status {done.returncode}"])
    return Preview(**json.loads(done.stdout))


def preview(
    spec: RLSpec | SupervisedSpec,
    *,
    dataset_paths: Mapping[str, Path],
    secrets: Mapping[str, SecretStr],
    rows: int,
    networks: Networks = (),
) -> Preview:
    """The first rows as prompts. Their reference, near and wrong answers are graded as if the model had given them."""
    data = open_data(spec.data, spec.seed, dataset_paths.__getitem__)
    try:
        first = data.train[:rows]
    except JobFailed as error:
        return Preview([], [f"{error.code}: {error.detail}"])
    samples: list[dict[str, Any]] = [
        {"prompt": data.prompt(row), "reference": reference_of(spec, data, row), "graded": None, "errors": []} for row in first
    ]
    if isinstance(spec, SupervisedSpec):
        for row, sample in zip(first, samples, strict=True):
            sample["learns"] = learns(data, row)
    if spec.reward is None:
        return Preview(samples, [])
    trial = Trial(spec, spec.reward, first, samples, secrets, networks)
    try:
        warnings = trial.run()
    except JobFailed as error:
        warnings = [f"{error.code}: {error.detail}", *trial.stands_in()]
    return Preview(samples, warnings)


def reference_of(spec: RLSpec | SupervisedSpec, data: Data, row: Row) -> str | None:
    """The right answer: data.answer, else the expected answer of the first grader that has one, else the end of the chat."""
    if data.answer_template is not None:
        return data.answer(row)
    expected = [expected_of(grader, row) for grader in (spec.reward.graders if spec.reward else [])]
    return next((answer for answer in expected if answer is not None), data.answer(row))


def learns(data: Data, row: Row) -> list[str]:
    """The texts that a supervised job learns from the row, in order. A turn that calls tools is shown as JSON."""
    if data.prompt_template is not None or data.begins_the_answer:
        return [data.answer(row) or ""]
    turns = [messages[-1] for messages in data.learnt_turns(row)]
    return [
        turn["content"] if turn.keys() == {"role", "content"} else json.dumps(turn, ensure_ascii=False, default=str)
        for turn in turns
    ]


def main() -> None:
    request = json.load(sys.stdin)
    datasets = {key: Path(path) for key, path in request["datasets"].items()}
    secrets = {name: SecretStr(value) for name, value in request["secrets"].items()}
    try:
        spec, networks = parse(JobSpec, request["spec"]), [ip_network(network) for network in request["networks"]]
        result = preview(spec, dataset_paths=datasets, secrets=secrets, rows=request["rows"], networks=networks)
    except RatchetError as error:
        result = Preview([], [error.detail])
    json.dump(asdict(result), sys.stdout, default=str)


if __name__ == "__main__":
    main()
