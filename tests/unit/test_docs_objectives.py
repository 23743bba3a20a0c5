"""docs/objectives.md says what is so: its snippets run as printed, its tables are the code's, its figures are current."""

import contextlib
import importlib
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from job_specs import RL
from service.cli import demo
from service.edge.arrays import parse_arrays
from service.losses import answers
from service.losses.request import check
from service.relay.orders import Answer, Order
from service.relay.queue import Taken
from service.spec import axes
from service.spec.job import JobSpec
from service.spec.objective import ObjectiveSpec
from service.spec.presets import PRESETS
from service.validation import parse
from workers.losses.serve import Round

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "objectives.md").read_text()
sys.path.append(str(DOCS / "figures"))
draw, measure, page, rollouts = map(importlib.import_module, ("draw", "measure", "page", "rollouts"))
MEASURED = json.loads((DOCS / "figures/measured.json").read_text())
# The models in which an axis's choices are written.
CHOICES = {
    "ratio": get_args(axes.AnyRatio),
    "surrogate": get_args(axes.AnySurrogate),
    "aggregate": get_args(axes.AnyAggregate),
    "advantage": (axes.Advantage,),
    "kl": (axes.Kl,),
    "correct": (axes.Correct,),
}


def blocks(*languages: str) -> list[tuple[str, str]]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a line of text, as cells without their quotes."""
    lines = PAGE.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


# ---------------------------------------------------------------- snippets


def test_python_snippets_print_what_the_page_says():
    """In one namespace, in order; a text block is what the snippet before it prints."""
    namespace: dict[str, Any] = {}
    found = blocks("python", "text")
    assert [language for language, _ in found].count("text") == 4
    printed = io.StringIO()
    for language, text in found:
        if language == "text":
            assert printed.getvalue() == text
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "docs/objectives.md", "exec"), namespace)


def test_yaml_snippets_are_objectives_of_a_job():
    specs = [RL | yaml.safe_load(text) for _, text in blocks("yaml") if text.startswith("objective:")]
    assert len(specs) == 5
    gspo, changed, ppo, segment, corrected = (parse(JobSpec, spec).objective.resolve() for spec in specs)
    assert gspo == ObjectiveSpec.model_validate("gspo").resolve()
    assert changed["surrogate"] == gspo["surrogate"] | {"clip_high": 5e-4}
    assert changed["aggregate"]["kind"] == "token" and changed["kl"]["coef"] == 0.01
    assert ppo["preset"] == "ppo"
    assert segment["ratio"] == {"kind": "segment", "chunk": 64}
    assert corrected["correct"]["mask_level"] == "geometric"


def test_the_loss_request_is_answered_as_the_page_says():
    """From the body of the curl command to the JSON of the answer, by way of the worker."""
    (request,) = [text for _, text in blocks("sh") if "/v1/losses" in text]
    (said,) = [json.loads(text) for _, text in blocks("json")]
    body = re.search(r"-d '\n(.*)'\n$", request, re.DOTALL)
    assert body is not None
    sent = check(parse_arrays(body[1].encode()))
    raw = Order("loss_1", "default", 2e9, sent.all_or_nothing, sent.items, sent.tensors).encode()
    raws: list[bytes] = []
    Round([Taken("loss_1", "default", raw, b"")], lambda done: raws.extend(raw for _, raw in done)).run()
    answer = json.loads(answers.as_json(Answer.decode(raws[0])))
    metrics = answer["data"][0].pop("metrics")
    assert {"policy/ratio_mean", "policy/clip_fraction_high"} <= metrics.keys()
    assert same(answer, said), answer


def same(one: Any, other: Any) -> bool:
    """Equal, numbers to 1e-6."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return math.isclose(one, other, abs_tol=1e-6) if isinstance(one, float) and not isinstance(other, str) else one == other


# ---------------------------------------------------------------- tables


def test_what_is_made_from_code_is_current():
    assert len(page.BLOCK.findall(PAGE)) == len(page.BLOCKS)
    assert page.filled(PAGE) == PAGE, "docs/objectives.md is not current: python docs/figures/page.py"


def test_every_preset_stands_there_with_what_it_sets():
    """Read back from the table, each is the preset."""
    rows = table("## Presets")
    assert [code(name)[0] for name, *_ in rows] == list(PRESETS)
    for name, _, sets, paper in rows:
        written = {axis: value for line in code(sets) for axis, value in yaml.safe_load(line).items()}
        preset = ObjectiveSpec.model_validate(code(name)[0]).resolve()
        assert ObjectiveSpec.model_validate(written).resolve() | {"preset": preset["preset"]} == preset
        assert (PRESETS[code(name)[0]].arxiv or "") in paper


def test_every_value_of_every_axis_stands_there():
    rows = table("## The seven axes")
    said = {code(axis)[0]: set(code(values)) for axis, values, _ in rows}
    assert said.pop("anchor") == set(get_args(ObjectiveSpec.model_fields["anchor"].annotation))
    for axis, models in CHOICES.items():
        fields = {name for model in models for name in model.model_fields}
        literals = [get_args(field.annotation) for model in models for field in model.model_fields.values()]
        values = {value for some in literals for value in some if isinstance(value, str)}
        assert said.pop(axis) - (fields - values) == values
    assert not said


