"""Tries the graders of a job on its first rows: their scores for right answers, near misses and wrong answers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import SecretStr

from service.jobs.data import Row
from service.rewards.probes import NO_ANSWER, STAND_IN, Probe, expected_of, probes, wanted
from service.rewards.rewards import Rewards
from service.rewards.samples import Graded, Sample
from service.spec.addresses import Networks
from service.spec.job import RLSpec, SupervisedSpec
from service.spec.reward import GraderBase, HttpGrader, NumberGrader, ReasoningGymGrader, RewardSpec

HTTP_TIMEOUT_S = 10.0  # a dry run tries a reward service only once and briefly
CHARACTERS_PER_TOKEN = 4  # a guess for `length` graders; the tiny model's is exact


@dataclass(frozen=True)
class Trial:
    """`samples` (prompt, reference, graded, errors) belong to `rows`, in order. They are filled in, and get `probes`."""

    spec: RLSpec | SupervisedSpec
    reward: RewardSpec
    rows: list[Row]
    samples: list[dict[str, Any]]
    secrets: Mapping[str, SecretStr]
    networks: Networks

    def run(self) -> list[str]:
        """Fill in the samples. Returns warnings. Raises JobFailed if a grader cannot work at all."""
        brisk = self.reward.model_copy(update={"graders": [_brisk(grader) for grader in self.reward.graders]})
        with Rewards(brisk, job_id="job_preview", secrets=self.secrets, networks=self.networks) as rewards:
            return self._run(rewards)

    def _run(self, rewards: Rewards) -> list[str]:
        gradable = [i for i, sample in enumerate(self.samples) if sample["reference"] is not None]
        if not gradable:
            return self._stand_in(rewards)
        self._right(rewards, gradable)
        tried = self._probes(rewards)
        return [*_no_reward_for_the_right_answer(self.samples), *misreadings(self.reward, self.rows, tried)]

    def _stand_in(self, rewards: Rewards) -> list[str]:
        """Grade a stand-in, because no right answer is known. It shows at least whether the graders work."""
        answers = rewards.grade([self._sample(i, STAND_IN) for i in range(len(self.samples))])
        for sample, graded in zip(self.samples, answers, strict=True):
            probe = _told(Probe("stand_in", STAND_IN, "no right answer is known"), graded)
            sample |= {"errors": _errors(graded), "probes": [probe]}
        return self.stands_in()

    def stands_in(self) -> list[str]:
        """The warnings for the caller if no right answer is known."""
        if any(sample["reference"] is not None for sample in self.samples):
            return []
        source = "data.answer, or a grader's reference"
        return [f"the spec says no right answer ({source}): the graders were asked about the stand-in {STAND_IN!r} only"]

    def _right(self, rewards: Rewards, gradable: list[int]) -> None:
        """Grade each right answer as if the model had given it, and one wrong answer. http graders see only these."""
        right = [(i, self.samples[i]["reference"]) for i in gradable]
        graded = rewards.grade([self._sample(i, answer) for i, answer in (*right, *((i, NO_ANSWER) for i in gradable))])
        for (i, reference), one, none in zip(right, graded, graded[len(right) :], strict=False):
            wrong = Probe("wrong", NO_ANSWER, "no answer", reference)
            self.samples[i] |= {"graded": asdict(one), "errors": _errors(one), "probes": [_told(wrong, none)]}

    def _probes(self, rewards: Rewards) -> list[tuple[int, Probe, Graded]]:
        """The scores of the graders that run here for near misses and wrong answers, which are also put into the samples."""
        graders = [grader for grader in self.reward.graders if not isinstance(grader, HttpGrader)]
        asked = self._asked(graders)
        names = [grader.name or grader.kind for grader in graders]
        graded = rewards.grade([self._sample(i, probe.answer) for i, probe in asked], only=names)
        tried = [(i, probe, one) for (i, probe), one in zip(asked, graded, strict=True)]
        for i, probe, one in tried:
            known = self.samples[i].setdefault("probes", [])
            if probe.answer not in (self.samples[i]["reference"], *(told["answer"] for told in known)):
                known.append(_told(probe, one))
        return tried

    def _asked(self, graders: list[Any]) -> list[tuple[int, Probe]]:
        """The probes for each row, and for each answer that a grader treats as right in it."""
        boxed = any(isinstance(grader, NumberGrader) for grader in graders)
        expected = [
            list(dict.fromkeys(text for each_grader in graders if (text := expected_of(each_grader, row)) is not None))
            for row in self.rows
        ]
        asked: list[tuple[int, Probe]] = []
        for i, texts in enumerate(expected):
            for column, text in enumerate(texts):
                others = [other[column] for other in (*expected[i + 1 :], *expected[:i]) if column < len(other)]
                made = probes(text, boxed=boxed, others=[other for other in others if other != text])
                asked += [(i, probe) for probe in (Probe("right", text, "the reference", text), *made)]
        return asked

    def _sample(self, i: int, answer: str) -> Sample:
        tokens = len(answer) if self.spec.model.source == "tiny" else -(-len(answer) // CHARACTERS_PER_TOKEN)
        return Sample(self.samples[i]["prompt"], answer, tokens + 1, False, self.rows[i])  # the end token counts


def misreadings(reward: RewardSpec, rows: list[Row], tried: list[tuple[int, Probe, Graded]]) -> list[str]:
    """One warning per grader that scores a wrong answer as high as the right one, or scores a boxed right answer 0."""
    warnings: list[str] = []
    for grader in reward.graders:
        name = grader.name or grader.kind
        own = [(i, probe, one.scores.get(name)) for i, probe, one in tried if expected_of(grader, rows[i]) == probe.reference]
        right = {i: score for i, probe, score in own if probe.made == "the reference" and score}
        paid = [
            f"{score:.3g} for {probe.answer!r} ({probe.made}) where {probe.reference!r} is right"
            for i, probe, score in own
            if probe.kind in ("near", "wrong") and score is not None and i in right and _pays(grader, score, right[i])
            if not wanted(grader, probe)
        ]
        if paid:
            hint = "; strict: true pays the task's own answer only" if isinstance(grader, ReasoningGymGrader) else ""
            warnings.append(f"grader {name} pays {' and '.join(paid[:3])}{hint}")
        boxes = [
            probe.answer for i, probe, score in own if probe.made == "the reference in a box" and score == 0 and i in right
        ]
        if boxes and isinstance(grader, NumberGrader) and grader.extract is None:
            warnings.append(f"grader {name} pays nothing for {boxes[0]!r}, and pays for the same answer without a box")
    return warnings


def _pays(grader: GraderBase, score: float, right: float) -> bool:
    """Whether a wrong answer's score is worth a warning: for a reasoning-gym scorer from half of the right answer's score."""
    return score >= right * (0.5 if isinstance(grader, ReasoningGymGrader) else 1)


def _told(probe: Probe, graded: Graded) -> dict[str, Any]:
    return {"kind": probe.kind, "answer": probe.answer, "made": probe.made, **asdict(graded)}


def _errors(graded: Graded) -> list[str]:
    return [f"{name}: {error}" for name, error in graded.errors.items()]


def _brisk(grader: GraderBase) -> GraderBase:
    if not isinstance(grader, HttpGrader):
        return grader
    return grader.model_copy(update={"max_retries": 0, "timeout_s": min(grader.timeout_s, HTTP_TIMEOUT_S)})


def _no_reward_for_the_right_answer(samples: list[dict[str, Any]]) -> list[str]:
    totals = [sample["graded"]["total"] for sample in samples if sample["graded"] and sample["graded"]["total"] is not None]
    if totals and max(totals) <= 0:
        return ["the right answers of the sample rows get no reward; look at the graders' references and extract patterns"]
    return []
