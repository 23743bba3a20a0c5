"""From a parsed spec to what will run: defaults, hashes, estimates, and everything that only the store or the disk knows."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import job_specs
from service.errors import FieldError, InvalidRequest
from service.ids import new_id, utcnow
from service.jobs.datasets import ingest
from service.jobs.resolve import Resolved, resolve
from service.settings import Settings
from service.spec.job import JobSpec
from service.store.session import Store
from service.store.tables import Checkpoint
from service.validation import parse
from service.validation.words import counted

ROWS = [{"q": f"{n}+{n}", "a": str(2 * n)} for n in range(10)]
RL: dict[str, Any] = job_specs.RL | {
    "data": {
        "train": {"source": "inline", "rows": ROWS},
        "eval": {"source": "split", "rows": 2},
        "prompt": "{q}=",
        "answer": "{a}",
    },
    "rollout": {"prompts_per_step": 4, "group_size": 2, "max_completion_tokens": 5},
    "eval": {"every_steps": 4},
    "limits": {"max_steps": 10},
}
SUPERVISED: dict[str, Any] = {**{key: RL[key] for key in ("model", "data", "limits", "eval")}, "kind": "supervised"}

Try = Callable[[dict[str, Any]], Resolved]


@pytest.fixture(autouse=True)
def _one_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """org/model lies in the cache."""
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def trying(lite_store: Store, lite_settings: Settings) -> Try:
    return lambda spec: resolve(lite_store, lite_settings, "default", parse(JobSpec, spec))


@pytest.fixture
def world(lite_store: Store, lite_settings: Settings) -> SimpleNamespace:
    return SimpleNamespace(store=lite_store, settings=lite_settings)


def but(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The spec with values set; `a__b` is b in section a."""
    spec = copy.deepcopy(base)
    for path, value in changes.items():
        *sections, last = path.split("__")
        place = spec
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return spec


def refused(trying: Try, spec: dict[str, Any]) -> list[FieldError]:
    with pytest.raises(InvalidRequest) as caught:
        trying(spec)
    assert caught.value.detail
    return caught.value.errors


def only(trying: Try, spec: dict[str, Any]) -> FieldError:
    [error] = refused(trying, spec)
    return error


# ---------------------------------------------------------------- what comes out


def test_defaults_are_filled_in_and_the_result_is_legal_input_that_resolves_to_itself(trying: Try) -> None:
    once = trying(RL)
    assert once.spec["model"]["adapter"] == {"kind": "full"}
    assert once.spec["model"]["tiny"]["hidden_size"] == 96
    assert once.spec["eval"]["max_completion_tokens"] == 5
    assert once.spec["reward"]["graders"][0]["name"] == "exact"
    assert once.spec["objective"]["surrogate"]["clip_low"] == 3e-4
    assert once.spec["objective"]["preset"] == "gspo" and once.spec["resources"]["class"] == "any"
    assert (once.kind, once.max_steps, once.from_checkpoint_id) == ("rl", 10, None)
    again = trying(once.spec)
    assert (again.spec, again.spec_sha256, again.data_sha256) == (once.spec, once.spec_sha256, once.data_sha256)
    json.dumps(once.spec, allow_nan=False)


def test_other_models_get_lora_and_supervised_evaluations_64_tokens(trying: Try) -> None:
    resolved = trying(but(SUPERVISED, model={"source": "org/model"}))
    assert resolved.spec["model"]["adapter"]["kind"] == "lora" and resolved.spec["model"]["tiny"] is None
    assert resolved.spec["eval"]["max_completion_tokens"] == 64


@pytest.mark.parametrize("spec", [but(RL, rollout__mask_truncated=True), but(RL, objective__select={"truncated": True})])
def test_masking_truncated_answers_is_one_switch_with_two_names(spec: dict[str, Any], trying: Try) -> None:
    resolved = trying(spec).spec
    assert resolved["rollout"]["mask_truncated"] is True and resolved["objective"]["select"]["truncated"] is True


def test_estimates_count_what_the_job_amounts_to(trying: Try) -> None:
    assert trying(RL).estimates == {
        "train_rows": 8,
        "eval_rows": 2,
        "prompts_per_epoch": 8,
        "epochs": 5.0,  # 10 steps of 4 prompts, 8 rows
        "evaluations": 4,  # before the first step, after 4, 8 and 10
        "completions": 80 + 4 * 2,
        "sampled_tokens_at_most": 80 * 5 + 8 * 5,
        "optimizer_steps": 40,
    }
    estimates = trying(SUPERVISED).estimates
    assert (estimates["completions"], estimates["optimizer_steps"], estimates["epochs"]) == (0, 10, 40.0)


def test_the_spec_hash_follows_meaning_and_not_spelling(trying: Try) -> None:
    plain = trying(RL).spec_sha256
    assert trying(dict(reversed(RL.items()))).spec_sha256 == plain
    assert trying(but(RL, seed=0)).spec_sha256 == plain
    assert trying(but(RL, seed=1)).spec_sha256 != plain


