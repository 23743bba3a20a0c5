"""Chats that the model's template refuses: told at submit and by the dry run, wherever the API can see the model's folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from service.ids import new_id, utcnow
from service.store.tables import Checkpoint

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAID = "row {} of data.{}: the model's chat template refuses the messages ({}): System role not supported"


def folder_with(path: Path, template: str | None) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer_config.json").write_text(json.dumps({} if template is None else {"chat_template": template}))
    return str(path)


def chats(*rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"train": {"source": "inline", "rows": [{"m": list(row)} for row in rows]}, "prompt": None, "chat": "m", **more}


def told(client: Any, body: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The errors of a submission. A dry run gives the same."""
    answers = [client.post(path, json=body) for path in ("/v1/jobs", "/v1/jobs:validate")]
    assert [answer.status_code for answer in answers] in ([201, 200], [422, 422]), [answer.text for answer in answers]
    told = [[(one["pointer"], one["code"], one["detail"]) for one in answer.json().get("errors", [])] for answer in answers]
    assert told[0] == told[1]
    return told[0]


@pytest.fixture
def rl(spec, tmp_path):
    def rl(template: str | None, data: dict[str, Any], **sections: Any) -> dict[str, Any]:
        model = {"source": folder_with(tmp_path / "model", template)}
        reward = {"graders": [{"kind": "contains", "reference": "4"}]}
        return spec(model=model, data={"answer": None, "eval": None, **data}, reward=reward, **sections)

    return rl


@pytest.fixture
def supervised(rl):
    def supervised(*args: Any, **sections: Any) -> dict[str, Any]:
        both = ("model", "data", "limits")
        return {"kind": "supervised", **{key: value for key, value in rl(*args).items() if key in both}, **sections}

    return supervised


@pytest.mark.parametrize("kind", ["rl", "supervised"])
def test_a_chat_that_the_template_refuses_is_refused_with_its_words(client, rl, supervised, kind) -> None:
    make, end = (rl, []) if kind == "rl" else (supervised, [ANSWER])
    roles = "system, user" + (", assistant" if end else "")
    data = chats([USER, *end], [SYSTEM, USER, *end])
    limits = {"max_steps": 5}
    asked = {"limits": limits} if kind == "rl" else {"update": {"batch_size": 2}}
    assert told(client, make(NO_SYSTEM, data, **asked)) == [("/data/chat", "chat_refused", SAID.format(1, "train", roles))]
    assert told(client, make(NO_SYSTEM, chats([USER, *end], [USER, *end]), **asked)) == []


def test_messages_of_the_spec_are_rendered_for_each_row(client, rl) -> None:
    data: Any = {"chat": [{"role": "system", "content": "{b}"}, {"role": "user", "content": "{a}"}], "prompt": None}
    data["train"] = {"source": "inline", "rows": [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]}
    only_y = NO_SYSTEM.replace("messages[0].role == 'system'", "messages[0].content == 'y'")
    assert told(client, rl(only_y, data)) == [("/data/chat", "chat_refused", SAID.format(1, "train", "system, user"))]


def test_options_of_the_template_and_held_out_rows_are_taken_into_account(client, rl) -> None:
    strict = "{% if strict and tools %}" + NO_SYSTEM + "{% else %}ok{% endif %}"
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = {"source": "inline", "rows": [{"m": [SYSTEM, USER]}]}
    data = chats([USER], eval=rows, tools=tools, chat_template_kwargs={"strict": True})
    assert told(client, rl(strict, data)) == [("/data/chat", "chat_refused", SAID.format(0, "eval", "system, user"))]
    assert told(client, rl(strict, {**data, "chat_template_kwargs": {"strict": False}})) == []


def test_a_row_that_no_step_takes_is_not_rendered(client, supervised) -> None:
    """As in the worker: the job can run."""
    data = chats([USER, ANSWER], [SYSTEM, USER, ANSWER])
    data["train"]["shuffle"] = False
    body = supervised(NO_SYSTEM, data, update={"batch_size": 1})
    assert told(client, {**body, "limits": {"max_steps": 1}}) == []
    assert len(told(client, {**body, "limits": {"max_steps": 2}})) == 1
    data["overlong"] = "skip"  # the worker looks at all rows, to leave out those that are too long
    assert len(told(client, {**supervised(NO_SYSTEM, data, update={"batch_size": 1}), "limits": {"max_steps": 1}})) == 1


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ absent + 1 }}",
        "{% unknown %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}" + NO_SYSTEM,
        "{{ messages[0].content.__class__.__mro__ }}",
    ],
)
def test_every_other_failure_of_a_template_is_left_to_the_worker(client, rl, template) -> None:
    assert told(client, rl(template, chats([SYSTEM, USER]))) == []


def test_the_template_of_a_checkpoint_with_all_weights_counts(api, rl) -> None:
    client, checkpoint = api.client("chats"), new_id("ckpt")
    folder_with(api.store.blobs.path(f"{checkpoint}/model"), NO_SYSTEM)
    body = rl(None, chats([SYSTEM, USER]))
    with api.store.begin() as session:
        row = {"id": checkpoint, "project": "chats", "step": 1, "attempt": 1, "adapter": "full", "path": checkpoint}
        model = {**body["model"], "adapter": {"kind": "full"}}
        rest = {"model": model, "size_bytes": 1, "manifest_sha256": "0", "metrics": {}, "has_optimizer": False}
        session.add(Checkpoint(**row, **rest, is_final=True, created_at=utcnow()))
    body["model"] = {"from_checkpoint": checkpoint}
    assert told(client, body) == [("/data/chat", "chat_refused", SAID.format(0, "train", "system, user"))]
