"""Every grader's values, and what happens to answers that would keep a grader busy for ever."""

import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from service.errors import JobFailed
from service.jobs.data import open_source
from service.jobs.gym_rows import RowMaker
from service.jobs.resolve_reward import WITHOUT_ANSWER
from service.rewards import samples, sandbox, text
from service.rewards.rewards import Rewards
from service.rewards.samples import Graded, Sample
from service.rewards.texts import wrong_texts
from service.spec.data import ReasoningGymSource
from service.spec.reward import TAKEN, RewardSpec


def sample(completion: str, *, tokens: int | None = None, **row: Any) -> Sample:
    return Sample("a prompt", completion, len(completion) if tokens is None else tokens, False, row)


def grade(*graders: dict[str, Any], of: list[Sample]) -> list[Graded]:
    with Rewards(RewardSpec.model_validate({"graders": list(graders)}), job_id="job_test", secrets={}) as rewards:
        return rewards.grade(of)


def totals(grader: dict[str, Any], *answers: str, **row: Any) -> list[float | None]:
    return [graded.total for graded in grade(grader, of=[sample(answer, **row) for answer in answers])]


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "ANSWER_WITHIN_S", 1.0)
    monkeypatch.setattr(text, "PATTERN_WITHIN_S", 0.2)


# ---------------------------------------------------------------- values


def test_exact_strips_and_minds_the_case() -> None:
    assert totals({"kind": "exact", "reference": "{a}"}, "Yes", " Yes\n", "yes", "Yes!", a="Yes") == [1, 1, 0, 0]
    loose = {"kind": "exact", "reference": "{a}", "strip": False, "case_sensitive": False}
    assert totals(loose, "yEs", "Yes ", a="Yes") == [1, 0]


def test_exact_compares_with_a_rendered_template() -> None:
    assert totals({"kind": "exact", "reference": "{x} + {y} = {{{z}}}"}, "1 + two = {[3]}", x=1, y="two", z=[3]) == [1]


def test_contains_looks_anywhere() -> None:
    assert totals({"kind": "contains", "reference": "{a}"}, "it is Paris.", "paris", "", a="Paris") == [1, 0, 0]
    assert totals({"kind": "contains", "reference": "{a}", "case_sensitive": False}, "PARIS!", a="Paris") == [1]


def test_contains_refuses_an_empty_reference_because_every_answer_has_it() -> None:
    [graded] = grade({"kind": "contains", "reference": "{a}"}, of=[sample("anything", a="")])
    assert graded.total is None and "empty" in graded.errors["contains"]


def test_regex_searches_or_matches_in_full() -> None:
    assert totals({"kind": "regex", "pattern": r"\d{2}"}, "about 42", "4") == [1, 0]
    assert totals({"kind": "regex", "pattern": r"\d{2}", "full": True}, "about 42", "42") == [0, 1]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("42", "42", 1),
        ("The answer is 42.", "42", 1),
        ("41", "42", 0),
        ("", "42", 0),
        ("no idea", "42", 0),
        ("0.5", "1/2", 1),
        ("50%", "1/2", 1),
        ("1,000", "1000", 1),
        (r"$\frac{1}{2}$", "0.5", 1),
        (r"\frac12", r"\frac{1}{2}", 1),
        (r"\boxed{\sqrt{4}}", "2", 1),
        ("$x + 1$", "$1 + x$", 1),
        (r"\frac{1}{2}", "2", 0),
        ("102835", "102835", 1),
    ],
)
def test_number_compares_values_not_texts(answer: str, reference: str, expected: float, numbers: Rewards) -> None:
    assert numbers.grade([sample(answer, a=reference)])[0].total == expected


@pytest.fixture(scope="module")
def numbers() -> Iterator[Rewards]:
    """One process for all of them: it takes a second to import sympy."""
    with Rewards(
        RewardSpec.model_validate({"graders": [{"kind": "number", "reference": "{a}"}]}), job_id="j", secrets={}
    ) as rewards:
        yield rewards


def test_number_reads_only_the_end_of_a_long_answer(numbers: Rewards) -> None:
    assert numbers.grade([sample("7 " * 100_000 + "so 42", a="42")])[0].total == 1