def test_the_data_hash_follows_rows_and_templates_only(trying: Try) -> None:
    plain = trying(RL).data_sha256
    assert trying(but(RL, name="other", limits__max_steps=11)).data_sha256 == plain
    assert trying(but(RL, data__prompt="{q}:")).data_sha256 != plain
    assert trying(but(RL, data__train__rows=[*ROWS[:-1], {"q": "9+9", "a": "19"}])).data_sha256 != plain
    assert trying(but(RL, seed=1)).data_sha256 != plain  # the seed draws the split


def test_two_uploads_of_the_same_rows_have_one_data_hash(trying: Try, world: SimpleNamespace) -> None:
    body = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    ids = [ingest(world.store, "default", name, [body], 10**6).id for name in ("a", "b")]
    specs = [but(RL, data__train={"source": "dataset", "id": id_}) for id_ in ids]
    first, second = map(trying, specs)
    assert first.data_sha256 == second.data_sha256 and first.spec_sha256 != second.spec_sha256
    assert list(first.dataset_paths) == [ids[0]] and first.dataset_paths[ids[0]].is_file()


def test_what_is_legal_and_probably_not_meant_is_warned_of(trying: Try, world: SimpleNamespace) -> None:
    assert trying(RL).warnings == []
    warm = but(RL, optimizer__schedule={"warmup_steps": 40})
    assert any("still warming up at the end" in text for text in trying(warm).warnings)
    worse = but(SUPERVISED, early_stopping={"metric": "eval/loss", "patience": 2})
    wrong = "early_stopping.mode is max, and of eval/loss the smaller values are better: write mode: min"
    assert wrong in trying(worse).warnings
    assert wrong not in trying(but(worse, early_stopping__mode="min")).warnings
    assert any("every prompt is the same" in text for text in trying(but(RL, data__prompt="1+1=")).warnings)
    assert any("repeats some of the 8 rows" in text for text in trying(but(RL, rollout__prompts_per_step=16)).warnings)
    loose = but(RL, objective__surrogate={"clip_high": 0.2})
    assert trying(loose).warnings == parse(JobSpec, loose).objective.warnings(updates_per_rollout=4) != []


# ---------------------------------------------------------------- what is held out


def test_held_out_rows_that_are_training_rows_are_warned_of(trying: Try, world: SimpleNamespace) -> None:
    def said(**changes: Any) -> list[str]:
        return [text for text in trying(but(RL, **changes)).warnings if "learnt by heart" in text]

    lines = [json.dumps(row).encode() + b"\n" for row in ROWS[3:6]]
    dataset = ingest(world.store, "default", "a", [b"".join(lines)], 10**6)
    uploaded = {"source": "dataset", "id": dataset.id}
    (text,) = said(data__eval=uploaded)
    assert text.startswith("3 rows of the 3 of data.eval (for example row 0) have prompt and answer of a training row: ")
    assert said(data__train=uploaded, data__eval=uploaded) and not said()
    twice = [{**row, "number": number} for number, row in enumerate(ROWS * 2)]  # of a split, and no two rows are the same
    assert said(data__train__rows=twice, seed=1)[0].startswith("2 rows of the 2 of data.eval")
    others = [{"q": "1+1", "a": "3"}, {"q": "2+1", "a": "4"}, {**ROWS[9], "more": 1}]
    assert said(data__eval={"source": "inline", "rows": others})[0].startswith(
        "1 row of the 3 of data.eval (for example row 2) has prompt and answer"
    )


def test_of_a_split_it_is_said_how_many_rows_are_left_out(trying: Try) -> None:
    often = trying(but(RL, data__train__rows=ROWS * 3, seed=1))
    assert "4 rows are not trained on, the same as held-out ones (data.eval.copies)" in often.warnings
    assert often.spec["data"]["eval"]["copies"] == "left_out"
    assert (often.estimates["train_rows"], often.estimates["eval_rows"]) == (3 * len(ROWS) - 6, 2)
    assert not any(
        "not trained on" in text or "learnt by heart" in text for text in [*often.warnings[1:], *trying(RL).warnings]
    )
    gym = {"source": "reasoning_gym", "task": "basic_arithmetic", "size": 10}  # made by the worker
    graders = [{"kind": "reasoning_gym"}]
    data = {"train": gym, "eval": {"source": "split", "rows": 2}, "prompt": "{question}"}
    made = trying({**RL, "data": data, "model": {"source": "org/model"}, "reward": {"graders": graders}})
    assert made.estimates["train_rows"] == 8


