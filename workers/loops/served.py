"""A learner whose answers an external vLLM server samples: the connection, and what is looked at before the first step.

The server must have the same base, the same tokenizer, and log-probs of the distribution that is sampled from; whatever of
these is wrong would make every gradient silently wrong. The trainer recomputes the old log-probs in any case.
"""

import logging
from collections.abc import Callable
from math import isfinite
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from service.spec.training import RolloutSpec, VllmEngine
from service.states import FINAL
from service.store import jobs
from service.store.session import Store
from workers.policy.learner import Learner
from workers.policy.score.layout import Sequence
from workers.rollout.engine import Request, SamplingParams
from workers.rollout.vllm import VllmEngine as Engine
from workers.rollout.vllm_adapters import Adapters
from workers.rollout.vllm_server import Server
from workers.tenure.outcome import Interrupted
from workers.tenure.tenure import Tenure

PROBE = "The answer to 12 + 30 is 42."
PROBE_TOKENS = 8  # of each answer to it
PROBE_SEED = 1
# Mean absolute difference of a token's log-prob, in nats, between server and trainer. Rounding in bfloat16 gives 0.06
# (SmolLM2); another model, or an adapter that is not applied, tenths to whole nats.
AGREES_WITHIN = 0.25
CERTAIN = 1e-3  # nats: with a log-prob this near 0 nothing tells whether the other tokens were ruled out
TRIED_WITH = (0, 33)  # vLLM's version from which docs/rollout-engines.md has its facts

log = logging.getLogger(__name__)