def test_the_worked_example_is_what_the_formulas_give():
    """The page's numbers against plain arithmetic, to 1e-6."""
    found: dict[str, list[list[list[float]]]] = {}
    for label, *cells in table("### The worked example"):
        numbers = [[float(x) for x in cell.split(", ")] for cell in cells if re.fullmatch(r"-?[\d.]+(, -?[\d.]+)*", cell)]
        found.setdefault(label, []).append(numbers)
    r = [[math.exp(d) for d in answer] for answer in ([0.2, 0.2, 0.1, 0.1], [0.2, 0.2, 0.2])]
    s = [[math.exp(0.15)] * 4, [math.exp(0.2)] * 3]
    assert same(found["ratio"], [r, s, s])
    grpo = [[-min(x, 1.2) for x in r[0]], r[1]]
    gspo = [[-1.0004] * 4, s[1]]
    assert same(found["loss a token"], [grpo, gspo, gspo])
    cut = [[0.0] * 4, [s[1][0] / 6] * 3]
    assert same(found["gradient"], [[[0.0, 0.0, -r[0][2] / 8, -r[0][3] / 8], [r[1][0] / 6] * 3], cut, cut])
    assert same(found["**grpo** loss"], [[[(sum(grpo[0]) / 4 + sum(grpo[1]) / 3) / 2]]])
    assert same(found["**gspo** loss"], [[[(-1.0004 + math.exp(0.2)) / 2]]])
    assert found["**gspo_token** loss"] == found["**gspo** loss"]


def test_the_guards_are_about_what_stands_there():
    assert len(table("is refused, for example")) == len(page.REFUSED)
    for row, _ in table("draws a warning: in the answer"):
        assert not code(row) or len(ObjectiveSpec.model_validate(json.loads(code(row)[0])).warnings(updates_per_rollout=4)) == 1
    assert not any(ObjectiveSpec.model_validate(preset).warnings(updates_per_rollout=4) for preset in ("grpo", "gspo"))


def test_every_parameter_stands_there():
    """What the schema knows of an axis and the page does not say, in words or in a table."""
    models = {model for models in CHOICES.values() for model in models} | {axes.Select}
    names = {name for model in models for name in model.model_fields}
    assert {name for name in names if not re.search(rf"`(\w+\.)?{name}`", PAGE)} <= {"kind"}


# ---------------------------------------------------------------- what is said in words


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", PAGE):
        target = link[0] or link[1]
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        assert (DOCS / name).exists(), target
        assert not anchor or anchor in anchors((DOCS / name).read_text() if name else PAGE), target


def test_the_demo_uses_what_the_page_says():
    spec = demo.gspo_spec({"train": "a", "held_out": "b"}, "c", 0)
    surrogate, rate = spec["objective"]["surrogate"], spec["optimizer"]["learning_rate"]
    assert (spec["objective"]["preset"], surrogate["clip_low"], surrogate["clip_high"], rate) == ("gspo", 0.1, 0.1, 7e-4)


def test_the_made_up_answer_is_what_its_caption_says():
    ratios = draw.LOG_RATIOS.exp()[0]
    assert (round(float(ratios.min()), 2), round(float(ratios.max()), 2)) == (0.74, 1.35)
    assert float(draw.LOG_RATIOS.mean()) == pytest.approx(0, abs=1e-12)
    results = [draw.compute(spec, draw.LOG_RATIOS, draw.ADVANTAGES, -2.0) for spec in ("gspo", "gspo_token")]
    gspo, gspo_token = (-8 * gradient[0] for gradient, _ in results)
    assert gspo.tolist() == pytest.approx([0.25] * 8)
    assert gspo_token.tolist() == pytest.approx(draw.ADVANTAGES[0].tolist())
    gradient, outputs = draw.compute({"preset": "grpo", "kl": "none"}, draw.LOG_RATIOS, draw.ADVANTAGES, -2.0)
    assert int((outputs.clipped_low | outputs.clipped_high).sum()) == int((gradient == 0).sum()) == 3


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("theme", list(draw.THEMES))
@pytest.mark.parametrize("name", list(draw.FIGURES))
def test_the_figure_is_what_its_script_draws(name, theme):
    """To half a point: numbers may differ in their last digit between machines."""
    path = DOCS / f"figures/{name}-{theme}.svg"
    now, kept = draw.draw(name, theme, MEASURED), path.read_text()
    number = re.compile(r"-?\d+(?:\.\d+)?")
    assert number.sub("", now) == number.sub("", kept), "not current: python docs/figures/draw.py"
    pairs = zip(number.findall(now), number.findall(kept), strict=True)
    assert max(abs(float(a) - float(b)) for a, b in pairs) <= 0.5
    assert len(kept.encode()) < 60_000
    assert f"figures/{name}-{theme}.svg" in PAGE


def test_what_the_figures_show_of_the_run_holds():
    """What the text says of them in words."""
    spread = MEASURED["spread"]
    sequence, token, product = ([row[name] for row in spread] for name in ("sequence", "token", "product"))
    assert sequence == sorted(sequence, reverse=True) and product == sorted(product)
    assert max(token) < 1.3 * min(token)
    assert all(0.8 < row["sequence"] / (row["token"] / row["tokens"] ** 0.5) < 1.1 for row in spread)
    shares = MEASURED["clipped_at"]
    assert 50 < shares["sequence"]["0.0003"] / shares["token"]["0.2"] < 200


def test_the_run_under_the_figures_can_be_done_again(tmp_path):
    """A short one: what is kept are log-probs that moved since they were sampled, and numbers of the same kind are made."""
    run = rollouts.Run(
        warm_up_steps=3, rollouts=1, groups_a_size=1, group_size=2, updates=2, objective="rloo", learning_rate=0.01
    )
    seen, rewards = rollouts.record(run, tmp_path)
    assert len(seen) == len(rewards) == 1
    part = seen[0]
    assert (part.log_probs[~part.response_mask] == 0).all()
    assert part.old_log_probs.shape == part.log_probs.shape == part.response_mask.shape
    assert measure.extremes(seen, "token").keys() == MEASURED["ratio"]["token"].keys()
    assert 0 <= measure.clipped(seen, "sequence", 1e-4) <= 1