@pytest.mark.parametrize(
    ("seed", "size", "wrong"),
    [(5, 3, 3), (6, 1, 1), (14, 9, 1), (0, 6, 1), (0, 100, 10), (15, 3, 0), (0, 5, 0)],
)
def test_numbers_of_procedural_rows_are_held_out(trying: Try, seed: int, size: int, wrong: int) -> None:
    """Row i is made from seed + i: training takes 5 to 14 of 20 here."""
    train = {"source": "reasoning_gym", "task": "chain_sum", "size": 20, "max_rows": 10, "seed": 5}
    spec = but(RL, model={"source": "org/model"}, data__train=train)
    spec = but(spec, data__eval={**train, "seed": seed, "size": size, "max_rows": None})
    spec = but(
        spec,
        model={"source": "org/model"},
        data__prompt="{question}",
        data__answer="{answer}",
        reward__graders=[{"kind": "reasoning_gym"}],
    )
    if wrong:
        error = only(trying, spec)
        assert (error.pointer, error.code, error.got, error.allowed) == (
            "/data/eval/seed", "not_held_out", seed, "at least 15" + (f", or at most {5 - size}" if size <= 5 else "")
        )  # fmt: skip
        assert f"so {counted(wrong, 'row')} of the {size} of data.eval would be learnt from (seed 5, 10 rows)" in error.detail
    else:
        trying(spec)
    other = but(spec, data__eval__config={"max_terms": 3})  # most of its rows are the same
    found = [warning for warning in trying(other).warnings if warning.startswith("data.eval may hold training rows")]
    assert len(found) == bool(wrong)
    assert not wrong or f"so up to {counted(wrong, 'row')} of the {size} of data.eval would be learnt from" in found[0]
    together = but(spec, data__train__task="acre", data__eval__task="acre")
    trying(together) if seed != 5 else only(trying, together)


def test_numbers_of_a_composites_parts_are_held_out(trying: Try) -> None:
    """The n-th part of a composite makes row i from seed + n + i."""
    pytest.importorskip("reasoning_gym")
    train = {"source": "reasoning_gym", "task": "chain_sum", "size": 20, "seed": 5}  # from 5 to 24
    parts = [{"name": "leg_counting"}, {"name": "chain_sum", "weight": 2}]
    composite = {"source": "reasoning_gym", "task": "composite", "size": 10, "config": {"datasets": parts}}
    spec = but(
        RL,
        model={"source": "org/model"},
        data__prompt="{question}",
        data__answer="{answer}",
        reward__graders=[{"kind": "reasoning_gym"}],
    )
    for seed, wrong in ((22, True), (23, False)):
        both = but(spec, data__train=train, data__eval={**composite, "seed": seed})
        if wrong:
            error = only(trying, both)
            assert (error.pointer, error.code, error.allowed) == ("/data/eval/seed", "not_held_out", "at least 23")
            assert "row i of chain_sum is made from seed + i, so up to 1 row of the 10 of data.eval" in error.detail
        else:
            trying(both)
    swapped = {**composite, "config": {"datasets": parts[::-1]}}
    both = but(spec, data__train={**composite, "seed": 20}, data__eval={**swapped, "seed": 30})
    assert only(trying, both).allowed == "at least 31, or at most 9"  # of leg_counting 21 to 30, and 32 to 41
    trying(but(both, data__eval__seed=31))
    harder = {**composite, "config": {"datasets": [{"name": "chain_sum", "config": {"min_terms": 10, "max_terms": 12}}]}}
    (warning,) = [
        one for one in trying(but(spec, data__train=train, data__eval={**harder, "seed": 5})).warnings if "data.eval" in one
    ]
    assert "eval.seed should be at least 24" in warning


# ---------------------------------------------------------------- rows and templates


def test_a_misspelt_column_is_named_with_the_one_that_was_meant(trying: Try) -> None:
    rows = [{"question": "1", "answer": "2"}, {"question": "3", "answer": "4"}, {"question": "5", "answer": "6"}]
    error = only(trying, but(RL, data__train__rows=rows, data__prompt="{questoin}", data__answer=None, reward__graders=[
        {"kind": "exact", "reference": "{answer}"}
    ]))  # fmt: skip
    assert error.pointer == "/data/prompt" and error.code == "unknown_column"
    assert "{questoin} names no column of the rows of data.train; columns: answer, question" in error.detail
    assert "did you mean 'question'?" in error.detail


def test_every_template_is_checked_and_all_are_told_at_once(trying: Try) -> None:
    graders = [
        {"kind": "exact", "reference": "{a}"},
        {"kind": "number", "reference": "{x}"},
        {"kind": "contains", "reference": "{y}{z}"},
    ]
    spec = but(RL, data__prompt="{p}", data__answer="{r}", reward__graders=graders)
    pointers = [error.pointer for error in refused(trying, spec)]
    assert pointers == ["/data/prompt", "/data/answer", "/reward/graders/1/reference", *["/reward/graders/2/reference"] * 2]
    spec = but(RL, data__prompt=None, data__chat=[{"role": "system", "content": "x"}, {"role": "user", "content": "{p}"}])
    assert "/data/chat/1/content" in [error.pointer for error in refused(trying, but(spec, model={"source": "org/model"}))]


