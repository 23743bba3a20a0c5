"""What a loss over HTTP costs: 64 x 4096 tokens, float32, gspo with gradients.

    python bench/losses.py [--rounds 30]

Time: a trainer's call (loss, metrics, backward) through the client, to a real API process, Redis on loopback and a real loss
worker, in safetensors, against
- the same call in this process: the client's function, the API's checks, the worker's computation and its answer, without HTTP,
  Redis and other processes in between. At most 3 times as long;
- the bare objective on the same tensors in this process: nothing checked, nothing encoded.
CPU: what the API process spends on a request in JSON, against the same request in safetensors. At least 10 times as much.

Each way takes its turn in every round and the medians are compared, for other work on the machine disturbs both; and every
call finds the processor's caches full of something else, as it does in a trainer. Each in a loop of its own is a second figure,
less kind to HTTP: alone, the call in this process takes a third less. The same call with 2 x 16 tokens shows how much of the
time does not depend on the size.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from loopback import Stack, cpu_s, started
from safetensors.torch import load, save
from torch import Tensor

from ratchet_client import Ratchet
from ratchet_client.losses import JSON, TENSORS
from ratchet_client.torch import ratchet_loss
from service.losses import intake
from service.relay.queue import Taken
from service.spec.objective import ObjectiveSpec
from workers.losses.serve import Round
from workers.objectives import Objective

ROWS, TOKENS = 64, 4096
OBJECTIVE = "gspo"
MOST_TIMES_THE_TIME, LEAST_TIMES_THE_CPU = 3.0, 10.0
JSON_ROUNDS = 5  # they take a second or more each

Batch = dict[str, Tensor]


def batch(rows: int, tokens: int) -> Batch:
    """Padded, and without padding: every row is full."""
    draw = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(rows, tokens, generator=draw) - 0.1  # a log-prob above 0 would cost a warning
    return {
        "log_probs": old + 0.01 * torch.randn(rows, tokens, generator=draw),
        "old_log_probs": old,
        "advantages": torch.randn(rows, generator=draw),
        "response_mask": torch.ones(rows, tokens, dtype=torch.bool),
    }


def flat(padded: Batch) -> Batch:
    """The same as it is sent: rows one behind the other, which need no mask."""
    rows, tokens = padded["log_probs"].shape
    per_token = {name: padded[name].view(-1) for name in ("log_probs", "old_log_probs")}
    return {**per_token, "advantages": padded["advantages"], "cu_seqlens": tokens * torch.arange(rows + 1)}


def bare(objective: Objective, padded: Batch) -> Tensor:
    """The gradient; beside it the metrics, which a request brings too."""
    policy = padded["log_probs"].detach().requires_grad_()
    known: Any = {name: values for name, values in padded.items() if name != "log_probs"}
    step = objective.prepare(**known)
    loss, outputs = objective.loss(policy, step.rows())
    loss.backward()
    (step.metrics + outputs.metrics).finish()
    assert policy.grad is not None
    return policy.grad


class InProcess(Ratchet):
    """Answers loss requests as the API and a loss worker do, by calling what these call."""

    def __init__(self) -> None:
        pass

    def losses_safetensors(self, body: bytes, *, wait_s: float = 30.0) -> bytes:
        order = intake.order(body, TENSORS, "loss_here", "default", time.time() + wait_s)
        answers: list[tuple[Taken, bytes]] = []
        Round([Taken("loss_here", "default", order, b"")], answers.extend).run()
        return answers[0][1]


def through(ratchet: Ratchet, sent: Batch) -> Tensor:
    """The gradient of a trainer's call."""
    policy = sent["log_probs"].detach().requires_grad_()
    known: Any = {name: values for name, values in sent.items() if name != "log_probs"}
    loss, _ = ratchet_loss(policy, objective=OBJECTIVE, client=ratchet, outputs=(), **known)
    loss.backward()
    assert policy.grad is not None
    return policy.grad


# ---------------------------------------------------------------- measuring


def timed(call: Callable[[], Any]) -> float:
    started_at = time.perf_counter()
    call()
    return time.perf_counter() - started_at


