"""Tells, pauses or fails a job that has learnt nothing for many steps: `limits.on_no_signal`."""

from collections.abc import Mapping

from service.errors import JobFailed
from service.signals import SIGNS, signs_of
from service.spec.job import RLSpec, SupervisedSpec
from service.validation.words import counted
from workers.loops.progress import Progress
from workers.tenure.tenure import EventRow


def updates_of(spec: RLSpec | SupervisedSpec) -> int:
    """Optimizer steps that each training step brings."""
    return spec.update.minibatches * spec.update.epochs if isinstance(spec, RLSpec) else 1


def no_signal(progress: Progress, spec: RLSpec | SupervisedSpec, metrics: Mapping[str, float]) -> list[EventRow]:
    """Count a step's signs, and return a warning for each that was shown limits.no_signal_steps times in a row."""
    shown = signs_of(metrics, updates_of(spec))
    progress.signs = {name: progress.signs.get(name, 0) + 1 for name in shown}
    due = [name for name, count in progress.signs.items() if count == spec.limits.no_signal_steps]
    return [
        (
            "warning",
            {"step": progress.step, "metric": SIGNS[name].metric, "detail": f"{_detail(name, spec)}; {SIGNS[name].remedy}"},
        )
        for name in due
    ]


def given_up(progress: Progress, spec: RLSpec | SupervisedSpec) -> JobFailed | None:
    """The failure of a job that has no signal; None if it has one, or may go on without.

    The count begins anew, so that a job that is resumed has as many steps again."""
    if spec.limits.on_no_signal == "warn":
        return None
    due = [name for name, count in progress.signs.items() if count >= spec.limits.no_signal_steps and SIGNS[name].stops]
    if not due:
        return None
    progress.signs = {}
    return JobFailed(
        "no_signal_paused" if spec.limits.on_no_signal == "pause" else "no_signal",
        _detail(due[0], spec),
        hint=SIGNS[due[0]].remedy,
    )


def _detail(name: str, spec: RLSpec | SupervisedSpec) -> str:
    return f"no signal for {counted(spec.limits.no_signal_steps, 'step')} ({name}): {SIGNS[name].cause}"