def test_a_column_that_some_rows_lack_is_told_with_the_first_of_them(trying: Try) -> None:
    rows = [*ROWS, {"q": "1+0"}, {"q": "2+0", "a": None}]
    error = only(trying, but(RL, data__train__rows=rows, data__eval=None, data__answer=None))
    assert error.pointer == "/reward/graders/0/reference" and error.code == "column_missing"
    assert "absent or null in 2 of 12 rows of data.train; it is absent in row 10" in error.detail


def test_uploaded_rows_are_checked_too(trying: Try, world: SimpleNamespace) -> None:
    body = b'{"q": "1+1", "a": "2"}\n{"q": "2+2"}\n{"q": "3+3", "a": "6"}\n'
    dataset = ingest(world.store, "default", "a", [body], 10**6)
    spec = but(RL, model={"source": "org/model"}, data__train={"source": "dataset", "id": dataset.id}, data__eval=None)
    assert "row 1" in refused(trying, spec)[0].detail
    assert trying(but(spec, data__train__max_rows=1))


def test_eval_rows_are_checked_as_well(trying: Try) -> None:
    error = only(trying, but(RL, data__eval={"source": "inline", "rows": [{"a": "1"}]}))
    assert "data.eval" in error.detail


def test_a_split_larger_than_the_data_is_refused_together_with_the_rest(trying: Try) -> None:
    found = refused(trying, but(RL, data__eval={"source": "split", "rows": 10}, data__prompt="{p}"))
    assert [error.pointer for error in found] == ["/data/eval/rows", "/data/prompt"]


@pytest.mark.parametrize("talk", [None, "hi", [], [{"role": "user"}], [{"role": "wizard", "content": "x"}], [["user", "x"]]])
def test_a_chat_column_must_hold_messages(talk: Any, trying: Try) -> None:
    good = [{"role": "user", "content": "hi"}]
    rows = [{"talk": good, "a": "1"}, {"talk": talk, "a": "1"}]
    spec = but(RL, model={"source": "org/model"}, data__train__rows=rows, data__eval=None, data__prompt=None, data__chat="talk")
    assert "row 1" in only(trying, spec).detail
    assert trying(but(spec, data__train__rows=rows[:1]))


# ---------------------------------------------------------------- the tiny model


def test_the_tiny_model_refuses_characters_that_it_cannot_read(trying: Try) -> None:
    error = only(trying, but(RL, data__train__rows=[*ROWS, {"q": "1 & 1", "a": "2"}], data__eval=None))
    assert error.pointer == "/data/prompt" and "row 10" in error.detail and "'&'" in error.detail


def test_the_tiny_model_refuses_prompts_that_leave_no_room(trying: Try) -> None:
    rows = [*ROWS, {"q": "1" * 28, "a": "2"}]
    spec = but(RL, data__train__rows=rows, data__eval=None, model__tiny={"context": 32})
    error = only(trying, spec)
    assert "row 10 of data.train has 29 tokens; allowed are 1 to 27 (context 32, answers of up to 5 tokens)" in error.detail
    assert trying(but(spec, rollout__max_completion_tokens=3))
    assert (
        "max_prompt_tokens 28"
        in only(trying, but(spec, rollout__max_completion_tokens=3, rollout__max_prompt_tokens=28)).detail
    )
    assert (
        only(trying, but(RL, data__train__rows=[{"q": "", "a": "1"}], data__eval=None, data__prompt="{q}")).code
        == "prompt_empty"
    )


def test_the_tiny_model_refuses_answers_that_do_not_fit_when_they_are_learnt(trying: Try) -> None:
    rows = [*ROWS, {"q": "1", "a": "2" * 30}]
    spec = but(SUPERVISED, data__train__rows=rows, data__eval=None, model__tiny={"context": 32})
    error = only(trying, spec)
    assert error.pointer == "/data/answer" and "33 tokens; the context holds 32" in error.detail
    assert trying(but(RL, data__train__rows=rows, data__eval=None, model__tiny={"context": 32}))


@pytest.mark.parametrize(("overlong", "becomes"), [("skip", "left out"), ("truncate_left", "loses the oldest tokens")])
def test_rows_that_are_too_long_for_the_tiny_model_are_counted_before_the_queue(
    overlong: str, becomes: str, trying: Try
) -> None:
    rows = [*ROWS, {"q": "1" * 28, "a": "2"}]
    spec = but(RL, data__train__rows=rows, data__eval=None, model__tiny={"context": 32}, data__overlong=overlong)
    [warning] = [text for text in trying(spec).warnings if "overlong" in text]
    assert "1 of 11 rows of data.train too long" in warning and "row 10" in warning and becomes in warning
    assert not any("overlong" in text for text in trying(but(spec, data__train__rows=ROWS)).warnings)


