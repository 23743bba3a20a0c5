"""The chats that a job's rows give to the model's chat template, as the worker gives them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.jobs.data import Data, Messages, Row, given_rows, indices_of_steps
from service.spec.job import RLSpec, SupervisedSpec


@dataclass(frozen=True)
class Rendering:
    """Messages that the template renders, with the beginning of an answer (`opened`) or without. `where` names the row."""

    where: str
    messages: Messages
    opened: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class Chats:
    """The rows of a job that has `data.chat`, and the folder with its model's tokenizer."""

    folder: Path
    spec: RLSpec | SupervisedSpec
    data: Data

    def renderings(self) -> Iterator[Rendering]:
        """What the worker renders of each row that the job takes, in order. Procedural rows, which it makes, are left out."""
        for part, rows in given_rows(self.spec.data, self.data):
            sampled = self.spec.reward is not None if part == "eval" else isinstance(self.spec, RLSpec)
            learnt = isinstance(self.spec, SupervisedSpec) or (part == "eval" and self.spec.data.answer is not None)
            for index in range(len(rows)) if part == "eval" else self._trained_on(len(rows)):
                row = rows[index]
                where, options = f"row {rows.number(index)} of data.{part}", self.data.template_options(row)
                if sampled or (learnt and self.data.begins_the_answer):
                    yield from (Rendering(where, *one, options) for one in self._prompt(row))
                if learnt and not self.data.begins_the_answer:
                    for turn in self.data.learnt_turns(row):
                        yield Rendering(where, turn, False, options)
                        yield Rendering(where, turn[:-1], True, options)

    def _trained_on(self, n: int) -> Sequence[int]:
        spec = self.spec
        if spec.data.overlong == "skip":  # the worker measures all
            return range(n)
        per_step = spec.rollout.prompts_per_step if isinstance(spec, RLSpec) else spec.update.batch_size
        return indices_of_steps(n, 1, spec.limits.max_steps, per_step, spec.seed, spec.data.train.shuffle)

    def _prompt(self, row: Row) -> list[tuple[Messages, bool]]:
        messages = self.data.prompt(row)
        assert not isinstance(messages, str)
        if messages[-1]["role"] != "assistant":
            return [(messages, True)]
        before = messages[:-1]  # the last one is the beginning of the answer
        return [(before, False), (before, True)] if before else []