class Served:
    """Use `with Served(...) as served:`. While it is open, the learner samples there."""

    def __init__(self, tenure: Tenure, spec: VllmEngine, learner: Learner) -> None:
        settings, text = tenure.settings, learner.text
        assert learner.adapter is not None
        self._spec, self._learner, self._tenure = spec, learner, tenure
        self._server = Server(
            spec, networks=settings.rollout_networks, key=settings.rollout_keys.get(spec.url), check=lambda: _obey(tenure)
        )
        if settings.rollout_adapters_dir is None:
            raise self._server.refused(
                "this worker has no folder to share with it",
                "let the operator set RATCHET_ROLLOUT_ADAPTERS_DIR for the API and the workers",
            )
        self._adapters = Adapters(
            self._server,
            learner,
            job_id=tenure.job.id,
            attempt=tenure.lease.attempt,
            folder=settings.rollout_adapters_dir,
            seen_as=settings.rollout_adapters_seen_as,
        )
        self._engine = Engine(
            self._server,
            self._adapters,
            adapter=learner.adapter,
            eos_ids=text.eos_ids,
            vocabulary=text.rows,
            decode=text.decode_all,
            show=text.show_all,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._learner.engine = self._learner.base.engine
        self._server.forget_wishes()
        self._server.run(self._adapters.close())
        self._server.close()

    def connect(self, rollout: RolloutSpec) -> dict[str, Any]:
        """Check the server, and let the learner sample there. Returns what was found, for the job's facts.

        Raises JobFailed rollout_unavailable, rollout_refused, rollout_mismatch, rollout_address_refused; Interrupted."""
        server = self._server
        left = server.run(self._adapters.sweep(_ended(self._tenure.store)))
        if left:
            log.info("job %s: unloaded what was left behind: %s", self._tenure.job.id, ", ".join(left))
        version, longest = self._base()
        self._check_tokens()
        processed = self._check_log_probs(rollout)
        off = self._disagreement()
        if not off <= AGREES_WITHIN:
            raise server.mismatch(
                f"its log-probs of {self._spec.served_model!r} with this job's adapter are off by {off:.2g} nats a token on "
                f"average, allowed is {AGREES_WITHIN:g}: another model or revision, or it does not apply the adapter",
                "serve the base that model.source names, at the same revision, with --logprobs-mode processed_logprobs",
            )
        self._learner.engine = self._engine
        facts = {"engine": "vllm", "url": self._spec.url, "version": version, "max_model_len": longest}
        return {**facts, "log_probs": "processed" if processed else "raw", "off_by": round(off, 6), "left_behind": left}

    def _base(self) -> tuple[str, int | None]:
        """The server's version, and the longest sequence of its base, which then bounds the job's, too."""
        server, name = self._server, self._spec.served_model
        found = server.run(server.models())
        bases = {model["id"]: model for model in found if model.get("parent") is None}
        if name not in bases:
            raise server.mismatch(
                f"it does not serve {name!r}; its models are: {', '.join(bases)}",
                "set rollout.engine.served_model to one of these, if it is the job's base",
            )
        longest, text = bases[name].get("max_model_len"), self._learner.text
        if isinstance(longest, int) and longest < text.context:
            log.warning("the vLLM server at %s takes %d tokens, the model %d", self._spec.url, longest, text.context)
            text.context = longest
        version = server.run(server.version())
        if (numbers := _numbers(version)) is not None and numbers < TRIED_WITH:
            log.warning("the vLLM server at %s has version %s; this was made for 0.33", self._spec.url, version)
        return version, longest

    def _check_tokens(self) -> None:
        """Same tokens for a text, and as many of them in all."""
        server, text = self._server, self._learner.text
        ours = text.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        theirs = server.run(server.tokenize(PROBE))
        if theirs != ours:
            raise server.mismatch(
                f"its tokenizer reads {PROBE!r} as {theirs[:8]}, the trainer's as {ours[:8]}",
                "serve the base that model.source names, with its own tokenizer",
            )
        name = self._spec.served_model
        if not server.run(server.knows_token(name, text.rows - 1)) or server.run(server.knows_token(name, text.rows)):
            raise server.mismatch(
                f"its vocabulary has not the {text.rows} tokens of the trainer's model",
                "serve the base that model.source names, without further tokens",
            )

    def _check_log_probs(self, rollout: RolloutSpec) -> bool:
        """Whether the server's log-probs are of the distribution that is sampled from (processed), or the model's own (raw).

        With top_k 1 the first are 0. Both are the same at temperature 1 without top_p and top_k; elsewhere the raw ones do not
        determine the others, and are refused."""
        how = SamplingParams(PROBE_TOKENS, top_k=1, ends=False)
        [answer] = self._engine.run([Request(self._prompt(), how, PROBE_SEED)])
        if answer.error is not None:
            raise answer.error
        processed = all(abs(log_prob) < CERTAIN for log_prob in answer.log_probs)
        if not processed and (rollout.temperature, rollout.top_p, rollout.top_k) != (1.0, 1.0, 0):
            raise self._server.mismatch(
                "its log-probs are the model's own at temperature 1, and the job samples with temperature "
                f"{rollout.temperature:g}, top_p {rollout.top_p:g}, top_k {rollout.top_k}",
                "start it with --logprobs-mode processed_logprobs; or use temperature 1, top_p 1, top_k 0",
            )
        return processed

    def _disagreement(self) -> float:
        """Mean absolute difference, in nats, of the log-probs of greedy tokens under this job's adapter."""
        learner, prompt = self._learner, self._prompt()
        [answer] = self._engine.run(
            [Request(prompt, SamplingParams(PROBE_TOKENS, temperature=0.0), PROBE_SEED, learner.adapter)]
        )
        if answer.error is not None:
            raise answer.error
        ours = learner.score([Sequence(prompt, answer.tokens)]).log_probs[0].tolist()
        off = fmean(abs(mine - theirs) for mine, theirs in zip(ours, answer.log_probs, strict=True))
        return off if isfinite(off) else float("inf")

    def _prompt(self) -> list[int]:
        text = self._learner.text
        tokens: list[int] = text.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        return tokens[: max(1, text.context - PROBE_TOKENS)]


def _obey(tenure: Tenure) -> None:
    if (wish := tenure.check()) is not None:
        raise Interrupted(wish)


def _ended(store: Store) -> Callable[[str], bool]:
    """Whether a job has ended; of one that is not known here, nobody can tell."""

    def ended(job_id: str) -> bool:
        with store.begin(readonly=True) as session:
            job = jobs.find(session, job_id, light=True)
        return job is not None and job.status in FINAL

    return ended


def _numbers(version: str) -> tuple[int, ...] | None:
    """The first two numbers of a version."""
    parts = version.split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(part.isdigit() for part in parts) else None
