"""`request_id`s: which operation, and what its answer must be cut to. They hold everything, so that nothing is stored for
them, and a request that is repeated gets the same one.

    model=ID                    a model that was made
    op_...                      an ordered operation
    ID/op_...  ID/op_...;last=5   an answer of the sampler ID; how many of the prompt's log-probs were asked for
"""

import re
from dataclasses import dataclass
from typing import Self

from service.errors import NotFound

MOST_LAST_N = 999_999_999  # as many digits as a ticket may have; no prompt is as long
OPERATION = r"op_[0-9a-z]{26}"
FORMS = re.compile(
    rf"model=(?P<model>[^/;]+)|(?:(?P<sampler>[^/;]+)/)?(?P<operation>{OPERATION})"
    r"(?:;last=(?P<last>[0-9]{1,9})|;runs=(?P<runs>[0-9]{1,6}x[0-9]{1,6}(?:,[0-9]{1,6}x[0-9]{1,6})*))?"
)


@dataclass(frozen=True)
class Ticket:
    model_id: str | None = None
    sampler_id: str | None = None
    operation_id: str | None = None
    last_n: int | None = None
    runs: str | None = None  # as they were given out until 29 November 2026: a mixed batch's widths, 3x2,1x0

    def __str__(self) -> str:
        if self.model_id is not None:
            return f"model={self.model_id}"
        text = self.operation_id if self.sampler_id is None else f"{self.sampler_id}/{self.operation_id}"
        return f"{text}" + ("" if self.last_n is None else f";last={self.last_n}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises NotFound."""
        match = FORMS.fullmatch(text)
        if match is None:
            raise NotFound(f"no request {text[:80]!r} in this project")
        last = None if match["last"] is None else int(match["last"])
        return cls(match["model"], match["sampler"], match["operation"], last, match["runs"])

    def widths(self) -> list[list[int]]:
        return [[int(number) for number in run.split("x")] for run in (self.runs or "").split(",") if run]
