"""A client's own loop over HTTP, with the official client: what a fault must not change for who owns the loop.

What is sent depends on what was answered, as in a real loop: rewards are read off sampled tokens, and the next samples come
from the weights that these moved.
"""

from threading import Thread
from typing import Any

from session_operations import LORA

from ratchet_client import Ratchet, Session

RECONNECT_FOR_S = 120.0  # longer than whatever is away
PROMPTS = [[5, 6, 7], [8, 9]]
OPTIMIZER = {"learning_rate": 1e-2, "weight_decay": 0.1}


def session_spec(rounds: int = 12, **sections: Any) -> dict[str, Any]:
    """`kind` and the number of rounds are ours: the client's loop ends after so many."""
    ours = {"kind": "session", "model": LORA, "checkpoints": {"every_steps": 5}, "limits": {"max_attempts": 100}}
    return ours | {"metadata": {"rounds": rounds}} | sections


class Loop(Thread):
    """A client in a thread of its own. `told`: what it learnt, by the numbers of operations; `error`: why it gave up."""

    def __init__(self, url: str, key: str, spec: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.told: dict[int, Any] = {}
        self.error: BaseException | None = None
        self._rounds = spec["metadata"]["rounds"]
        self._ratchet = Ratchet(url, key)
        asked = {name: value for name, value in spec.items() if name != "kind"}
        self._session = self._ratchet.session(**asked, reconnect_for_s=RECONNECT_FOR_S)
        self.id = self._session.id

    def run(self) -> None:
        try:
            with self._ratchet, self._session as session:
                for number in range(self._rounds):
                    self._round(session, number)
                self._tell(session.submit.save("done", purpose="sampler"))
                self._tell(session.submit.finish())
        except BaseException as error:
            self.error = error

    def _round(self, session: Session, number: int) -> None:
        groups = self._tell(session.submit.sample(prompts=PROMPTS, num_samples=4, max_tokens=6, seed=number))
        for group in groups:
            for answer in group.answers:
                answer.reward = sum(answer.tokens) / len(answer.tokens) / 100
        self._tell(session.submit.train_step(groups, objective="gspo", optimizer=OPTIMIZER, minibatches=2))
        row = {"tokens": [5, 6 + number % 8, 7], "target_tokens": [6 + number % 8, 7, 8]}
        pair = session.submit.forward_backward([row]), session.submit.optim_step(OPTIMIZER)
        for handle in pair:
            self._tell(handle)

    def _tell(self, handle: Any) -> Any:
        result = handle.result()
        self.told[handle.seq] = without_ids(result)
        return result


def without_ids(value: Any) -> Any:
    """Ids of checkpoints are new in each run."""
    if isinstance(value, dict):
        return {name: without_ids(inner) for name, inner in value.items() if name != "checkpoint_id"}
    return "a checkpoint" if isinstance(value, str) and value.startswith("ckpt_") else value
