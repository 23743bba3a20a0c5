"""The operation `eval`: answers of a session's weights, graded here, as metrics under eval/."""

from service.jobs.lease import finite
from service.metric_names import EVAL
from service.rewards.apart import grade_apart
from service.rewards.samples import Sample
from service.spec.reward import RewardSpec
from workers.loops.sampling import Group, reward_metrics
from workers.policy.policy import Policy
from workers.sessions.requests import Request, prompts_of
from workers.sessions.sampling import drawn
from workers.sessions.training import Done


def evaluate(policy: Policy, request: Request, seed: int, job_id: str) -> Done:
    """`num_samples` answers to each row's prompt, and what the graders give for them. Raises JobFailed if one cannot work."""
    head, prompts = request.head, prompts_of(request, policy.text)
    answers, count = drawn(policy, request, prompts, seed), head["num_samples"]
    rows = [row for row in head["rows"] for _ in range(count)]
    samples = [
        Sample(row["prompt"], answer.text, len(answer.tokens), answer.finish_reason == "length", row)
        for row, answer in zip(rows, answers, strict=True)
    ]
    graded = grade_apart(RewardSpec.model_validate({"graders": head["graders"]}), samples, job_id=job_id)
    parts = [slice(at, at + count) for at in range(0, len(answers), count)]
    groups = [
        Group(row, prompt, answers[part], graded[part], [one.total for one in graded[part]])
        for row, prompt, part in zip(head["rows"], prompts.prompts, parts, strict=True)
    ]
    metrics = {EVAL + name: value for name, value in reward_metrics(groups).items()}
    told = {
        "metrics": finite(metrics),
        "texts": [[answer.text for answer in group.completions] for group in groups],
        "rewards": [group.rewards for group in groups],
        "scores": [[one.scores for one in group.graded] for group in groups],
        "errors": [[one.errors for one in group.graded] for group in groups],
    }
    return Done(told, metrics=metrics, sampled=sum(len(answer.tokens) for answer in answers))