def test_number_says_that_the_reference_is_none(numbers: Rewards) -> None:
    [graded] = numbers.grade([sample("42", a="forty-two")])
    assert graded.total is None and "the reference 'forty-two' holds no number" in graded.errors["number"]


def test_json_schema_wants_json_that_fits() -> None:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    answers = ['{"n": 1}', ' {"n": 1}\n', '{"n": "1"}', "{}", "n = 1", '{"n": NaN}', "[" * 100_000]
    assert totals({"kind": "json_schema", "schema": schema}, *answers) == [1, 1, 0, 0, 0, 0, 0]


def test_json_that_a_schema_cannot_look_at_is_wrong_and_no_error() -> None:
    tenths = {"kind": "json_schema", "schema": {"type": "number", "multipleOf": 0.1}}
    assert totals(tenths, "1e999", "-1e999", "NaN", "1" * 5000, "0.5") == [0, 0, 0, 0, 1]
    nested = {"kind": "json_schema", "schema": {"properties": {"c": {"$ref": "#"}}}}
    assert totals(nested, '{"c":' * 900 + "{}" + "}" * 900, '{"c": {}}') == [0, 1]


def test_multiples_are_those_of_the_decimals_as_written() -> None:
    cents = {"kind": "json_schema", "schema": {"properties": {"price": {"multipleOf": 0.01}}}}
    answers = [f'{{"price": {price}}}' for price in ("19.99", "0.07", "1e-2", "3", '"free"', "19.995", "1e-3")]
    assert totals(cents, *answers) == [1, 1, 1, 1, 1, 0, 0]


def test_the_end_of_a_schemas_pattern_is_the_end_of_the_text() -> None:
    cents = {"kind": "json_schema", "schema": {"type": "string", "pattern": r"^[$a]+\$$"}}
    assert totals(cents, '"a$"', '"a$\\n"', '"$$"', '"a"') == [1, 0, 1, 0]
    keys = {"kind": "json_schema", "schema": {"patternProperties": {"^a$": {"type": "integer"}}, "additionalProperties": False}}
    assert totals(keys, '{"a": 1}', '{"a\\n": 1}') == [1, 0]


def test_json_schema_never_fetches_a_reference() -> None:
    schema = {"$ref": "http://127.0.0.1:9/schema.json"}
    [error] = wrong_texts(RewardSpec.model_validate({"graders": [{"kind": "json_schema", "schema": schema}]}))
    assert error.pointer == "/reward/graders/0/schema" and "only references inside the schema" in error.detail


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        ("ratio", "abc", "abd", 2 / 3),
        ("partial_ratio", "say abc now", "abc", 1),
        ("token_sort_ratio", "world hello", "hello world", 1),
        ("token_set_ratio", "a a b", "a b", 1),
        ("jaro_winkler", "abc", "abc", 1),
        ("position", "abcd", "abxd", 3 / 4),
        ("position", "abcd", "ab", 1 / 2),
        ("position", "ab", "abcd", 1 / 2),
        ("position", "", "", 1),
        *((metric, "", "", 1) for metric in ("ratio", "partial_ratio", "token_sort_ratio", "token_set_ratio", "jaro_winkler")),
        *((metric, "", "a", 0) for metric in ("ratio", "partial_ratio", "token_sort_ratio", "token_set_ratio", "jaro_winkler")),
        ("token_set_ratio", " ", "\n", 1),
    ],
)
def test_similarity_runs_from_0_to_1(metric: str, answer: str, reference: str, expected: float) -> None:
    grader = {"kind": "similarity", "metric": metric, "reference": "{a}"}
    assert totals(grader, answer, a=reference) == [pytest.approx(expected)]


def test_length_falls_linearly_over_the_slack() -> None:
    of = [sample("x", tokens=n) for n in (2, 3, 4, 8, 9, 10, 12, 13)]
    grader = {"kind": "length", "min_tokens": 4, "max_tokens": 8, "slack": 4}
    assert [graded.total for graded in grade(grader, of=of)] == [0.5, 0.75, 1, 1, 0.75, 0.5, 0, 0]
    strict = {"kind": "length", "max_tokens": 8}
    assert [graded.total for graded in grade(strict, of=of[3:5])] == [1, 0]