def test_estimates_and_warnings_leave_out_the_rows_that_the_job_does(trying: Try) -> None:
    long = {"q": "1" * 28, "a": "2"}
    held_out = {"source": "inline", "rows": [long, {"q": "5+5", "a": "5"}]}
    spec = but(RL, data__train__rows=[long] * 5 + ROWS[:4], data__eval=held_out, model__tiny={"context": 32})
    resolved = trying(but(spec, data__overlong="skip", rollout__prompts_per_step=8))
    estimates = {"train_rows": 4, "prompts_per_epoch": 4, "epochs": 20.0, "eval_rows": 1, "completions": 160 + 4 * 1}
    assert {name: resolved.estimates[name] for name in estimates} == estimates
    assert any("a step of 8 prompts repeats some of the 4 rows" in text for text in resolved.warnings)
    assert not any("learnt by heart" in text for text in resolved.warnings)
    learnt = but(SUPERVISED, data__train__rows=[{"q": "1" * 32, "a": "2"}, *ROWS[:4]], data__overlong="skip", data__eval=None)
    learnt = but(learnt, model__tiny={"context": 32})
    assert trying(learnt).estimates["learnt_tokens_per_epoch"] == sum(len(row["a"]) + 1 for row in ROWS[:4])


def test_a_split_of_which_nothing_would_be_left_is_refused(trying: Try) -> None:
    rows = [{"q": "1" * 28, "a": "2"}] * 3
    error = only(trying, but(RL, data__train__rows=rows, data__eval=None, model__tiny={"context": 32}, data__overlong="skip"))
    assert (error.pointer, error.code) == ("/data/overlong", "all_rows_overlong")
    assert "every row of data.train (3 rows)" in error.detail


def test_an_answer_that_leaves_its_prompt_no_room_cannot_be_cut(trying: Try) -> None:
    spec = but(SUPERVISED, data__eval=None, model__tiny={"context": 32}, data__overlong="truncate_left")
    assert trying(but(spec, data__train__rows=[{"q": "1" * 28, "a": "2" * 30}]))
    error = only(trying, but(spec, data__train__rows=[{"q": "1", "a": "2" * 31}]))
    assert (error.pointer, error.code) == ("/data/answer", "sequence_too_long")


ASK, TELL = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
TALKS = but(SUPERVISED, model={"source": "org/model"}, data__eval=None, data__prompt=None, data__answer=None, data__chat="talk")


def talking(*talks: Any, **changes: Any) -> dict[str, Any]:
    return but(TALKS, data__train__rows=[{"talk": talk} for talk in talks], **changes)


@pytest.mark.parametrize(
    ("talks", "changes", "said"),
    [
        ([[ASK]], {}, "does not end with an assistant's turn to learn"),
        ([[ASK, TELL], [ASK]], {"data__learn": "all"}, "row 1 of data.train holds no assistant's turn"),
        ([[TELL]], {}, "is an answer to nothing"),
        ([[ASK, TELL]], {"data__answer": "{talk}"}, "data.answer is given too"),
        ([[ASK, {"role": "bot", "content": "4"}]], {}, 'message 1 must be an object with a "role" that is one of system,'),
        ([[ASK, {"role": "assistant", "content": None}]], {}, "content of message 1 must be a text"),
        ([[{"role": "user", "content": [{"type": "image_url"}]}, TELL]], {}, "another kind than text in message 0"),
        ([[ASK, {**TELL, "tool_calls": "f"}]], {}, "tool_calls of message 1 must be a list of objects"),
    ],
)
def test_what_a_chat_column_must_hold_for_its_turns_to_be_learnt(
    talks: list[Any], changes: dict[str, Any], said: str, trying: Try
) -> None:
    errors = refused(trying, talking(*talks, **changes))
    (error,) = [error for error in errors if error.code == "not_a_chat"]
    assert error.pointer == "/data/chat" and said in error.detail


def test_the_format_of_openai_is_learnt_as_it_stands(trying: Try) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    tools = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    assert trying(talking([ASK, TELL], [*tools, TELL], [parts, TELL])).spec["data"]["learn"] == "last"
    assert trying(talking([ASK, TELL, ASK], data__learn="all"))
    rewarded = but(RL, model={"source": "org/model"}, data=talking([ASK, TELL])["data"])
    assert trying(but(rewarded, reward={"graders": [{"kind": "contains", "reference": "4"}]}))


