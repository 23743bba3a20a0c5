"""Answers sampled by an external vLLM server, a request each, many at once. Tokens come back as ids, never read from text.

An answer depends on its own seed, prompt and weights as far as the server's arithmetic does: vLLM rounds by the size of its
batches, so two runs agree to rounding only, not to the bit.
"""

import asyncio
from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from service.errors import JobFailed
from service.validation.words import counted
from workers.rollout.engine import Completion, Engine, Request
from workers.rollout.local import Decode
from workers.rollout.vllm_adapters import Adapters
from workers.rollout.vllm_server import NonFinite, NoSuchModel, Server, Underway

MOST_LOSSES = 5  # how often the server may lose an adapter that was just loaded, while one answer is sampled
LEAST_LOG_PROB = -9999.0  # vLLM writes minus infinity so


class _LogProbs(BaseModel):
    token_logprobs: list[float | None]


class _Choice(BaseModel):
    token_ids: list[int]
    prompt_token_ids: list[int]
    logprobs: _LogProbs
    finish_reason: Literal["stop", "length"]


class _Answer(BaseModel):
    choices: list[_Choice]


class VllmEngine(Engine):
    """`adapter` is the one that requests may name; when one is admitted, its weights are put onto the server by `adapters`.
    `vocabulary`: how many tokens the trainer's model knows."""

    def __init__(
        self,
        server: Server,
        adapters: Adapters,
        *,
        adapter: str,
        eos_ids: Sequence[int],
        vocabulary: int,
        decode: Decode,
        show: Decode,
    ) -> None:
        self._server, self._adapters, self._adapter = server, adapters, adapter
        self._eos_ids, self._vocabulary, self._decode, self._show = frozenset(eos_ids), vocabulary, decode, show
        self._next_ticket = 0
        self._waiting: dict[int, Request] = {}
        self._tasks: dict[int, asyncio.Task[Completion]] = {}
        self._done: list[tuple[int, Completion]] = []  # not yet returned by `step`
        self.came: list[Completion] = []  # of the newest `begin`, in the order in which they came

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """As the interface says; ValueError also for log-probs of prompts or of tokens that were not sampled."""
        for number, request in enumerate(requests):
            if not request.prompt:
                raise ValueError(f"the prompt of request {number} is empty; an answer's first token needs something before it")
            if request.adapter not in (None, self._adapter):
                raise ValueError(f"there is no adapter {request.adapter!r} on this base")
            asks = request.prompt_log_probs or request.top_prompt_log_probs or request.top_log_probs
            if asks or request.how.max_tokens < 1:
                raise ValueError("a vLLM server is asked for the log-probs of sampled tokens only")
        tickets = list(range(self._next_ticket, self._next_ticket + len(requests)))
        self._next_ticket += len(tickets)
        self._waiting |= dict(zip(tickets, requests, strict=True))
        return tickets

    def step(self) -> list[tuple[int, Completion]]:
        """Send what waits, as far as `at_once` allows, and wait until a request has been answered."""
        finished, self._done = self._done, []
        if self._waiting or self._tasks:
            finished += self._server.run(self._move_on())
        return finished

    def cancel(self, tickets: Sequence[int]) -> None:
        gone = set(tickets)
        self._waiting = {ticket: request for ticket, request in self._waiting.items() if ticket not in gone}
        self._done = [(ticket, completion) for ticket, completion in self._done if ticket not in gone]
        if ending := [self._tasks.pop(ticket) for ticket in gone & self._tasks.keys()]:
            self._server.end(ending)

    def so_far(self, tickets: Sequence[int]) -> dict[int, list[int]]:
        """No tokens: an answer comes as a whole."""
        return {ticket: [] for ticket in tickets if ticket in self._tasks}

    @property
    def pending(self) -> int:
        return len(self._waiting) + len(self._tasks) + len(self._done)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Raises JobFailed rollout_unavailable, rollout_refused, rollout_mismatch, rollout_address_refused."""
        tickets = self.submit(requests)
        ours: dict[int, Completion] = {}
        strangers, self._done = self._done, []
        try:
            while len(ours) < len(tickets):
                for ticket, completion in self.step():
                    if tickets[0] <= ticket <= tickets[-1]:
                        ours[ticket] = completion
                    else:
                        strangers.append((ticket, completion))
        except BaseException:
            self.cancel(tickets)
            raise
        finally:
            self._done = strangers
        return [ours[ticket] for ticket in tickets]

    def begin(self, requests: Sequence[Request]) -> Underway[list[Completion]]:
        """As `run`, in a thread, while the caller goes on; `result` has the completions. Later changes of the weights do not
        matter: all requests that name the adapter get its weights of now."""
        assert not self.pending
        name = self._server.run(self._adapters.current())
        names = [self._server.spec.served_model if request.adapter is None else name for request in requests]
        self.came = []
        return self._server.begin(self._all(requests, names))

    def result(self, underway: Underway[list[Completion]]) -> list[Completion]:
        """Raises what `run` raises."""
        return self._server.result(underway)

    async def _all(self, requests: Sequence[Request], names: Sequence[str]) -> list[Completion]:
        turns = asyncio.Semaphore(self._server.spec.at_once)

        async def one(request: Request, name: str) -> Completion:
            async with turns:
                answer = await self._answer(request, name)
            self.came.append(answer)
            return answer

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*each)) for each in zip(requests, names, strict=True)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _move_on(self) -> list[tuple[int, Completion]]:
        room = self._server.spec.at_once - len(self._tasks)
        for ticket in list(self._waiting)[:room]:
            request = self._waiting[ticket]
            name = self._server.spec.served_model if request.adapter is None else await self._adapters.current()
            self._tasks[ticket] = asyncio.create_task(self._answer(request, name))
            del self._waiting[ticket]
        await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        done = [ticket for ticket, task in self._tasks.items() if task.done()]
        return [(ticket, self._tasks.pop(ticket).result()) for ticket in done]

    async def _answer(self, request: Request, name: str) -> Completion:
        ends = sorted(self._ends(request))
        body = _body(request, name, ends, self._vocabulary)
        for _ in range(MOST_LOSSES):
            try:
                return self._read(await self._server.complete(body), request)
            except NonFinite:
                return _not_finite()
            except NoSuchModel as lost:
                if request.adapter is None:
                    raise self._server.mismatch(f"it does not serve {name!r}: {lost}") from None
                await self._adapters.reload(name)
        raise self._server.unavailable(
            f"it lost the adapter {name} {MOST_LOSSES} times while one answer was sampled",
            "several servers behind one address each know their own adapters: name one of them",
        )

    def _ends(self, request: Request) -> frozenset[int]:
        how = request.how
        return frozenset(how.stop_ids) | self._eos_ids if how.ends else frozenset(how.stop_ids)

    def _read(self, answer: dict[str, Any], request: Request) -> Completion:
        """The server's answer, if it is one to this request. Raises JobFailed rollout_mismatch, rollout_unavailable."""
        try:
            [choice] = _Answer.model_validate(answer).choices
        except (ValidationError, ValueError):
            raise self._server.mismatch(
                "its answer lacks token ids or log-probs, as vLLM gives them for return_token_ids and logprobs",
                "use vLLM 0.33 or newer",
            ) from None
        tokens, log_probs, most = choice.token_ids, choice.logprobs.token_logprobs, request.how.max_tokens
        if choice.prompt_token_ids != request.prompt:
            raise self._server.mismatch("it has read other prompt tokens than it was sent")
        if len(tokens) != len(log_probs) or not 0 < len(tokens) <= most:
            raise self._server.mismatch(
                f"it answered {counted(len(tokens), 'token')} with {len(log_probs)} log-probs; asked for were 1 to {most}"
            )
        if not all(0 <= token < self._vocabulary for token in tokens):
            raise self._server.mismatch(
                f"it answered token {max(tokens)}, and the trainer's model knows {self._vocabulary}: another vocabulary"
            )
        known = [log_prob for log_prob in log_probs if log_prob is not None and isfinite(log_prob)]
        if len(known) < len(tokens) or min(known) <= LEAST_LOG_PROB:
            return _not_finite()
        [text] = self._decode([tokens])
        if choice.finish_reason == "stop":
            if tokens[-1] in self._ends(request):
                return Completion(tokens, known, text, "stop")
            # A token that `decode` leaves out may be a part of a stop text.
            whole = next((one for one in (text, *self._show([tokens])) if any(stop in one for stop in request.how.stop)), None)
            if whole is None:
                raise self._server.mismatch(
                    f"it ended an answer at token {tokens[-1]}, where nothing that the job gave it ends one",
                    "start it with --generation-config vllm, and without stop tokens in --override-generation-config",
                )
            return Completion(tokens, known, whole, "stop")
        if len(tokens) < most:
            raise self._server.mismatch(
                f"it cut an answer at {counted(len(tokens), 'token')}, asked for were {most}",
                "give it a longer --max-model-len, and no max_new_tokens in --override-generation-config",
            )
        return Completion(tokens, known, text, "length")


def _body(request: Request, name: str, ends: list[int], vocabulary: int) -> dict[str, Any]:
    """What is sent. Everything that a model's generation_config.json could change is given."""
    how = request.how
    return {
        "model": name,
        "prompt": request.prompt,
        "n": 1,
        "max_tokens": how.max_tokens,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "top_k": how.top_k if how.top_k < vocabulary else 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "ignore_eos": True,  # `stop_token_ids` are all that end an answer
        "stop_token_ids": ends,
        "stop": list(how.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # they may be a part of a stop text
        "spaces_between_special_tokens": False,
        "add_special_tokens": False,
        "logprobs": 0,  # of the sampled tokens alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _not_finite() -> Completion:
    failed = JobFailed(
        "non_finite_logits",
        "the vLLM server gave log-probs that are not finite",
        hint="its model computes NaN: see its --dtype and its kernels, and whether the adapter's weights are sound",
    )
    return Completion([], [], "", "length", error=failed)