def test_extract_grades_the_last_match() -> None:
    grader = {"kind": "exact", "reference": "{a}", "extract": r"answer: (\d+)"}
    assert totals(grader, "answer: 6, no, answer: 7", "answer: 7, no, answer: 6", "7", a="7") == [1, 0, 0]
    assert totals({"kind": "exact", "reference": "{a}", "extract": r"\d+"}, "6 or 7", a="7") == [1]
    assert totals({"kind": "exact", "reference": "{a}", "extract": r"x|(\d+)"}, "7 x", a="7") == [0]


def test_extract_takes_the_group_that_took_part_and_no_empty_match() -> None:
    either = {"kind": "exact", "reference": "{a}", "extract": r"answer: (\d+)|#### (\d+)"}
    assert totals(either, "answer: 6, no\n#### 7", "#### 6, no, answer: 7", "answer: 7\n#### 6", a="7") == [1, 1, 0]
    assert totals({"kind": "exact", "reference": "{a}", "extract": r"\d*"}, "it is 7", "7 it is", a="7") == [1, 1]


def test_extract_finds_no_number_that_the_token_limit_cut_off() -> None:
    grader = {"kind": "exact", "reference": "42", "extract": r"#### (\d+)"}
    answers = [("#### 42", True), ("#### 42", False), ("#### 42\n", True)]
    graded = grade(grader, of=[Sample("p", text, 9, truncated, {}) for text, truncated in answers])
    assert [one.total for one in graded] == [0, 1, 1]


@pytest.mark.parametrize("answer", ["it is 42", "it is 42.", "it is 4e-", "it is 4E", "it is 42,", "it is 42/"])
def test_extract_finds_no_number_that_was_cut_behind_its_sign(answer: str) -> None:
    grader = {"kind": "regex", "pattern": ".", "extract": r"is (\S+)"}
    of = [Sample("p", answer, 9, cut, {}) for cut in (True, False)]
    assert [one.total for one in grade(grader, of=of)] == [0, 1]


def test_number_knows_when_the_token_limit_cut_an_answer_off() -> None:
    of = [Sample("p", "so 42", 9, truncated, {}) for truncated in (True, False)]
    assert [one.total for one in grade({"kind": "number", "reference": "42"}, of=of)] == [0, 1]


@pytest.mark.parametrize("name", TAKEN)
def test_a_graders_name_leaves_the_metrics_of_the_whole_reward_alone(name: str) -> None:
    with pytest.raises(ValueError, match=f"reward/{name} is a metric of every job"):
        RewardSpec.model_validate({"graders": [{"kind": "exact", "reference": "x", "name": name}]})


def test_the_reward_is_the_weighted_sum() -> None:
    [graded] = grade(
        {"kind": "exact", "reference": "{a}", "weight": 2.0},
        {"kind": "length", "name": "short", "max_tokens": 1, "slack": 10, "weight": -0.5},
        of=[sample("abc", a="abc")],
    )
    assert graded.scores == {"exact": 1.0, "short": 0.8}
    assert graded.total == pytest.approx(2.0 - 0.4)


def test_one_failing_grader_leaves_the_sample_without_a_total_and_the_others_alone() -> None:
    first, second = grade(
        {"kind": "contains", "reference": "{a}"},
        {"kind": "length", "max_tokens": 9},
        of=[sample("x", a=""), sample("x", a="x")],
    )
    assert (first.total, first.scores) == (None, {"contains": None, "length": 1.0})
    assert (second.total, second.errors) == (2.0, {})


# ---------------------------------------------------------------- reasoning-gym


@pytest.fixture(scope="module")
def gym_scorers() -> Iterator[Rewards]:
    """One process for all of them: it takes seconds to import reasoning-gym."""
    with Rewards(RewardSpec.model_validate({"graders": [{"kind": "reasoning_gym"}]}), job_id="j", secrets={}) as rewards:
        yield rewards


def test_reasoning_gym_scores_with_the_tasks_own_scorer(gym_scorers: Rewards) -> None:
    gym = pytest.importorskip("reasoning_gym")
    arithmetic, arc = (
        gym.create_dataset("basic_arithmetic", seed=1, size=2)[0],
        gym.create_dataset("arc_agi", seed=1, size=2)[0],
    )
    of = [
        Sample("p", f" {arithmetic['answer']}\n", 1, False, arithmetic),
        Sample("p", "not that", 1, False, arithmetic),
        Sample("p", arc["answer"], 1, False, arc),  # its metadata holds tuples, which JSON would lose
        sample("1", metadata={}),
    ]
    graded = gym_scorers.grade(of)
    assert [one.total for one in graded] == [1, 0, 1, None]
    assert "not made by reasoning-gym" in graded[3].errors["reasoning_gym"]


