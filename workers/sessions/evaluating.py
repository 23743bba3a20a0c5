"""The operation `eval`: answers of a session's weights, graded here, as metrics under eval/."""

from typing import Any

from service.jobs.lease import finite
from service.metric_names import EVAL
from service.rewards.apart import GradedApart
from service.rewards.samples import Graded, Sample
from service.spec.reward import RewardSpec
from workers.loops.sampling import Group, reward_metrics
from workers.policy.policy import Policy
from workers.rollout.engine import Completion
from workers.sessions.requests import Request, prompts_of
from workers.sessions.sampling import drawn
from workers.sessions.training import Done


class Evaluation:
    """`num_samples` answers to each row's prompt, which are being graded in another process. It may go on until it is `done`,
    and is closed if its result is not wanted any more."""

    def __init__(self, policy: Policy, request: Request, seed: int, job_id: str) -> None:
        head, prompts = request.head, prompts_of(request, policy.text)
        self._rows, self._count, self._prompts = head["rows"], head["num_samples"], prompts.prompts
        self._answers = drawn(policy, request, prompts, seed)
        rows = [row for row in self._rows for _ in range(self._count)]
        samples = [
            Sample(row["prompt"], answer.text, len(answer.tokens), answer.finish_reason == "length", row)
            for row, answer in zip(rows, self._answers, strict=True)
        ]
        self._grading = GradedApart(RewardSpec.model_validate({"graders": head["graders"]}), samples, job_id=job_id)
        self.close = self._grading.close

    @property
    def done(self) -> bool:
        return self._grading.done

    def result(self) -> Done:
        """Waits for it. Raises JobFailed if a grader cannot work."""
        return _done(self._rows, self._prompts, self._answers, self._grading.result(), self._count)


def _done(
    rows: list[dict[str, Any]], prompts: list[list[int]], answers: list[Completion], graded: list[Graded], count: int
) -> Done:
    parts = [slice(at, at + count) for at in range(0, len(answers), count)]
    groups = [
        Group(row, prompt, answers[part], graded[part], [one.total for one in graded[part]])
        for row, prompt, part in zip(rows, prompts, parts, strict=True)
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
