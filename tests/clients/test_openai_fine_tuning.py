"""OpenAI's own package uploads files, fine-tunes on them and samples what came out, with a real worker behind it.

The client validates strictly: an answer that does not fit the package's types raises.
"""

import json
import time
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from policy_chats import chat_model

from openai_stack import Stack, openai_stack

ENDED = ("succeeded", "failed", "cancelled")
SAID = ("aye", "nay")
CHAT: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def stack(whole: Any) -> Iterator[Stack]:
    with openai_stack(whole, grader_networks=(ip_network("127.0.0.0/8"),)) as stack:
        # Its logits can be far apart; those of the usual weights leave all tokens about as likely, whatever an adapter learns.
        chat_model(stack.settings.local_models_dir / "loud", initializer_range=0.3)
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> OpenAI:
    return stack.client(_strict_response_validation=True)


def upload(client: OpenAI, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    content = "\n".join(map(json.dumps, rows)).encode()
    return client.files.create(file=(name, content), purpose="fine-tune").id


def finished(client: OpenAI, stack: Stack, job_id: str) -> FineTuningJob:
    deadline = time.monotonic() + 100
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in ENDED:
        assert time.monotonic() < deadline, stack.log.read_text()[-3000:]
        time.sleep(0.1)
    assert job.status == "succeeded", f"{job.error}\n{stack.log.read_text()[-3000:]}"
    return job


def values(events: list[FineTuningJobEvent], name: str) -> list[float]:
    """A metric of the events that have it, the newest first."""
    told: list[Any] = [event.data for event in events]
    return [data[name] for data in told if name in data]


def test_files_are_uploaded_listed_read_and_deleted(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"messages": []}\n')
    file = client.files.create(file=path.open("rb"), purpose="fine-tune")
    assert (file.filename, file.purpose, file.bytes) == ("mine.jsonl", "fine-tune", 17)
    assert client.files.retrieve(file.id) == file
    assert file in list(client.files.list(purpose="fine-tune", limit=1))  # page by page
    assert client.files.content(file.id).text == path.read_text()
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.fixture(scope="module")
def supervised(client: OpenAI, stack: Stack) -> FineTuningJob:
    """A model that answers one of two words, by turns."""
    rows = [{"messages": [*CHAT, {"role": "assistant", "content": word}]} for word in SAID * 30]
    made = client.fine_tuning.jobs.create(
        model="loud",
        training_file=upload(client, rows),
        validation_file=upload(client, rows[:1]),
        suffix="pirate",
        seed=3,
        metadata={"team": "deck"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 200}},
        },
    )
    assert made.status in ("queued", "running") and made.fine_tuned_model is None
    return finished(client, stack, made.id)


def answers(client: OpenAI, model: str | None) -> list[str | None]:
    assert model is not None
    sampled = client.chat.completions.create(model=model, messages=CHAT, n=32, seed=1, max_tokens=8)
    return [choice.message.content for choice in sampled.choices]


def test_supervised_learns_answers_that_the_model_then_gives(client: OpenAI, supervised: FineTuningJob) -> None:
    job = supervised
    assert job.trained_tokens and job.finished_at
    assert (job.seed, job.metadata, job.hyperparameters.n_epochs) == (3, {"team": "deck"}, 4)
    given = answers(client, job.fine_tuned_model)
    assert sum(map(given.count, SAID)) >= 4, given  # of answers at random, none
    greedy = client.chat.completions.create(model=job.fine_tuned_model or "", messages=CHAT, temperature=0)
    assert greedy.choices[0].message.content in SAID
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=50))
    losses = values(events, "train_loss")
    assert len(losses) == 60 and losses[0] < losses[-1], "newest first"
    assert events[-1].message == "created"
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model and checkpoints[0].step_number == 60
    assert checkpoints[0].metrics.full_valid_loss is not None and len(checkpoints) >= 2
    assert job.id in [one.id for one in client.fine_tuning.jobs.list(limit=1)]


def test_reinforcement_teaches_which_of_them_is_right(client: OpenAI, stack: Stack, supervised: FineTuningJob) -> None:
    assert supervised.fine_tuned_model is not None
    hyperparameters: Any = {
        "n_epochs": 6,
        "batch_size": 4,
        "learning_rate_multiplier": 300,
        "compute_multiplier": 2,
        "max_completion_tokens": 8,  # ours
    }
    grader: Any = {
        "type": "multi",
        "name": "likes",
        "graders": {
            "type": "string_check",
            "name": "right",
            "input": "{{sample.output_text}}",
            "reference": "{{item.want}}",
            "operation": "eq",
        },
        "calculate_output": "2 * right",
    }
    made = client.fine_tuning.jobs.create(
        model=supervised.fine_tuned_model,
        training_file=upload(client, [{"messages": CHAT, "want": SAID[1]}] * 16),
        method={"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyperparameters}},
    )
    job = finished(client, stack, made.id)
    rewards = values(list(client.fine_tuning.jobs.list_events(job.id, limit=100)), "train_mean_reward")
    assert len(rewards) == 24 and rewards[0] > rewards[-1] + 0.4, rewards
    before, after = (answers(client, one.fine_tuned_model).count(SAID[1]) for one in (supervised, job))
    assert after >= before + 10


def test_a_job_is_paused_resumed_and_cancelled(client: OpenAI, stack: Stack) -> None:
    lenient = stack.client()  # the package's types do not know the status `paused`
    rows = [{"messages": [*CHAT, {"role": "assistant", "content": SAID[0]}]}] * 4
    hyperparameters: Any = {"n_epochs": 1000, "batch_size": 1}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    job = client.fine_tuning.jobs.create(model="sailor", training_file=upload(client, rows), method=method)
    lenient.fine_tuning.jobs.pause(job.id)
    deadline = time.monotonic() + 60
    while (status := str(lenient.fine_tuning.jobs.retrieve(job.id).status)) != "paused":
        assert status in ("queued", "running") and time.monotonic() < deadline
        time.sleep(0.05)
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    client.fine_tuning.jobs.cancel(job.id)
    while client.fine_tuning.jobs.retrieve(job.id).status != "cancelled":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.pause(job.id)


def test_what_is_wrong_comes_in_openai_s_shape(client: OpenAI, stack: Stack) -> None:
    file = upload(client, [{"messages": CHAT, "want": "a"}])

    def refused(**request: Any) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as error:
            client.fine_tuning.jobs.create(**{"model": "sailor", "training_file": file, **request})
        assert set(error.value.response.json()["error"]) == {"message", "type", "param", "code"}
        return error.value

    python = {"type": "python", "name": "p", "source": "def grade(sample, item): return 1.0"}
    said = refused(method={"type": "reinforcement", "reinforcement": {"grader": python}})
    assert "code of callers is not run here" in said.message and str(said.param).startswith("method.reinforcement.grader")
    assert refused(training_file="file-abc").param == "training_file"
    assert refused().param == "training_file", "there is no assistant's turn to learn"
    with pytest.raises(openai.BadRequestError) as broken:
        client.files.create(file=("x.jsonl", b'{"a": 1}\n{"a"'), purpose="fine-tune")
    assert "line 2" in broken.value.message
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("x.jsonl", b'{"a": 1}'), purpose="batch")
    other = stack.client(stack.http.post("/v1/keys", json={"name": "x", "project": "other"}).json()["key"])
    with pytest.raises(openai.NotFoundError):
        other.files.retrieve(file)
    with pytest.raises(openai.BadRequestError):
        other.fine_tuning.jobs.create(model="sailor", training_file=file)
