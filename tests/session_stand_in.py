"""Stands in for the worker of sessions: answers each operation in its turn with numbers that follow from its request."""

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

from service.doorbell import Doorbell
from service.jobs import lease as leases
from service.relay.tensors import Tensor
from service.sessions.codec import pack, unpack
from service.settings import Settings
from service.store import operations
from service.store.operations import Answered
from service.store.session import Store

REFUSED = {"code": "token_unknown", "detail": "the model knows tokens 0 to 9, got 99", "category": "user", "pointer": "/tokens"}


def floats(values: list[float]) -> Tensor:
    return Tensor("F32", (len(values),), memoryview(struct.pack(f"<{len(values)}f", *values)))


def integers(values: list[int], dtype: str = "I64") -> Tensor:
    form = f"<{len(values)}{'q' if dtype == 'I64' else 'i'}"
    return Tensor(dtype, (len(values),), memoryview(struct.pack(form, *values)))


def numbers(tensor: Tensor) -> list[int]:
    return list(struct.unpack(f"<{len(tensor)}{'q' if tensor.dtype == 'I64' else 'i'}", tensor.data))


def answer(kind: str, seq: int, request: bytes) -> bytes:
    """The log-prob of a token is its negative; an answer to a prompt is the prompt, each token one higher for each sample."""
    head, tensors = unpack(request)
    match kind:
        case "forward" | "forward_backward" if "loss" in head:
            given = {"cu_seqlens": tensors["cu_seqlens"], "log_probs": floats([-float(n) for n in numbers(tensors["tokens"])])}
            return pack({"metrics": {"loss:sum": float(seq)}}, given)
        case "forward" | "forward_backward":
            tokens, cuts = tensors["completion_tokens"], tensors["completion_cu_seqlens"]
            given = {"cu_seqlens": cuts, "log_probs": floats([-float(n) for n in numbers(tokens)])}
            return pack({"metrics": {"loss:sum": float(seq)}}, given)
        case "train_step":
            return pack({"metrics": {"policy/loss": float(seq), "answers": float(len(tensors["group_ids"]))}}, {})
        case "sample":
            return _sampled(head, tensors)
        case "save_checkpoint":
            return pack({"checkpoint_id": "ckpt_1", "name": head["name"], "step": seq, "purpose": head["purpose"]}, {})
        case "load_checkpoint":
            return pack({"checkpoint_id": head["checkpoint"]}, {})
        case "finish":
            return pack({"checkpoint_id": "ckpt_2"}, {})
        case _:
            return pack({"metrics": {"grad_norm": float(seq)}}, {})


def _sampled(head: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    if "texts" in head:
        prompts = [[ord(sign) for sign in text] for text in head["texts"]]
    else:
        flat, cuts = numbers(tensors["prompt_tokens"]), numbers(tensors["prompt_cu_seqlens"])
        prompts = [flat[start:end] for start, end in pairwise(cuts)]
    answers = [[token + place for token in prompt] for prompt in prompts for place in range(head["num_samples"])]
    told = {
        "prompt_tokens": integers([token for prompt in prompts for token in prompt], "I32"),
        "prompt_cu_seqlens": integers([0, *accumulate(map(len, prompts))]),
        "tokens": integers([token for row in answers for token in row], "I32"),
        "cu_seqlens": integers([0, *accumulate(map(len, answers))]),
        "log_probs": floats([-1.0 / token for row in answers for token in row]),
    }
    if head["prompt_log_probs"]:
        first = [float("nan") if place == 0 else -0.5 for prompt in prompts for place in range(len(prompt))]
        told["prompt_log_probs"] = floats(first)
    texts = ["".join(map(chr, row)) for row in answers]
    return pack(
        {"texts": texts, "finish_reasons": ["stop", "length"] * (len(answers) // 2) + ["stop"] * (len(answers) % 2)}, told
    )


@contextmanager
def working(store: Store, settings: Settings, doorbell: Doorbell) -> Iterator[list[tuple[int, str]]]:
    """A worker in a thread. Gives what it has run: (seq, kind). It refuses rows that begin with the token 99."""
    ran = list[tuple[int, str]]()
    over = threading.Event()
    held: dict[str, Any] = {}
    done: dict[str, int] = {}

    def work() -> None:
        while not over.wait(0.005):
            while (claimed := leases.claim(store, settings, "stand-in", ["any", "cpu"])) is not None:
                held[claimed[1].id], done[claimed[1].id] = claimed[0], 0
            with store.look() as connection:
                rows = operations.ready(connection, done)
            for row in rows:
                ran.append((row.seq, row.kind))
                done[row.job_id] = row.seq
                tensors = unpack(row.request)[1]
                wrong = "tokens" in tensors and numbers(tensors["tokens"])[0] == 99
                answered = (
                    Answered(row.id, error=REFUSED) if wrong else Answered(row.id, answer(row.kind, row.seq, row.request))
                )
                leases.answer_operations(store, settings, held[row.job_id], [answered])
                doorbell.signal(row.job_id, "events")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ran
    finally:
        over.set()
        thread.join()