def test_a_list_is_no_text(trying: Try) -> None:
    spec = but(SUPERVISED, model={"source": "org/model"}, data__eval=None, data__answer="{talk}")
    rows = [{"q": "1", "talk": "2"}, {"q": "1", "talk": [ASK, TELL]}]
    error = only(trying, but(spec, data__train__rows=rows))
    assert (error.pointer, error.code) == ("/data/answer", "list_in_text")
    assert "row 1 of data.train holds a list" in error.detail and "data.chat: talk" in error.detail
    assert "write it as text" in only(trying, but(spec, data__train__rows=[{"q": "1", "talk": [1]}])).detail


def test_a_tools_column_that_no_row_has_is_refused_and_one_that_some_rows_lack_is_not(trying: Try) -> None:
    rows = [{"talk": [ASK, TELL], "tools": [{"name": "f"}]}, {"talk": [ASK, TELL]}]
    error = only(trying, but(TALKS, data__tools="toolz", data__train__rows=rows))
    assert (error.pointer, error.code, error.allowed) == ("/data/tools", "unknown_column", ["talk", "tools"])
    assert "did you mean 'tools'?" in error.detail
    assert trying(but(TALKS, data__tools="tools", data__train__rows=rows)).spec["data"]["tools"] == "tools"


@pytest.mark.parametrize("tools", ["f", [1], {"name": "f"}])
def test_a_tools_column_must_hold_tools(tools: Any, trying: Try) -> None:
    spec = but(TALKS, data__tools="tools", data__train__rows=[{"talk": [ASK, TELL]}, {"talk": [ASK, TELL], "tools": tools}])
    assert only(trying, spec).code == "not_tools"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__learn": "all", "data__answer": "{a}"}, "does not go with `answer`"),
        ({"data__chat_template_kwargs": {"tokenize": False}}, "may not hold 'tokenize'"),
        ({"data__chat": None, "data__prompt": "{q}", "data__answer": "{a}", "data__tools": "tools"}, "need `chat`"),
    ],
)
def test_what_is_said_of_chats_needs_chats(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(JobSpec, but(talking([ASK, TELL]), **changes))
    assert said in refusal.value.errors[0].detail


def test_a_job_that_learns_from_rewards_learns_no_turns() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(JobSpec, but(RL, data=but(talking([ASK, TELL]), data__learn="all")["data"]))
    assert "kind rl learns from rewards" in refusal.value.errors[0].detail


def test_the_tiny_model_has_no_chat_template(trying: Try) -> None:
    assert only(trying, but(RL, data__prompt=None, data__chat=[{"role": "user", "content": "{q}"}])).code == "no_chat_template"


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"model__dtype": "bfloat16"}, "0.027"),  # 0.06 / sqrt(5), and clips of 3e-4
        ({"model__dtype": "auto", "resources__class": "gpu"}, "0.027"),
        ({"model__dtype": "auto"}, None),
        ({"model__dtype": "float32", "resources__class": "gpu"}, None),
        ({"model__dtype": "bfloat16", "objective__surrogate": {"clip_low": 0.03, "clip_high": 0.03}}, None),
        ({"model__dtype": "bfloat16", "objective__surrogate": {"clip_low": 0.026, "clip_high": 0.03}}, "0.027"),
        ({"model__dtype": "bfloat16", "objective": {"preset": "grpo"}}, None),  # a clip of 0.2 at tokens
        ({"model__dtype": "bfloat16", "objective": {"surrogate": {"clip_low": 0.05, "clip_high": 0.2}}}, "0.06"),
        ({"model__dtype": "bfloat16", "objective": {"preset": "gspo", "ratio": {"kind": "segment", "chunk": 4}}}, "0.03"),
        ({"model__dtype": "bfloat16", "objective": {"preset": "cispo"}}, None),
        ({"model__dtype": "bfloat16", "rollout__max_completion_tokens": 60_000, "model__source": "org/model"}, None),
    ],
)
def test_clips_below_what_rounding_does_in_bfloat16_are_warned_of(
    changes: dict[str, Any], warned: str | None, trying: Try
) -> None:
    told = [text for text in trying(but(RL, **changes)).warnings if "bfloat16" in text]
    assert len(told) == (warned is not None)
    if warned is not None:
        assert f"by about {warned} in answers of 5 tokens" in told[0] and "model.dtype: float32" in told[0]


def test_answers_as_long_as_the_context_are_refused(trying: Try) -> None:
    found = refused(trying, but(RL, rollout__max_completion_tokens=128))
    assert {"/rollout/max_completion_tokens", "/eval/max_completion_tokens"} <= {error.pointer for error in found}


# ---------------------------------------------------------------- models


def test_a_folder_is_looked_into(trying: Try, world: SimpleNamespace, tmp_path: Path) -> None:
    error = only(trying, but(RL, model={"source": "/nowhere/at/all"}))
    assert (error.pointer, error.code) == ("/model/source", "model_not_found")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in only(trying, but(RL, model={"source": str(tmp_path / "empty")})).detail
    folder = world.settings.local_models_dir / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 16}')
    assert trying(but(RL, model={"source": "mine"})).spec["model"]["source"] == str(folder)
    assert (
        "context holds 16 tokens"
        in refused(trying, but(RL, model={"source": "mine"}, rollout__max_completion_tokens=16))[0].detail
    )
    (folder / "config.json").write_text("{")
    assert "cannot be read" in only(trying, but(RL, model={"source": "mine"})).detail


