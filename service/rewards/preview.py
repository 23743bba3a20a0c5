"""What a job's first rows look like and what their own reference answers would get, before anything is queued.

`run_preview` starts `python -m service.rewards.preview` under a time limit, because rows of a procedural source and graders
run code that the API process must not depend on.
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
from service.rewards.rewards import Rewards
from service.rewards.samples import Sample
from service.spec.addresses import Networks
from service.spec.job import JobSpec, RLSpec, SupervisedSpec
from service.spec.reward import HttpGrader, RewardSpec
from service.spec.templates import render
from service.validation import parse

HTTP_TIMEOUT_S = 10.0  # a dry run tries a reward service once, and not for long
CHARACTERS_PER_TOKEN = 4  # a guess for `length` graders; the tiny model's is exact


@dataclass(frozen=True)
class Preview:
    """`samples` have prompt, reference, graded and errors each; `warnings` tell why there are none."""

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
    """`preview` of a resolved spec in a process of its own, ended after `timeout_s`. Never raises for what the job does."""
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
    """The first rows as prompts, with the reference answer graded as if the model had given it."""
    data = open_data(spec.data, spec.seed, dataset_paths.__getitem__)
    first = data.train[:rows]
    samples = [
        {"prompt": data.prompt(row), "reference": reference_of(spec, data, row), "graded": None, "errors": []} for row in first
    ]
    if spec.reward is None:
        return Preview(samples, [])
    gradable = [i for i, sample in enumerate(samples) if sample["reference"] is not None]
    if not gradable:
        return Preview(samples, ["nothing was graded: the spec says no right answer (data.answer, or a grader's reference)"])
    try:
        with Rewards(_brisk(spec.reward), job_id="job_preview", secrets=secrets, networks=networks) as rewards:
            answers = [_as_sampled(spec, samples[i], first[i]) for i in gradable]
            for i, graded in zip(gradable, rewards.grade(answers), strict=True):
                samples[i] |= {
                    "graded": asdict(graded),
                    "errors": [f"{name}: {error}" for name, error in graded.errors.items()],
                }
    except JobFailed as error:
        return Preview(samples, [f"{error.code}: {error.detail}"])
    return Preview(samples, _no_reward_for_the_right_answer(samples))


def reference_of(spec: RLSpec | SupervisedSpec, data: Data, row: Row) -> str | None:
    """The right answer: data.answer, else the reference of the first grader that has one."""
    if data.answer_template is not None:
        return data.answer(row)
    references = [getattr(grader, "reference", None) for grader in (spec.reward.graders if spec.reward else [])]
    return next((render(reference, row) for reference in references if reference is not None), None)


def _brisk(spec: RewardSpec) -> RewardSpec:
    graders = [
        grader.model_copy(update={"max_retries": 0, "timeout_s": min(grader.timeout_s, HTTP_TIMEOUT_S)})
        if isinstance(grader, HttpGrader)
        else grader
        for grader in spec.graders
    ]
    return spec.model_copy(update={"graders": graders})


def _as_sampled(spec: RLSpec | SupervisedSpec, sample: dict[str, Any], row: Row) -> Sample:
    answer: str = sample["reference"]
    tokens = len(answer) if spec.model.source == "tiny" else -(-len(answer) // CHARACTERS_PER_TOKEN)
    return Sample(sample["prompt"], answer, tokens + 1, False, row)  # the end token counts


def _no_reward_for_the_right_answer(samples: list[dict[str, Any]]) -> list[str]:
    totals = [sample["graded"]["total"] for sample in samples if sample["graded"] and sample["graded"]["total"] is not None]
    if totals and max(totals) <= 0:
        return ["the right answers of the sample rows get no reward; look at the graders' references and extract patterns"]
    return []


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
