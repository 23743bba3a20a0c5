"""The dry run's graded rows, in the process of their own in which the API asks for them."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from job_specs import RL
from service.rewards import preview
from service.rewards.preview import Preview, run_preview
from service.spec.job import JobSpec
from service.validation import parse

ROWS = [{"q": f"{n}+{n}=", "a": str(2 * n)} for n in range(10)]


def spec(**changes: Any) -> dict[str, Any]:
    return RL | {"data": {"train": {"source": "inline", "rows": ROWS}, "prompt": "{q}", "answer": "{a}"}} | changes


def here(spec: dict[str, Any], rows: int = 2, secrets: dict[str, SecretStr] | None = None) -> Preview:
    return preview.preview(parse(JobSpec, spec), dataset_paths={}, secrets=secrets or {}, rows=rows)


def test_the_first_rows_are_shown_and_their_answers_graded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "1+1=", "a": "2"}\n{"q": "2+2=", "a": "4"}\n')
    graders = [{"kind": "exact", "reference": "{a}"}, {"kind": "length", "max_tokens": 1, "weight": 0.5}]
    data = {"train": {"source": "dataset", "id": "ds_1"}, "prompt": "{q}", "answer": "{a}"}
    done = run_preview(spec(data=data, reward={"graders": graders}), dataset_paths={"ds_1": path}, secrets={}, rows=3)
    assert done.warnings == []
    assert [(sample["prompt"], sample["reference"]) for sample in done.samples] == [("1+1=", "2"), ("2+2=", "4")]
    # One character and the end token are two tokens.
    assert done.samples[0]["graded"] == {"total": 1.0, "scores": {"exact": 1.0, "length": 0.0}, "errors": {}}


def test_without_an_answer_template_the_first_reference_is_the_right_answer() -> None:
    graders = [{"kind": "regex", "pattern": "1"}, {"kind": "number", "reference": "{a}.0"}]
    data = {"train": {"source": "inline", "rows": ROWS}, "prompt": "{q}"}
    assert [sample["reference"] for sample in here(spec(data=data, reward={"graders": graders})).samples] == ["0.0", "2.0"]
    silent = here(spec(data=data, reward={"graders": graders[:1]}))
    assert silent.samples[0]["graded"] is None and "says no right answer" in silent.warnings[0]


def test_a_wrong_extract_pattern_shows_as_a_warning() -> None:
    done = here(spec(reward={"graders": [{"kind": "exact", "reference": "{a}", "extract": r"answer: (\d+)"}]}))
    assert done.samples[0]["graded"]["total"] == 0
    assert "the right answers of the sample rows get no reward" in done.warnings[0]


def test_a_grader_that_cannot_grade_is_told_by_sample() -> None:
    rows = [{"q": "x", "a": "no number"}]
    done = here(spec(data={"train": {"source": "inline", "rows": rows}, "prompt": "{q}", "answer": "{a}"}, reward={"graders": [
        {"kind": "number", "reference": "{a}"}
    ]}))  # fmt: skip
    assert done.samples[0]["graded"]["total"] is None
    assert done.samples[0]["errors"][0].startswith("number: ValueError: the reference 'no number' holds no number")


def probes(done: Preview, row: int = 0) -> dict[str, dict[str, float]]:
    return {probe["answer"]: probe["scores"] for probe in done.samples[row]["probes"]}


def test_right_near_and_wrong_answers_are_tried_on_each_grader() -> None:
    graders = [{"kind": "number", "reference": "{a}"}, {"kind": "contains", "reference": "{a}"}]
    rows = [{"q": "x", "a": 42}, {"q": "y", "a": "5 cm"}, {"q": "z", "a": 0.00001}]
    done = here(spec(data={"train": {"source": "inline", "rows": rows}, "prompt": "{q}"}, reward={"graders": graders}), rows=3)
    tried = probes(done)
    assert tried[r"\boxed{42}"] == {"number": 1.0, "contains": 1.0}
    assert tried["43"] == tried["4"] == tried["I do not know"] == tried[""] == tried["5 cm"] == {"number": 0.0, "contains": 0.0}
    assert tried["-42"] == tried["421"] == {"number": 0.0, "contains": 1.0}
    assert probes(done, 1)["5 kg"]["number"] == 0
    assert probes(done, 2)[r"\boxed{0.00001}"]["number"] == 1 and probes(done, 2)["0.00002"]["number"] == 0
    [warning] = done.warnings
    assert warning.startswith("grader contains pays 1 for '-42' (the other sign) where '42' is right")


def test_a_near_miss_that_the_spec_asks_to_pay_is_no_warning() -> None:
    rows = [{"q": "x", "a": "5 cm"}, {"q": "y", "a": "50%"}]
    data = {"train": {"source": "inline", "rows": rows}, "prompt": "{q}"}
    loose = {"kind": "number", "reference": "{a}", "units": "ignored", "percent": "sign", "tolerance": 0.5}
    done = here(spec(data=data, reward={"graders": [loose]}))
    assert probes(done)["5 kg"] == {"number": 1.0} and done.warnings == []


def test_without_a_right_answer_a_stand_in_shows_whether_graders_work() -> None:
    data = {"train": {"source": "inline", "rows": ROWS}, "prompt": "{q}"}
    graders = [{"kind": "regex", "pattern": "stand-in"}]
    done = here(spec(data=data, reward={"graders": graders}))
    assert done.samples[0]["graded"] is None and list(probes(done).values()) == [{"regex": 1.0}]
    assert "says no right answer" in done.warnings[0] and "stand-in answer" in done.warnings[0]
    down = {"kind": "http", "url": "http://127.0.0.1:9/score"}
    local = (ip_network("127.0.0.0/8"),)
    done = run_preview(spec(data=data, reward={"graders": [down]}), dataset_paths={}, secrets={}, networks=local)
    assert "grader_unhealthy" in done.warnings[0] and "stand-in" in done.warnings[1]


def test_a_scorer_of_reasoning_gym_that_pays_wrong_answers_is_told() -> None:
    pytest.importorskip("reasoning_gym")
    data = {"train": {"source": "reasoning_gym", "task": "game_of_life_halting", "size": 10}, "prompt": "{question}"}
    lax = run_preview(spec(data=data, reward={"graders": [{"kind": "reasoning_gym"}]}), dataset_paths={}, secrets={}, rows=2)
    assert probes(lax)["I do not know"] == {"reasoning_gym": 1.0}
    assert "pays 1 for " in lax.warnings[0] and "strict: true" in lax.warnings[0]


def test_a_task_that_makes_no_rows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("letter_jumble cannot make row 0: ValueError: empty range")

    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr("service.jobs.gym_rows.RowMaker.row", fails)
    data = {"train": {"source": "reasoning_gym", "task": "letter_jumble", "size": 10}, "prompt": "{question}"}
    told = preview.preview(
        parse(JobSpec, spec(data=data, reward={"graders": [{"kind": "reasoning_gym"}]})), dataset_paths={}, secrets={}, rows=2
    )
    assert told.samples == []
    assert told.warnings == ["row_not_made: letter_jumble cannot make row 0: ValueError: empty range"]


def test_a_reward_service_that_is_down_is_tried_once_and_told() -> None:
    http = {"kind": "http", "url": "http://127.0.0.1:9/score", "max_retries": 10, "secret": "judge"}
    began = time.monotonic()
    here, secrets = (ip_network("127.0.0.0/8"),), {"judge": SecretStr("s3cret")}
    done = run_preview(spec(reward={"graders": [http]}), dataset_paths={}, secrets=secrets, networks=here)
    assert time.monotonic() - began < 15
    assert "grader_unhealthy" in done.warnings[0] and "after 1 attempt" in done.warnings[0]
    assert "s3cret" not in repr(done) and done.samples[0]["prompt"] == "0+0="


def test_a_supervised_job_without_graders_shows_its_rows() -> None:
    done = here({key: value for key, value in spec(kind="supervised").items() if key not in ("objective", "reward")})
    shown = {"prompt": "0+0=", "reference": "0", "learns": ["0"], "graded": None, "errors": []}
    assert done.warnings == [] and done.samples[0] == shown


def test_what_takes_too_long_is_ended_with_everything_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # handed on from process to process: by it we know those of this test
    slow = spec(reward={"graders": [{"kind": "json_schema", "schema": {"type": "string", "pattern": "^(a|aa)+$"}}]})
    slow["data"] = {
        "train": {"source": "inline", "rows": [{"q": "1", "a": '"' + "a" * 90 + '!"'}]},
        "prompt": "{q}",
        "answer": "{a}",
    }
    most = 0
    for timeout_s in (3, 10, 30):  # on a busy machine the grader's process comes late
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(run_preview, slow, dataset_paths={}, secrets={}, timeout_s=timeout_s)
            while not asked.done():
                most = max(most, len(processes(tmp_path)))
                time.sleep(0.02)
            assert asked.result() == Preview([], [f"the sample rows were not graded: it took longer than {timeout_s} s"])
        if most == 2:
            break
    assert most == 2  # the dry run's own, and its grader's
    deadline = time.monotonic() + 60  # the grader's own process ends with its alarm, or when its pipe closes
    while left := processes(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def processes(mark: Path) -> set[str]:
    """Graders' processes that were started with this folder in their environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # gone meanwhile, or not ours
            if entry.name.isdigit() and str(mark).encode() in (entry / "environ").read_bytes():
                found |= {entry.name} if b"service.rewards" in (entry / "cmdline").read_bytes() else set()
    return found


def test_procedural_rows_are_made_and_shown() -> None:
    pytest.importorskip("reasoning_gym")
    gym = {"source": "reasoning_gym", "task": "basic_arithmetic", "size": 10}
    done = run_preview(
        spec(
            data={"train": gym, "prompt": "{question}", "answer": "{answer}"},
            reward={"graders": [{"kind": "exact", "reference": "{answer}"}]},
        ),
        dataset_paths={},
        secrets={},
        rows=2,
    )
    assert [sample["graded"]["total"] for sample in done.samples] == [1, 1]
