"""Sampling for operations: requests of many, and of several versions, in the one continuous batch of the base's engine."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from service import tracing
from service.store.operations import Logged
from service.store.session import Store
from workers.policy.base import Base
from workers.policy.policy import Policy
from workers.policy.text import Text, Unfolding, ends_of
from workers.rollout.engine import Completion, SamplingParams
from workers.rollout.engine import Request as Answer
from workers.seeds import derive
from workers.sessions.requests import Prompts, Request, prompts_of, refused
from workers.sessions.training import Done
from workers.sessions.versions import Versions

Part = tuple[int, int, str]  # of an answer: its place, how many characters came before, the text
NOTHING = float("nan")  # the log-prob at a prompt's first place: nothing stands before it


def seed_of(request: Request, session_seed: int, row: Logged) -> int:
    """The request's own, else one that belongs to this operation: it draws the same again after a crash."""
    given = request.head["seed"]
    return derive(session_seed, row.seq, f"sample/{row.lane}") if given is None else int(given)


def sample(policy: Policy, request: Request, seed: int) -> Done:
    """Answers of a policy, to the end. Others' requests in the engine move on meanwhile."""
    prompts = prompts_of(request, policy.text)
    told = _about_prompts(policy, request, prompts)
    return _done(policy.text, request, prompts, drawn(policy, request, prompts, seed), told)


def drawn(policy: Policy, request: Request, prompts: Prompts, seed: int) -> list[Completion]:
    """The answers, `num_samples` to each prompt in turn. Raises what befell one of them."""
    answers = policy.base.engine.run(_requests(policy, request, prompts, seed))
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    return answers


@dataclass
class _Open:
    """An operation whose answers are not all there yet."""

    owner: str
    row: Logged
    request: Request
    prompts: Prompts
    told: dict[str, Tensor]
    checkpoint: str | None
    trace: str | None  # the traceparent of its span
    tickets: dict[int, int]  # ticket -> place
    answers: dict[int, Completion] = field(default_factory=dict)
    unfolding: dict[int, Unfolding] = field(default_factory=dict)  # by place, where parts are told
    began: float = field(default_factory=monotonic)


@dataclass(frozen=True)
class Finished:
    owner: str
    row: Logged
    result: Done | Exception
    began: float


