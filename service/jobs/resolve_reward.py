"""Checks of graders and of the metrics that other sections name."""

from service.errors import FieldError
from service.metric_names import EVAL, EVAL_GREEDY, EVAL_LOSS, OF_ANSWERS, find
from service.settings import Settings
from service.spec.addresses import refusal
from service.spec.data import ReasoningGymSource, SplitSource
from service.spec.job import RLSpec, SupervisedSpec
from service.spec.reward import HttpGrader
from service.validation import did_you_mean

# Tasks of reasoning-gym whose rows have no answer, only a scorer (docs/graders.md).
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
NETWORKS = "RATCHET_GRADER_NETWORKS"
BETTER = {"up": "max", "down": "min"}  # the mode of a metric


def check_reward(spec: RLSpec | SupervisedSpec, settings: Settings) -> list[FieldError]:
    """Errors for graders that need something that this job or this service does not have."""
    errors: list[FieldError] = []
    for number, grader in enumerate(spec.reward.graders if spec.reward else []):
        pointer = f"/reward/graders/{number}"
        if grader.kind == "reasoning_gym" and (others := _other_sources(spec)):
            detail = f"the grader reasoning_gym scores rows of the source reasoning_gym only, but {others}"
            errors.append(FieldError(f"{pointer}/kind", detail, "grader_without_source", grader.kind))
        if grader.kind == "reasoning_gym" and grader.strict and (without := sorted(_tasks(spec) & WITHOUT_ANSWER)):
            detail = f"strict pays the task's own answer only, and {', '.join(without)} gives none (reasoning-gym 0.1.25)"
            errors.append(FieldError(f"{pointer}/strict", detail, "task_without_answer", got=True))
        if isinstance(grader, HttpGrader) and (why := refusal(grader.url, settings.grader_networks, NETWORKS)):
            errors.append(FieldError(f"{pointer}/url", why, "address_refused"))
        if isinstance(grader, HttpGrader) and grader.secret is not None and grader.secret not in settings.grader_secrets:
            names = sorted(settings.grader_secrets)
            detail = f"the operator has set no secret of this name (RATCHET_GRADER_SECRETS){did_you_mean(grader.secret, names)}"
            errors.append(FieldError(f"{pointer}/secret", detail, "unknown_secret", allowed=names))
    return errors


def _tasks(spec: RLSpec | SupervisedSpec) -> set[str]:
    sources = [source for source in (spec.data.train, spec.data.eval) if isinstance(source, ReasoningGymSource)]
    parts = [part for source in sources if source.task == "composite" for part in source.config.get("datasets") or []]
    return {source.task for source in sources} | {str(part.get("name")) for part in parts if isinstance(part, dict)}


def _other_sources(spec: RLSpec | SupervisedSpec) -> str:
    """Which graded rows come from another source; a split belongs to the training source."""
    parts = {"data.train": spec.data.train, "data.eval": spec.data.eval}
    others = [
        f"{name} is {source.source}"
        for name, source in parts.items()
        if source is not None and not isinstance(source, ReasoningGymSource | SplitSource)
    ]
    return ", ".join(others)


def wrong_ways(spec: RLSpec | SupervisedSpec) -> list[str]:
    """Warnings where early_stopping or keep_best take the worse values of their metric for the better ones."""
    rules = {"early_stopping": spec.early_stopping, "checkpoints.keep_best": spec.checkpoints.keep_best}
    right = {
        rule.metric: BETTER.get(found.better)
        for rule in rules.values()
        if rule and (found := find(rule.metric)) and found.name == rule.metric  # a grader's own score may be a penalty
    }
    return [
        f"{place}.mode is {rule.mode}, and of {rule.metric} the {'smaller' if mode == 'min' else 'larger'} values are better: "
        f"write mode: {mode}"
        for place, rule in rules.items()
        if rule is not None and (mode := right.get(rule.metric)) not in (None, rule.mode)
    ]


def check_metrics(spec: RLSpec | SupervisedSpec) -> list[FieldError]:
    """Errors if early_stopping or keep_best name a metric that the job's evaluations do not measure."""
    known = _eval_metrics(spec)
    rules = {"/early_stopping/metric": spec.early_stopping, "/checkpoints/keep_best/metric": spec.checkpoints.keep_best}
    return [
        FieldError(
            pointer,
            f"this job's evaluations do not measure {rule.metric!r}{did_you_mean(rule.metric, known)}; known: "
            + ", ".join(known),
            "unknown_metric",
            rule.metric,
            known,
        )
        for pointer, rule in rules.items()
        if rule is not None and rule.metric not in known
    ]


def _eval_metrics(spec: RLSpec | SupervisedSpec) -> list[str]:
    """What workers.loops.evaluation writes for this job."""
    known = [EVAL_LOSS] if spec.data.answer is not None or isinstance(spec, SupervisedSpec) else []
    if spec.reward is not None:
        graders = [grader.name or grader.kind for grader in spec.reward.graders]
        prefixes = [EVAL, EVAL_GREEDY] if spec.eval.also_greedy else [EVAL]
        known = [prefix + name for prefix in prefixes for metric in OF_ANSWERS for name in metric.names(graders)] + known
    return known