MAKER = RowMaker()  # one process for all of them


def rows_of(task: str, **config: Any) -> list[dict[str, Any]]:
    pytest.importorskip("reasoning_gym")
    source = ReasoningGymSource(source="reasoning_gym", task=task, config=config, size=4, seed=1)
    return [dict(row) for row in open_source(source, lambda _: Path(), "/data/train", MAKER)[:]]


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("word_ladder", {"min_word_length": 3, "max_word_length": 3}),
        ("decimal_arithmetic", {"min_num_decimal_places": 6, "max_num_decimal_places": 6, "precision": 12}),
        ("composite", {"datasets": [{"name": "chain_sum", "weight": 2}, {"name": "gcd", "config": {"max_value": 50}}]}),
        ("word_sorting", {"transformation": "lowercase"}),
        ("time_intervals", {"min_date": "2000-01-01", "max_date": "2001-01-01", "min_time": "08:00:00"}),
        ("arc_agi", {"board_format_opts": {"alphabet": list("abcdefghij")}}),
    ],
)
def test_reasoning_gym_scores_with_the_sources_configuration(task: str, config: dict[str, Any], gym_scorers: Rewards) -> None:
    rows = rows_of(task, **config)
    graded = gym_scorers.grade([Sample("p", row["answer"], 1, False, row) for row in rows])
    assert [(one.total, one.errors) for one in graded] == [(1.0, {})] * 4


def test_six_decimal_places_are_six_decimal_places(gym_scorers: Rewards) -> None:
    [row, *_] = rows_of("decimal_arithmetic", min_num_decimal_places=6, max_num_decimal_places=6, precision=12)
    off = f"{float(row['answer']) + 0.0004:.6f}"
    assert [one.total for one in gym_scorers.grade([Sample("p", text, 1, False, row) for text in (row["answer"], off)])] == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("task", "text"),
    [("prime_factorization", "I do not know"), ("game_of_life", "{}"), ("boxnet", "0"), ("spell_backward", "x")],
)
def test_a_text_that_a_scorer_cannot_read_gets_nothing(task: str, text: str, gym_scorers: Rewards) -> None:
    graded = gym_scorers.grade([Sample("p", text, 1, False, row) for row in rows_of(task)])
    assert [(one.total, one.errors) for one in graded] == [(0.0, {})] * 4


def test_no_scorer_pays_more_than_1(gym_scorers: Rewards) -> None:
    rows = rows_of("spell_backward")
    graded = gym_scorers.grade([Sample("p", row["answer"] * 3, 1, False, row) for row in rows])
    assert all(0 <= one.total <= 1 for one in graded if one.total is not None)


def test_strict_pays_the_tasks_own_answer_only(gym_scorers: Rewards) -> None:
    rows = rows_of("puzzle24")
    of = [Sample("p", text, 1, False, rows[0]) for text in (rows[1]["answer"], rows[0]["answer"], f" {rows[0]['answer']}\n")]
    assert [one.total for one in gym_scorers.grade(of)] == [1, 1, 1]
    assert [one.total for one in grade({"kind": "reasoning_gym", "strict": True}, of=of)] == [0, 1, 1]


def test_the_docs_tell_what_every_task_of_the_measured_version_pays() -> None:
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    told = (Path(__file__).parents[2] / "docs" / "graders.md").read_text()
    assert f"Measured with reasoning-gym {version('reasoning-gym')}" in told
    assert [task for task in DATASETS if f"`{task}`" not in told and f"| {task} |" not in told] == []
    without = {task for task in DATASETS if f"| {task} | none |" in told}
    assert without == WITHOUT_ANSWER