def spent_by(stack: Stack, times: int, call: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds that one call costs each process."""
    processes = {"this process": os.getpid(), **stack.processes}

    def now() -> dict[str, float]:
        own = time.process_time()
        return {name: own if pid == os.getpid() else cpu_s(pid) for name, pid in processes.items()}

    before = now()
    for _ in range(times):
        call()
    return {name: (after - before[name]) / times for name, after in now().items()}


def request(stack: Stack, body: bytes, media_type: str) -> bytes:
    """The answer's bytes; what a client spends on JSON is not what is measured here."""
    headers = {"Content-Type": media_type, "Accept": media_type, "Prefer": "wait=60"}
    response = stack.ratchet._transport.attempt("POST", "/v1/losses", content=body, headers=headers, timeout_s=120.0)
    assert response.status_code == 200, response.text[:1000]
    return response.content


def bodies(padded: Batch) -> tuple[bytes, bytes]:
    """The same request in safetensors, and in JSON as anybody would write it: tensor.tolist()."""
    asked = {"objective": OBJECTIVE, "return": ["gradients"]}
    tensors = {f"0/{name}": values for name, values in flat(padded).items()}
    rows = {name: values.tolist() for name, values in padded.items() if name != "response_mask"}
    text = json.dumps({"items": [{**asked, "batch": rows}], "dtype": "float32"})
    return save(tensors, {"request": json.dumps({"items": [asked]})}), text.encode()


@dataclass
class Findings:
    """Seconds, the median of all rounds or the mean; bodies in bytes."""

    bare: float = 0.0
    within: float = 0.0
    over: float = 0.0
    within_alone: float = 0.0
    over_alone: float = 0.0
    small: float = 0.0
    encoding: float = 0.0
    decoding: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    api_tensors: float = 0.0
    api_json: float = 0.0
    tensors_bytes: int = 0
    json_bytes: int = 0


def measure(rounds: int) -> Findings:
    torch.set_num_threads(1)  # as a loss worker has by default
    objective = Objective(ObjectiveSpec.model_validate(OBJECTIVE).resolve())
    padded = batch(ROWS, TOKENS)
    sent, small = flat(padded), flat(batch(2, 16))
    found, here = Findings(), InProcess()
    with started(workers=1) as stack:
        for _ in range(5):  # caches, connections
            ways = through(stack.ratchet, sent), through(here, sent), bare(objective, padded).view(-1)
            assert torch.equal(ways[0], ways[1]) and torch.equal(ways[0], ways[2]), "all ways give the same gradient"
        times = [
            (
                timed(lambda: through(stack.ratchet, sent)),
                timed(lambda: through(here, sent)),
                timed(lambda: bare(objective, padded)),
                timed(lambda: through(stack.ratchet, small)),
            )
            for _ in range(rounds)
        ]
        found.over, found.within, found.bare, found.small = (median(column) for column in zip(*times, strict=True))
        found.over_alone = median(timed(lambda: through(stack.ratchet, sent)) for _ in range(rounds))
        found.within_alone = median(timed(lambda: through(here, sent)) for _ in range(rounds))
        found.spent = spent_by(stack, rounds, lambda: through(stack.ratchet, sent))
        tensors, text = bodies(padded)
        found.api_tensors = spent_by(stack, rounds, lambda: request(stack, tensors, TENSORS))["API"]
        found.api_json = spent_by(stack, JSON_ROUNDS, lambda: request(stack, text, JSON))["API"]
        answer = request(stack, tensors, TENSORS)
    found.encoding = median(timed(lambda: save({str(i): v for i, v in enumerate(sent.values())})) for _ in range(rounds))
    found.decoding = median(timed(lambda: load(answer)) for _ in range(rounds))
    found.tensors_bytes, found.json_bytes = len(tensors), len(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    found = measure(rounds)
    print(f"{ROWS} x {TOKENS} tokens, float32, {OBJECTIVE} with gradients; medians of {rounds} rounds")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with one thread\n")
    slower, dearer = found.over / found.within, found.api_json / found.api_tensors
    print(f"the bare objective, here        {ms(found.bare)}")
    print(f"the same call, here             {ms(found.within)}")
    print(f"over HTTP, safetensors          {ms(found.over)}   {slower:.2f} times as long; at most {MOST_TIMES_THE_TIME:g}")
    print(f"                                              {found.over / found.bare:.2f} times the bare objective")
    print(f"  of it: the same, 2 x 16 tokens{ms(found.small)}")
    print(f"  of it: encoding               {ms(found.encoding)}   {found.tensors_bytes / 2**20:.1f} MiB")
    print(f"  of it: decoding               {ms(found.decoding)}")
    for name, seconds in found.spent.items():
        print(f"  CPU: {name:25}{ms(seconds)}")
    alone = found.over_alone / found.within_alone
    print(
        f"\neach in a loop of its own: over HTTP{ms(found.over_alone)}, here{ms(found.within_alone)}: {alone:.2f} times as long"
    )
    print(f"\nthe API's CPU, safetensors      {ms(found.api_tensors)}")
    print(
        f"the API's CPU, JSON             {ms(found.api_json)}   {dearer:.1f} times as much; at least {LEAST_TIMES_THE_CPU:g}"
    )
    print(f"  of {found.json_bytes / 2**20:.1f} MiB")


def ms(seconds: float) -> str:
    return f"{1000 * seconds:8.1f} ms"


if __name__ == "__main__":
    main()
