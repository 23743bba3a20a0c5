"""What the client asks to sample, as an operation."""

from array import array
from hashlib import blake2b
from typing import Any

from service.errors import FieldError
from service.losses.numbers import tensor
from service.relay.tensors import Tensors
from service.sessions.codec import pack
from service.sessions.tensors import MOST_TARGETS
from service.store.operations import Asked
from service.tinker.datums import MOST_CELLS
from service.tinker.log import integers
from service.tinker.requests import SampleBody, SamplingParams, TensorData
from service.validation import invalid, parse
from service.validation.words import counted

MOST_TOKENS = 131_072  # of an answer, where neither the client nor the model says how many
NOTHING = -1  # in target_prompt_logprobs: no log-prob is wanted here


def asked(sent: dict[str, Any], *, seq: int, lane: str, checkpoint_id: str | None, context: int | None, run_seed: int) -> Asked:
    """`lane`: the sampler's id. `context`: the model's, if it is known. Raises InvalidRequest."""
    body = parse(SampleBody, sent)
    if body.prompt_alt_tokens_k:
        raise _wrong("/prompt_alt_tokens_k", "is not offered here; leave it out, or sample answers of one token", "not_offered")
    prompt = _prompt(body)
    how = _how(body.sampling_params, len(prompt), context)
    if body.prompt_logprobs_last_n is not None and not (body.prompt_logprobs and body.prompt_logprobs_last_n < len(prompt)):
        raise _wrong("/prompt_logprobs_last_n", f"needs prompt_logprobs, and must be below the prompt's length ({len(prompt)})")
    head = {
        "kind": "sample",
        "checkpoint": checkpoint_id,
        "num_samples": body.num_samples,
        "seed": _drawn(run_seed, lane, seq) if body.sampling_params.seed is None else body.sampling_params.seed % 2**63,
        "sampling": how,
        "prompt_log_probs": bool(body.prompt_logprobs),
        "top_prompt_log_probs": body.topk_prompt_logprobs,
        "top_log_probs": body.topk_sample_logprobs,
    }
    tensors: Tensors = {
        "prompt_tokens": tensor(array("i", prompt)),
        "prompt_cu_seqlens": tensor(array("q", (0, len(prompt)))),
    }
    if body.target_prompt_logprobs is not None:
        targets, k = _targets(body.target_prompt_logprobs, len(prompt))
        tensors["target_tokens"] = tensor(targets, len(prompt), k)
    cost = len(prompt) + body.num_samples * how["max_tokens"]
    return Asked("sample", seq, pack(head, tensors), cost, lane)


def _drawn(run_seed: int, sampler_id: str, seq: int) -> int:
    """The seed of a request that names none: of the run, the sampler's number in its client's session, and the request's own.
    Ids are drawn by chance and play no part, so that two equal programs draw the same."""
    number = sampler_id.rpartition(":")[2]
    digest = blake2b(f"{run_seed}/sampler {number}/{seq}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _prompt(body: SampleBody) -> list[int]:
    tokens: list[int] = []
    for i, chunk in enumerate(body.prompt.chunks):
        pointer = f"/prompt/chunks/{i}"
        if chunk.get("type", "encoded_text") != "encoded_text" or not isinstance(chunk.get("tokens"), list):
            kind = str(chunk.get("type"))[:40]
            raise _wrong(pointer, f"must be encoded_text: models read text here, got {kind!r}", "modality_not_offered")
        tokens += integers(chunk["tokens"], f"{pointer}/tokens")
    if not tokens:
        raise _wrong("/prompt/chunks", "must hold at least one token")
    return tokens


def _how(sent: SamplingParams, prompt: int, context: int | None) -> dict[str, Any]:
    stop = [sent.stop] if isinstance(sent.stop, str) else (sent.stop or [])
    texts, ids = ([each for each in stop if isinstance(each, kind)] for kind in (str, int))
    if not all(texts):
        raise _wrong("/sampling_params/stop", "must have no empty text")
    room = MOST_TOKENS if context is None else context - prompt
    if room < 0:
        raise _wrong("/prompt", f"has {counted(prompt, 'token')}; the model's context holds {context}", "prompt_too_long")
    return {
        "max_tokens": room if sent.max_tokens is None else min(sent.max_tokens, room),
        "temperature": sent.temperature,
        "top_p": sent.top_p,
        "top_k": max(sent.top_k, 0),
        "stop": texts,
        "stop_ids": ids,
        "ends": sent.stop != [],
    }


def _targets(sent: TensorData, prompt: int) -> "tuple[array[int], int]":
    """[prompt, K]: theirs, which begins with the second token, behind a row of NOTHING; and K."""
    pointer = "/target_prompt_logprobs"
    if len(sent.shape) != 2 or sent.shape[0] != prompt - 1 or not 1 <= sent.shape[1] <= MOST_TARGETS:
        raise _wrong(f"{pointer}/shape", f"must be [{prompt - 1}, K] with K up to {MOST_TARGETS}, got {sent.shape[:8]}")
    rows, k = sent.shape
    if rows * k > MOST_CELLS:
        raise _wrong(pointer, f"may have {MOST_CELLS} cells, got {rows * k}", "too_large")
    values = integers(sent.data, f"{pointer}/data", least=NOTHING)
    if sent.sparse_crow_indices is None:
        if len(values) != rows * k:
            raise _wrong(f"{pointer}/data", f"must have {rows * k} values for the shape {sent.shape}, got {len(values)}")
        return array("i", [NOTHING] * k + values), k
    crow, columns = sent.sparse_crow_indices, sent.sparse_col_indices or []
    whole = len(crow) == rows + 1 and crow[0] == 0 and crow[-1] == len(values) == len(columns) and sorted(crow) == crow
    if not whole or not all(0 <= column < k for column in columns):
        raise _wrong(pointer, "its sparse indices do not fit its shape and data")
    cells = array("i", [NOTHING] * (k * prompt))
    for row in range(rows):
        for at in range(crow[row], crow[row + 1]):
            cells[(row + 1) * k + columns[at]] = values[at]
    return cells, k


def _wrong(pointer: str, detail: str, code: str = "invalid") -> Exception:
    return invalid([FieldError(pointer, detail, code)])