def test_an_answer_that_a_scorer_evaluates_can_do_no_harm(gym_scorers: Rewards, tmp_path: Path) -> None:
    gym = pytest.importorskip("reasoning_gym")
    row, prey = gym.create_dataset("countdown", seed=1, size=2)[0], tmp_path / "prey"
    prey.write_text("alive")
    answers = [
        f"__import__('os').remove('{prey}')",
        f"__import__('os').system('rm {prey}')",
        f"open('{prey}', 'w')",
        row["answer"],
    ]
    graded = gym_scorers.grade([Sample("p", answer, 1, False, row) for answer in answers])
    assert prey.read_text() == "alive"
    assert graded[3].total == 1


# ---------------------------------------------------------------- nothing hangs


def test_a_tower_of_exponents_is_an_error_of_its_sample_only(short_patience: None) -> None:
    began = time.monotonic()
    graded = grade({"kind": "number", "reference": "{a}"}, of=[sample(answer, a="42") for answer in ("$9^{9^{9^{9}}}$", "42")])
    assert time.monotonic() - began < 30
    assert [one.total for one in graded] == [None, 1]
    assert "took longer than 1 s" in graded[0].errors["number"]


def test_deep_nesting_is_no_match(numbers: Rewards) -> None:
    answers = ["(" * 4000, "$" + "9^{" * 100 + "9" + "}" * 100 + "$", "1" * 100_000]
    assert [graded.total for graded in numbers.grade([sample(answer, a="1") for answer in answers])] == [0, 0, 0]


def test_a_pattern_that_explodes_is_an_error_of_its_sample_only(short_patience: None) -> None:
    graded = grade({"kind": "regex", "pattern": "^(a|aa)+$"}, of=[sample("a" * 80 + "!"), sample("aaa")])
    assert [one.total for one in graded] == [None, 1]
    assert "took longer than 0.2 s" in graded[0].errors["regex"]
    [extracted] = grade({"kind": "exact", "reference": "x", "extract": "(a|aa)+$"}, of=[sample("a" * 80 + "!")])
    assert "took longer than 0.2 s" in extracted.errors["exact"]


def test_a_schema_whose_pattern_explodes_is_an_error_of_its_sample_only(short_patience: None) -> None:
    grader = {"kind": "json_schema", "schema": {"type": "string", "pattern": "^(a|aa)+$"}}
    graded = grade(grader, of=[sample('"' + "a" * 80 + '!"'), sample('"aaa"')])
    assert [one.total for one in graded] == [None, 1]


def test_a_batch_gives_up_on_answers_that_bring_nothing(short_patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LOST_WITHIN_S", 0.5)
    graded = grade({"kind": "regex", "pattern": "^(a|aa)+$"}, of=[sample("a" * 80 + "!") for _ in range(50)])
    assert all(one.total is None for one in graded)
    assert "not graded: other answers of this batch" in graded[-1].errors["regex"]


def test_a_grader_whose_process_was_killed_starts_another(numbers: Rewards) -> None:
    numbers.grade([sample("1", a="1")])
    grader: Any = numbers._graders["number"]
    child = grader._sandbox._child
    child.kill()
    child.wait()
    assert numbers.grade([sample("2", a="2")])[0].total == 1


def test_closing_ends_the_graders_process() -> None:
    rewards = Rewards(RewardSpec.model_validate({"graders": [{"kind": "json_schema", "schema": {}}]}), job_id="j", secrets={})
    assert rewards.grade([sample("1")])[0].total == 1
    grader: Any = rewards._graders["json_schema"]
    child = grader._sandbox._child
    rewards.close()
    assert child.poll() is not None
    rewards.close()


def test_the_graders_process_has_no_secrets_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_DATABASE_URL", "postgresql://u:hunter2@db/x")
    rewards = Rewards(RewardSpec.model_validate({"graders": [{"kind": "json_schema", "schema": {}}]}), job_id="j", secrets={})
    rewards.grade([sample("1")])
    grader: Any = rewards._graders["json_schema"]
    environment = Path(f"/proc/{grader._sandbox._child.pid}/environ").read_bytes()
    rewards.close()
    assert b"PATH=" in environment and b"RATCHET" not in environment and b"hunter2" not in environment


def test_a_kind_that_cannot_start_fails_the_job_with_a_name() -> None:
    broken = sandbox.Sandbox("similarity", {"nonsense": 1}, "/reward/graders/0")
    with pytest.raises(JobFailed) as caught:
        broken.ask_all([("a", "b")])
    assert (caught.value.code, caught.value.failure.pointer) == ("grader_unavailable", "/reward/graders/0")
