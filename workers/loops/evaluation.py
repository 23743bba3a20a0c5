"""Evaluation on held-out rows: sample answers and grade them; if the rows have answers, also compute their loss."""

from service.jobs.lease import RolloutRow
from service.metric_names import EVAL, EVAL_GREEDY, EVAL_LOSS, EVAL_TOKENS_SAMPLED
from service.spec.job import SupervisedSpec
from workers.loops.attempt import Attempt, StepResult
from workers.loops.sampling import Group, draw_of, reward_metrics, rollout_rows, sample_and_grade
from workers.loops.supervised import answers_loss

PROMPTS_AT_ONCE = 256
KEPT_GROUPS = 8  # kept of each evaluation, for people to read


def evaluate(attempt: Attempt, step: int) -> StepResult:
    """Metrics under eval/, greedy ones under eval/greedy/. Deterministic in (seed, step)."""
    spec, metrics = attempt.spec, dict[str, float]()
    rollouts: list[RolloutRow] = []
    if attempt.rewards is not None:
        groups = _sample_all(attempt, spec.eval.temperature)
        metrics |= _under(EVAL, reward_metrics(groups))
        sampled = groups
        rollouts = rollout_rows(attempt, groups[:KEPT_GROUPS], "eval", step)
        if spec.eval.also_greedy:
            greedy = groups if spec.eval.temperature == 0 else _sample_all(attempt, 0.0)
            metrics |= _under(EVAL_GREEDY, reward_metrics(greedy))
            sampled = groups if greedy is groups else groups + greedy
        tokens = sum(len(completion.tokens) for group in sampled for completion in group.completions)
        metrics[EVAL_TOKENS_SAMPLED] = float(tokens)  # the ledger takes it back should this be done again
    if spec.data.answer is not None or isinstance(spec, SupervisedSpec):
        metrics[EVAL_LOSS] = answers_loss(attempt)
    return StepResult(metrics, rollouts)


def _sample_all(attempt: Attempt, temperature: float) -> list[Group]:
    rows = attempt.data.eval
    assert rows is not None
    groups: list[Group] = []
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        indices = range(start, min(start + PROMPTS_AT_ONCE, len(rows)))
        draw = draw_of(attempt, purpose=f"eval/{temperature}/{start}", temperature=temperature)
        groups += sample_and_grade(attempt, [rows[i] for i in indices], [rows.number(i) for i in indices], draw)
    return groups


def _under(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}
