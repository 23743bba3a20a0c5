import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.jobs import gym_rows
from service.jobs.data import InlineRows, JsonlRows, Subset, open_data, open_source, plain_messages, prompt_indices
from service.jobs.gym_rows import RowMaker
from service.spec.data import DataSpec, Message, ReasoningGymSource

ROWS = [{"q": f"{n}+{n}", "a": str(2 * n)} for n in range(10)]


def spec(**changes: Any) -> DataSpec:
    return DataSpec.model_validate({"train": {"source": "inline", "rows": ROWS}, "prompt": "{q}=", "answer": "{a}", **changes})


def nowhere(dataset_id: str) -> Path:
    raise AssertionError(dataset_id)


# ---------------------------------------------------------------- which rows a step takes


@pytest.mark.parametrize(("n", "count"), [(10, 3), (7, 7), (5, 12), (1, 4), (1000, 64)])
def test_each_epoch_takes_every_row_once(n: int, count: int) -> None:
    steps = -(-3 * n // count)
    walk = [index for step in range(1, steps + 1) for index in prompt_indices(n, step, count, 7, True)]
    epochs = [walk[start : start + n] for start in range(0, 3 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 5 or epochs[0] != epochs[1] != epochs[2]


def test_a_step_takes_the_same_rows_whatever_was_asked_before() -> None:
    alone = prompt_indices(1000, 40, 32, 3, True)
    for step in range(1, 60):
        prompt_indices(1000, step, 32, 3, True)
    assert prompt_indices(1000, 40, 32, 3, True) == alone


def test_the_order_is_the_same_on_every_machine() -> None:
    assert prompt_indices(10, 1, 12, 42, True) == [6, 5, 3, 0, 9, 1, 2, 7, 8, 4, 9, 1]


def test_another_seed_gives_another_order() -> None:
    assert prompt_indices(1000, 1, 32, 1, True) != prompt_indices(1000, 1, 32, 2, True)


def test_without_shuffle_rows_come_in_their_order() -> None:
    assert prompt_indices(5, 2, 4, 0, False) == [4, 0, 1, 2]


# ---------------------------------------------------------------- sources


def test_jsonl_rows_are_read_one_by_one_and_from_any_side(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"n": n, "s": "ä" * n}, ensure_ascii=False) + "\n" for n in range(50)), "utf-8")
    rows = JsonlRows(path)
    assert len(rows) == 50 and rows.columns == ["n", "s"]
    assert rows[17] == {"n": 17, "s": "ä" * 17} and rows[-1]["n"] == 49
    assert [row["n"] for row in rows] == list(range(50))
    assert [row["n"] for row in rows[3:6]] == [3, 4, 5]
    with pytest.raises(IndexError):
        rows[50]


def test_max_rows_takes_the_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\n{"n": 2}\n')
    assert [row["n"] for row in JsonlRows(path, 2)] == [0, 1]
    assert len(JsonlRows(path, 9)) == 3
    data = open_data(spec(train={"source": "inline", "rows": ROWS, "max_rows": 4}), 0, nowhere)
    assert list(data.train) == ROWS[:4]


def test_a_dataset_is_read_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "1", "a": "2"}\n')
    data = open_data(spec(train={"source": "dataset", "id": "ds_1"}), 0, {"ds_1": path}.__getitem__)
    assert list(data.train) == [{"q": "1", "a": "2"}] and data.eval is None


def test_a_split_holds_rows_out_and_never_trains_on_them() -> None:
    data = open_data(spec(eval={"source": "split", "rows": 3}), 5, nowhere)
    assert data.eval is not None and len(data.eval) == 3 and len(data.train) == 7
    assert Counter(row["q"] for row in [*data.train, *data.eval]) == Counter(row["q"] for row in ROWS)
    assert [ROWS[data.eval.number(i)] for i in range(3)] == list(data.eval)
    again = open_data(spec(eval={"source": "split", "rows": 3}), 5, nowhere)
    other = open_data(spec(eval={"source": "split", "rows": 3}), 6, nowhere)
    assert again.eval is not None and list(again.eval) == list(data.eval)
    assert other.eval is not None and list(other.eval) != list(data.eval)


@pytest.mark.parametrize("kind", ["inline", "dataset"])
def test_a_row_that_is_the_same_as_a_held_out_one_is_not_trained_on(kind: str, tmp_path: Path) -> None:
    rows = [*ROWS, *ROWS[:6], *ROWS[:3]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"source": "inline", "rows": rows} if kind == "inline" else {"source": "dataset", "id": "ds_1"}
    held = {"source": "split", "rows": 4, "copies": "left_out"}
    data = open_data(spec(train=train, eval=held), 5, lambda _: path)
    assert data.eval is not None and len(data.eval) == 4
    held_out = {row["q"] for row in data.eval}
    assert [row for row in rows if row["q"] not in held_out] == list(data.train) and len(data.train) < len(rows) - 4
    with pytest.raises(InvalidRequest, match=r"copies: kept .* the same as the 1 held out: nothing would be left"):
        open_data(spec(train={"source": "inline", "rows": ROWS[:1] * 5}, eval={**held, "rows": 1}), 5, nowhere)
    for older in ({"source": "split", "rows": 4}, {**held, "copies": "kept"}):  # a job that began before goes on with its rows
        data = open_data(spec(train=train, eval=older), 5, lambda _: path)
        assert len(data.train) == len(rows) - 4


