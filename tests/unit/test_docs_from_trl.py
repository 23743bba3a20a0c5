"""docs/from-trl.md: what it names is there, and its example is a valid spec."""

import re
from pathlib import Path

import yaml

from service.spec.job import JobSpec, RLSpec
from service.spec.presets import PRESETS
from service.validation import parse

TEXT = (Path(__file__).parents[2] / "docs" / "from-trl.md").read_text()


def test_its_example_is_the_job_that_it_says() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    spec = parse(JobSpec, yaml.safe_load(example))
    assert isinstance(spec, RLSpec)
    axes = spec.objective.resolve()
    assert (axes["ratio"]["kind"], axes["aggregate"]["kind"], axes["advantage"]["scale"]) == ("token", "seq", "group_std")
    assert (axes["surrogate"]["clip_low"], axes["surrogate"]["clip_high"]) == (0.2, 0.2)
    assert (axes["kl"]["place"], axes["kl"]["estimator"], axes["kl"]["coef"]) == ("loss", "k3", 0.04)
    assert spec.rollout.prompts_per_step * spec.rollout.group_size == 256


def test_the_presets_that_it_names_are_there() -> None:
    assert set(re.findall(r"preset: (\w+)", TEXT)) <= set(PRESETS)


def test_a_spec_without_a_preset_is_trls_default() -> None:
    axes = parse(JobSpec, {**yaml.safe_load(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[0]), "objective": {}})
    assert isinstance(axes, RLSpec)
    resolved = axes.objective.resolve()
    assert (resolved["aggregate"]["kind"], resolved["kl"]["place"]) == ("token", "none")
    assert resolved["select"] == {"truncated": False, "zero_variance": False, "top_entropy": resolved["select"]["top_entropy"]}