def test_a_folder_may_be_named_as_it_is_seen_from_where_one_stands(
    trying: Try, world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "models" / "mine"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    assert trying(but(RL, model={"source": "models/mine"})).spec["model"]["source"] == str(mine)
    operators = world.settings.local_models_dir / "mine"  # data/models/mine
    operators.mkdir(parents=True)
    (operators / "config.json").write_text("{}")
    for name in ("mine", "models/mine"):
        assert trying(but(RL, model={"source": name})).spec["model"]["source"] == str(operators)
    production = world.settings.model_copy(update={"environment": "production"})
    (tmp_path / "models" / "other").mkdir()
    other = parse(JobSpec, but(RL, model={"source": "models/other"}))
    model = resolve(world.store, production, "default", other).spec["model"]
    assert model["source"] == "models/other"  # a hub id, and no folder of whoever started the service


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused_at_once(trying: Try, world: SimpleNamespace) -> None:
    (world.settings.local_models_dir / "smollm").mkdir(parents=True)
    error = only(trying, but(RL, model={"source": "models/smolm"}))
    assert (error.pointer, error.code, error.got) == ("/model/source", "model_not_found", "models/smolm")
    assert "neither a folder on the service's machine nor a hub id that it can reach" in error.detail
    assert "did you mean 'smollm'?" in error.detail and "HF_HUB_OFFLINE" in error.detail


def test_a_name_that_is_nothing_names_what_is_here(trying: Try, world: SimpleNamespace) -> None:
    (world.settings.local_models_dir / "smollm").mkdir(parents=True)
    error = only(trying, but(RL, model={"source": "../data/models/smolm"}))
    assert error.allowed == ["tiny", "smollm"] and "did you mean 'smollm'?" in error.detail
    assert only(trying, but(RL, model={"source": "what is this"})).code == "model_not_found"


def test_local_names_never_lead_out_of_the_models_folder(trying: Try, world: SimpleNamespace) -> None:
    outside = world.settings.data_dir / "secret"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    (world.settings.local_models_dir).mkdir(parents=True)
    assert only(trying, but(RL, model={"source": "x/../../secret"})).code == "model_not_found"


def checkpoint(store: Store, **changes: Any) -> str:
    base = {
        "source": "tiny",
        "tiny": {"context": 64},
        "adapter": {"kind": "full"},
        "dtype": "float32",
        "from_checkpoint": {"id": "ckpt_old"},
    }
    row = {
        "id": new_id("ckpt"), "project": "default", "job_id": None, "step": 5, "attempt": 1, "adapter": "full", "model": base,
        "path": "checkpoints/x", "size_bytes": 1, "manifest_sha256": "0" * 64, "metrics": {}, "has_optimizer": True,
        "is_final": True, "created_at": utcnow(), "deleted_at": None,
    }  # fmt: skip
    with store.begin() as session:
        session.add(Checkpoint(**{**row, **changes}))
    return str(changes.get("id", row["id"]))


def test_a_checkpoint_brings_its_model_along(trying: Try, world: SimpleNamespace) -> None:
    id_ = checkpoint(world.store)
    resolved = trying(but(RL, model={"from_checkpoint": id_}))
    assert resolved.from_checkpoint_id == id_
    model = resolved.spec["model"]
    assert model["source"] == "tiny" and model["tiny"]["context"] == 64 and model["dtype"] == "float32"
    assert model["adapter"] == {"kind": "full"} and model["from_checkpoint"] == {"id": id_, "load": "weights"}
    assert trying(but(RL, model={"from_checkpoint": id_, "dtype": "bfloat16"})).spec["model"]["dtype"] == "bfloat16"
    assert trying(resolved.spec).spec == resolved.spec


def test_a_checkpoint_must_be_there_and_belong_to_the_project(trying: Try, world: SimpleNamespace) -> None:
    for id_ in ("ckpt_none", checkpoint(world.store, project="other"), checkpoint(world.store, deleted_at=utcnow())):
        error = only(trying, but(RL, model={"from_checkpoint": id_}))
        assert (error.pointer, error.code) == ("/model/from_checkpoint/id", "checkpoint_not_found")


def test_what_a_checkpoint_fixed_cannot_be_asked_for_otherwise(trying: Try, world: SimpleNamespace) -> None:
    id_ = checkpoint(world.store, has_optimizer=False)
    spec = but(
        RL,
        model={"from_checkpoint": {"id": id_, "load": "weights+optimizer"}, "adapter": {"kind": "lora"}, "source": "org/model"},
    )
    assert [error.pointer for error in refused(trying, spec)] == [
        "/model/from_checkpoint/load",
        "/model/source",
        "/model/adapter",
    ]
    lora = {"source": "org/model", "adapter": {"kind": "lora", "rank": 8, "target_modules": ["q", "v"]}}
    id_ = checkpoint(world.store, model=lora, adapter="lora")
    same = {"kind": "lora", "rank": 8, "target_modules": ["v", "q"], "dropout": 0.1}
    assert trying(but(RL, model={"from_checkpoint": id_, "adapter": same})).spec["model"]["adapter"]["dropout"] == 0.1
    assert only(trying, but(RL, model={"from_checkpoint": id_, "adapter": {**same, "rank": 16}})).pointer == "/model/adapter"


# ---------------------------------------------------------------- datasets, graders, metrics, procedural rows


def test_a_dataset_must_be_there_and_belong_to_the_project(trying: Try, world: SimpleNamespace) -> None:
    other = ingest(world.store, "other", "a", [b'{"q": "1", "a": "2"}\n'], 10**6)
    for id_ in ("ds_none", other.id):
        error = only(trying, but(RL, data__train={"source": "dataset", "id": id_}, data__eval=None))
        assert (error.pointer, error.code, error.got) == ("/data/train/id", "dataset_not_found", id_)


def test_a_secret_must_be_set_by_the_operator_and_its_value_is_never_shown(trying: Try) -> None:
    http = {"kind": "http", "url": "http://rewards.example.org:9/"}
    error = only(trying, but(RL, reward__graders=[{**http, "secret": "juge"}]))
    assert (
        error.pointer == "/reward/graders/0/secret" and "did you mean 'judge'" in error.detail and "s3cret" not in repr(error)
    )
    assert "s3cret" not in json.dumps(trying(but(RL, reward__graders=[{**http, "secret": "judge"}])).spec)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "localhost", "169.254.169.254", "[::ffff:10.0.0.1]", "127。0．0｡1"]
)
def test_a_grader_on_an_address_that_is_not_public_is_refused_at_once(trying: Try, host: str) -> None:
    error = only(trying, but(RL, reward__graders=[{"kind": "http", "url": f"http://{host}/"}]))
    assert (error.pointer, error.code) == ("/reward/graders/0/url", "address_refused")