def test_a_subset_of_a_subset_names_the_rows_of_the_source() -> None:
    inner = Subset(InlineRows([{"n": n} for n in range(10)]), [1, 4, 7, 9])
    outer = Subset(inner, [0, 2])
    assert [(outer.number(i), outer[i]) for i in range(2)] == [(1, {"n": 1}), (7, {"n": 7})]


@pytest.mark.parametrize("held_out", [10, 11])
def test_a_split_must_leave_something_to_train_on(held_out: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_data(spec(eval={"source": "split", "rows": held_out}), 0, nowhere)
    [error] = caught.value.errors
    assert (error.pointer, error.got, error.allowed) == ("/data/eval/rows", held_out, "less than 10")


def test_reasoning_gym_makes_the_same_row_each_time() -> None:
    pytest.importorskip("reasoning_gym")
    source = {"source": "reasoning_gym", "task": "basic_arithmetic", "size": 50, "seed": 3, "max_rows": 20}
    first, second = (open_data(spec(train=source, prompt="{question}", answer="{answer}"), 0, nowhere) for _ in range(2))
    assert len(first.train) == 20 and first.train.columns == ["question", "answer", "metadata"]
    assert first.train[7] == second.train[7] != first.train[8]
    assert first.prompt(first.train[7]) == first.train[7]["question"]


# ---------------------------------------------------------------- prompts and answers


def test_prompt_and_answer_are_rendered() -> None:
    data = open_data(spec(), 0, nowhere)
    assert (data.prompt(ROWS[3]), data.answer(ROWS[3])) == ("3+3=", "6")
    assert open_data(spec(answer=None), 0, nowhere).answer(ROWS[3]) is None


def test_chat_messages_are_rendered_or_taken_from_a_column() -> None:
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="{q}?")]
    data = open_data(spec(prompt=None, chat=[message.model_dump() for message in messages]), 0, nowhere)
    assert data.prompt(ROWS[1]) == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    data = open_data(spec(prompt=None, chat="talk"), 0, nowhere)
    assert data.prompt({"talk": [{"role": "user", "content": "hi", "id": 7}]}) == [{"role": "user", "content": "hi"}]


def test_keys_that_a_table_leaves_empty_are_not_given_to_the_template() -> None:
    lacking = {"role": "assistant", "tool_calls": [], "reasoning_content": "", "name": "", "tool_call_id": None}
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [{**lacking, "content": ""}, {**lacking, "content": None, "tool_calls": [call], "thinking": "why"}]
    called = {"role": "assistant", "tool_calls": [call], "thinking": "why"}
    assert plain_messages(messages) == [{"role": "assistant", "content": ""}, called]


# ---------------------------------------------------------------- procedural rows


SAME_EVERYWHERE = """
import json, sys
from pathlib import Path
from service.jobs.data import open_source
from service.jobs.gym_rows import RowMaker
from service.spec.data import ReasoningGymSource

maker, order = RowMaker(), json.loads(sys.argv[1])
for task in ("isomorphic_strings", "list_functions", "polynomial_multiplication"):
    source = ReasoningGymSource(source="reasoning_gym", task=task, size=30, seed=3)
    rows = open_source(source, lambda _: Path(), "/data/train", maker)
    print(sorted((index, rows[index]["question"], str(rows[index]["answer"])) for index in order))
"""


def test_a_procedural_row_is_the_same_in_every_process_and_order() -> None:
    """Other hashes of texts, another order: reasoning-gym alone makes other rows of these tasks."""
    pytest.importorskip("reasoning_gym")

    def made(order: list[int], **environment: str) -> str:
        argv = [sys.executable, "-c", SAME_EVERYWHERE, json.dumps(order)]
        return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout

    order = list(range(30))
    assert made(order, PYTHONHASHSEED="1") == made(order[::-1], PYTHONHASHSEED="2")


def test_rows_are_made_again_by_the_next_process_and_what_cannot_be_made_is_said() -> None:
    pytest.importorskip("reasoning_gym")
    maker, source = RowMaker(), ReasoningGymSource(source="reasoning_gym", task="spell_backward", size=3)
    rows = open_source(source, lambda _: Path(), "/data/train", maker)
    first = rows[0]
    assert maker._child is not None
    maker._child.kill()
    maker._child.wait()
    assert rows[0] == first
    with pytest.raises(ValueError, match="spell_backward cannot make row x: TypeError"):
        maker.row(source, "x")  # pyright: ignore[reportArgumentType]


def test_who_makes_rows_ends_with_its_parent_in_the_middle_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, ended = [7, 7, 1], list[int]()
    monkeypatch.setattr(os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    gym_rows._end_with(7)
    assert (parents, ended) == ([], [1])


def test_after_an_interrupted_row_the_next_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    maker, closed = RowMaker(), list[bool]()
    monkeypatch.setattr(maker, "_ask", interrupted)
    monkeypatch.setattr(maker, "close", lambda: closed.append(True))
    with pytest.raises(KeyboardInterrupt):
        maker.row(ReasoningGymSource(source="reasoning_gym", task="gcd"), 0)
    assert closed