class Sampling:
    """The operations of unordered lanes on one base. An operation's answer depends on nobody beside it."""

    def __init__(self, base: Base, store: Store, key: str | None) -> None:
        self.base, self.versions = base, Versions(base, store, key)
        self._open: list[_Open] = []
        self._batch: Any = None  # the span of those that share the engine, as long as they are the same
        self._batched: list[str] | None = None  # their traceparents

    def add(self, owner: str, project: str, session_seed: int, row: Logged, trace: str | None = None) -> None:
        """Let the operation's requests wait for the engine. `trace`: its span's traceparent. Raises InvalidRequest, and
        OtherCommit."""
        request = Request.read(row.request)
        checkpoint = request.head["checkpoint"]
        prompts = prompts_of(request, self.base.text)
        adapter = None if checkpoint is None else self.versions.take(project, checkpoint)
        try:
            policy = Policy(self.base, adapter)
            told = _about_prompts(policy, request, prompts)
            tickets = self.base.engine.submit(_requests(policy, request, prompts, seed_of(request, session_seed, row)))
        except BaseException:
            self._give_back(checkpoint)
            raise
        self._end_batch()
        places = {ticket: place for place, ticket in enumerate(tickets)}
        self._open.append(_Open(owner, row, request, prompts, told, checkpoint, trace, places))

    def step(self) -> list[Finished]:
        """Move every row on by a token. Returns the operations that are finished by it."""
        if tracing.is_on() and self._batched is None:
            self._begin_batch()
        for ticket, answer in self.base.engine.step():
            opened = next((one for one in self._open if ticket in one.tickets), None)
            if opened is not None:
                opened.answers[opened.tickets[ticket]] = answer
        ready = [one for one in self._open if len(one.answers) == len(one.tickets)]
        self._open = [one for one in self._open if one not in ready]
        for one in ready:
            self._give_back(one.checkpoint)
        if ready:
            self._end_batch()
        return [Finished(one.owner, one.row, self._result(one), one.began) for one in ready]

    def leave(self, owner: str) -> None:
        """Forget this owner's operations: they wait for another worker."""
        self._cancel([one for one in self._open if one.owner == owner])

    def withdraw(self, ids: Collection[str]) -> dict[str, int]:
        """Forget operations that nobody waits for any more. Returns how many tokens were sampled for them, by owner."""
        gone, tokens = [one for one in self._open if one.row.id in ids], Counter[str]()
        for one in gone:
            answered = sum(len(answer.tokens) for answer in one.answers.values())
            tokens[one.owner] += answered + sum(map(len, self.base.engine.so_far(list(one.tickets)).values()))
        self._cancel(gone)
        return tokens

    def _begin_batch(self) -> None:
        """A span of its own where several operations are sampled at once, since it belongs to several traces."""
        self._batched = [one.trace for one in self._open if one.trace is not None]
        if len(self._batched) > 1:
            self._batch = tracing.begin("sampling batch", links=self._batched, operations=len(self._open))

    def _end_batch(self) -> None:
        tracing.end(self._batch)
        self._batch = self._batched = None

    def _cancel(self, gone: list[_Open]) -> None:
        if gone:
            self._end_batch()
        for one in gone:
            self.base.engine.cancel(list(one.tickets))
            self._give_back(one.checkpoint)
            self._open.remove(one)

    def parts(self) -> Iterator[tuple[str, list[Part]]]:
        """What came since the last call, of operations that asked for it: their lanes and the parts of their answers. None
        where a part would not show how a stop text begins."""
        for one in self._open:
            head = one.request.head
            if not head.get("parts") or not self.base.text.shows(head["sampling"].get("stop", ())):
                continue
            told = list[Part]()
            for ticket, tokens in self.base.engine.so_far(list(one.tickets)).items():
                place = one.tickets[ticket]
                unfolding = one.unfolding.setdefault(place, Unfolding(self.base.text.decode))
                start = unfolding.length
                if part := unfolding.part(tokens):
                    told.append((place, start, part))
            if told:
                yield one.row.lane, told

    @property
    def pending(self) -> int:
        """Rows in the engine."""
        return self.base.engine.pending

    def _result(self, one: _Open) -> Done | Exception:
        try:
            answers = [one.answers[place] for place in sorted(one.answers)]
            return _done(self.base.text, one.request, one.prompts, answers, one.told)
        except Exception as error:
            return error

    def _give_back(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.versions.give_back(checkpoint)


def _requests(policy: Policy, request: Request, prompts: Prompts, seed: int) -> list[Answer]:
    head: dict[str, Any] = request.head
    sampling, count = head["sampling"], head["num_samples"]
    stop, most = tuple(sampling.get("stop", ())), sampling["max_tokens"]
    how = SamplingParams(
        0 if most is None else most,
        sampling["temperature"],
        sampling["top_p"],
        sampling["top_k"],
        stop,
        (*policy.text.stop_ids(stop), *sampling.get("stop_ids", ())),
        sampling.get("ends", True),
    )
    return [
        Answer(
            prompt,
            how if most is not None else replace(how, max_tokens=policy.text.context - len(prompt)),
            derive(seed, number * count + place, "answer"),
            policy.adapter,
            top_log_probs=head["top_log_probs"],
        )
        for number, prompt in enumerate(prompts.prompts)
        for place in range(count)
    ]


def _about_prompts(policy: Policy, request: Request, prompts: Prompts) -> dict[str, Tensor]:
    """What was asked about the prompts' own tokens. Each place is told with what stands before it; the first has nothing."""
    head, told = request.head, dict[str, Tensor]()
    items = prompts.items(policy.base.device)
    if head["prompt_log_probs"]:
        told["prompt_log_probs"] = _after(policy.score_targets(items), items.starts, NOTHING)
    if count := head["top_prompt_log_probs"]:
        _fits(count, policy)
        ids, log_probs = policy.likeliest(items, count)
        told["top_prompt_ids"] = _after(ids, items.starts, 0).int()
        told["top_prompt_log_probs"] = _after(log_probs, items.starts, NOTHING)
    if prompts.targets is not None:
        targets = prompts.targets.to(policy.base.device).roll(-1, 0)
        log_probs = policy.score_targets(items.asked(targets.clamp(min=0)))
        log_probs[targets < 0] = NOTHING
        told["target_log_probs"] = _after(log_probs, items.starts, NOTHING)
    _fits(head["top_log_probs"], policy)
    return told


def _fits(count: int, policy: Policy) -> None:
    if count > policy.text.rows:
        raise refused("invalid_request", f"the model knows {policy.text.rows} tokens, {count} were asked for at each place")


def _after(values: Tensor, starts: Sequence[int], first: float) -> Tensor:
    """Values that stand at the token before the one that they are about, moved to it."""
    moved = values.roll(1, 0)
    moved[starts[:-1]] = first
    return moved


def _done(text: Text, request: Request, prompts: Prompts, answers: Sequence[Completion], told: dict[str, Tensor]) -> Done:
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    lengths = [len(answer.tokens) for answer in answers]
    tensors: dict[str, Tensor] = {
        "prompt_tokens": torch.tensor([token for prompt in prompts.prompts for token in prompt], dtype=torch.int32),
        "prompt_cu_seqlens": _cut([len(prompt) for prompt in prompts.prompts]),
        "tokens": torch.tensor([token for answer in answers for token in answer.tokens], dtype=torch.int32),
        "cu_seqlens": _cut(lengths),
        "log_probs": torch.tensor([value for answer in answers for value in answer.log_probs]),
        **told,
    }
    if count := request.head["top_log_probs"]:
        rows = [row for answer in answers for row in answer.top_log_probs or []]
        # Tokens that top_k and top_p rule out have no place among them.
        padded = [[*row, *[(0, NOTHING)] * (count - len(row))] for row in rows]
        tensors["top_ids"] = torch.tensor([[token for token, _ in row] for row in padded], dtype=torch.int32).view(-1, count)
        tensors["top_log_probs"] = torch.tensor([[value for _, value in row] for row in padded]).view(-1, count)
    head: dict[str, Any] = {
        "finish_reasons": [answer.finish_reason for answer in answers],
        "texts": [answer.text for answer in answers],
    }
    if request.head.get("pieces"):
        names = ("prompt_tokens", "tokens", "top_ids", "top_prompt_ids")
        ids = {int(token) for name in names if name in tensors for token in tensors[name].unique().tolist()}
        head["pieces"] = {str(token): piece for token, piece in text.pieces(ids).items()}
        head["text_ends"] = [ends_of(answer.tokens, text.decode) for answer in answers]
        head["prompt_texts"] = [text.show(prompt) for prompt in prompts.prompts]
        head["prompt_ends"] = (
            [ends_of(prompt, text.show) for prompt in prompts.prompts] if request.head["prompt_log_probs"] else []
        )
    return Done(head, tensors, sampled=sum(lengths))


def _cut(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