def test_metrics_that_nobody_measures_are_refused(trying: Try) -> None:
    found = refused(
        trying, but(RL, early_stopping={"metric": "eval/reward/men", "patience": 1}, checkpoints__keep_best={"metric": "loss"})
    )
    assert [error.pointer for error in found] == ["/early_stopping/metric", "/checkpoints/keep_best/metric"]
    assert "did you mean 'eval/reward/mean'?" in found[0].detail
    for metric in ("eval/reward/exact", "eval/loss", "eval/greedy/reward/mean"):
        assert trying(but(RL, early_stopping={"metric": metric, "target": 1}, eval__also_greedy=True))
    error = only(trying, but(SUPERVISED, early_stopping={"patience": 1}))
    assert error.allowed == ["eval/loss"]


def test_procedural_rows_are_checked_without_making_any(trying: Try) -> None:
    pytest.importorskip("reasoning_gym")
    gym = {"source": "reasoning_gym", "task": "basic_arithmetic", "size": 1_000_000}
    spec = but(
        RL,
        model={"source": "org/model"},
        data={"train": gym, "prompt": "{question}"},
        reward__graders=[{"kind": "reasoning_gym"}],
    )
    assert trying(spec).estimates["train_rows"] == 1_000_000
    assert "did you mean 'basic_arithmetic'" in only(trying, but(spec, data__train__task="basic_arithmetc")).detail
    assert only(trying, but(spec, data__train__config={"nonsense": 1})).pointer == "/data/train/config/nonsense"
    assert only(trying, but(spec, data__train__config={"min_digits": 9})).pointer == "/data/train/config"
    assert "columns: answer, metadata, question" in only(trying, but(spec, data__prompt="{q}")).detail
    assert only(trying, but(spec, model={"source": "tiny"})).pointer == "/data/train/source"


def test_the_scorer_of_reasoning_gym_goes_with_its_rows_only(trying: Try) -> None:
    error = only(trying, but(RL, reward__graders=[{"kind": "reasoning_gym"}]))
    assert error.pointer == "/reward/graders/0/kind" and "data.train is inline" in error.detail


@pytest.mark.parametrize("value", ["a\0b", "\ud800", float("nan"), float("-inf")])
def test_what_no_database_takes_is_refused_with_its_place(value: Any, trying: Try) -> None:
    assert only(trying, but(RL, metadata={"note": [value]})).pointer == "/metadata/note/0"
    assert only(trying, but(RL, data__train__rows=[{"q": "1", "a": value}])).pointer == "/data/train/rows/0/a"
