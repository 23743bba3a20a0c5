"""Checks of graders and of the metrics that other sections name."""

from service.errors import FieldError
from service.metric_names import EVAL, EVAL_GREEDY, EVAL_LOSS, OF_ANSWERS
from service.settings import Settings
from service.spec.addresses import host_of, literal, may_reach
from service.spec.data import ReasoningGymSource, SplitSource
from service.spec.job import RLSpec, SupervisedSpec
from service.spec.reward import HttpGrader
from service.validation import did_you_mean

# Tasks of reasoning-gym whose rows have no answer, only a scorer (docs/graders.md).
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
ADDRESS_REFUSED = "the host is no public address; the operator can allow its network (RATCHET_GRADER_NETWORKS=10.1.0.0/16)"
# Which of the two it is would tell what stands in an inner DNS.
NAME_REFUSED = (
    "its host is not found, or has an address that is not public; the operator can allow a network "
    "(RATCHET_GRADER_NETWORKS=10.1.0.0/16)"
)


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
        if isinstance(grader, HttpGrader):
            address = literal(host_of(grader.url))  # a name is looked up by who connects, and then only
            if address is not None and not may_reach(address, settings.grader_networks):
                errors.append(FieldError(f"{pointer}/url", ADDRESS_REFUSED, "address_refused"))
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
