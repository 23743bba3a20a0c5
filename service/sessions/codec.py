"""Requests and answers of operations as bytes: a safetensors file whose metadata `head` is JSON. Ragged tensors are flat, with
`cu_seqlens` beside them: where each row begins, and the end. B rows of T_i tokens, N of them in all, K targets a token.

| kind | head | tensors of the request | answer |
|---|---|---|---|
| forward, forward_backward | kind, loss, config | tokens [N], cu_seqlens [B+1], target_tokens [N] or [N, K], and what the
  loss takes: weights, log_probs, advantages, mask, clip_low_threshold, clip_high_threshold; the Tinker wire may give widths
  (of rows that differ in K: [how many, K], ...) | metrics, widths as they came; cu_seqlens, log_probs |
| forward, forward_backward | kind, objective, temperature | as train_step | metrics; cu_seqlens (of answers), log_probs |
| train_step | kind, objective, optimizer, minibatches, epochs, temperature, microbatch_tokens | prompt_tokens,
  prompt_cu_seqlens [B+1], completion_tokens [N], completion_cu_seqlens [B+1], group_ids [B]; rewards [B] or [B, R], or
  advantages [B] or [N]; and rollout_log_probs [N], response_mask [N], truncated [B], reward_weights [R] | metrics; advantages |
| optim_step | kind, optimizer | | metrics: grad_norm, learning_rate, skipped |
| sample | kind, checkpoint, num_samples, seed, sampling, prompt_log_probs, top_prompt_log_probs, top_log_probs; texts, or chats
  (messages, tools, chat_template_kwargs); sampling.max_tokens may be null: to the end of the context; pieces: name the tokens;
  parts: tell the texts while they grow | without texts and chats: prompt_tokens [M], prompt_cu_seqlens [P+1];
  target_tokens [M, K] | finish_reasons, texts, pieces (by id); with pieces: text_ends and prompt_ends (whole characters after
  each token, by row; of prompts only with prompt_log_probs), prompt_texts; prompt_tokens, prompt_cu_seqlens, tokens,
  cu_seqlens [P x num_samples + 1], log_probs; prompt_log_probs [M] (NaN for each prompt's first token), top_prompt_ids and
  top_prompt_log_probs [M, k], top_ids and top_log_probs [N, k], target_log_probs [M, K] |
| eval | kind, rows, texts (their prompts), graders, num_samples, seed, sampling | | metrics; by row: texts, rewards,
  scores, errors |
| save_checkpoint | kind, name, purpose, ttl_s, overwrite, metadata | | checkpoint_id, name, purpose, step |
| load_checkpoint | kind, checkpoint, optimizer | | checkpoint_id |
| finish | kind | | checkpoint_id |
| refused | kind, error | | none: it fails with this error, and uses up its place (the Tinker wire counts on after a refusal) |
"""

import json
import re
from array import array
from collections.abc import Mapping
from itertools import pairwise
from math import isfinite
from typing import Any

from service.relay.tensors import LENGTH_BYTES, METADATA, Tensor, Tensors, decode, encode

HEAD = "head"
TYPECODES = {"I64": "q", "I32": "i", "F32": "f", "F64": "d"}
# Tensors of an answer that have a row for each token of `cu_seqlens`, and those with one for each of `prompt_cu_seqlens`.
BY_ROW = ("tokens", "log_probs", "top_ids", "top_log_probs")
BY_PROMPT = ("prompt_tokens", "prompt_log_probs", "top_prompt_ids", "top_prompt_log_probs", "target_log_probs")


def pack(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a request or an answer. The same head and tensors give the same bytes."""
    return encode(tensors, {HEAD: json.dumps(head, ensure_ascii=False, separators=(",", ":"), sort_keys=True)})


def unpack(raw: bytes | memoryview) -> tuple[dict[str, Any], Tensors]:
    """Head and tensors. Raises BadTensors, or KeyError if there is no head."""
    tensors, metadata = decode(raw)
    return json.loads(metadata[HEAD]), tensors


def summary(beginning: bytes) -> dict[str, Any]:
    """What is short of an answer, from its first bytes: metrics, the checkpoint, how many answers and tokens. Less where the
    header does not fit into them, which has long texts last and then the tensors."""
    length = int.from_bytes(beginning[:LENGTH_BYTES], "little")
    header: dict[str, Any] = {}
    if len(beginning) < LENGTH_BYTES + length:
        head = _begun(beginning[LENGTH_BYTES:].decode(errors="ignore"))
    else:
        header = json.loads(beginning[LENGTH_BYTES : LENGTH_BYTES + length])
        head = json.loads(header[METADATA][HEAD])
    told = {name: head[name] for name in SHORT if head.get(name) is not None}
    if "finish_reasons" in head:
        told |= {"answers": len(head["finish_reasons"])} | ({"tokens": header["tokens"]["shape"][0]} if header else {})
    return told


def _begun(header: str) -> dict[str, Any]:
    """The members of the head that are whole in a header that was cut off."""
    members: dict[str, Any] = {}
    if (found := HEAD_BEGINS.match(header)) is None:
        return members
    text, at, decoder = json.loads(f'"{found[1]}"'), 1, json.JSONDecoder()
    try:
        while True:
            name, colon = decoder.raw_decode(text, at)
            value, at = decoder.raw_decode(text, colon + 1)
            if text[at : at + 1] != ",":  # a number may go on
                return members
            members[name] = value
            at += 1
    except ValueError:
        return members


HEAD_BEGINS = re.compile(rf'\{{"{METADATA}":\{{"{HEAD}":"((?:[^"\\]|\\u[0-9a-f]{{4}}|\\[^u])*+)')  # as `pack` writes it
SHORT = ("metrics", "checkpoint_id", "name", "step")


def as_json(raw: bytes) -> dict[str, Any]:
    """An answer as plain JSON: the head, and each tensor as a list; ragged ones as a list of rows. NaN becomes null."""
    head, tensors = unpack(raw)
    cuts = {name: _numbers(tensors.pop(name)) for name in ("cu_seqlens", "prompt_cu_seqlens") if name in tensors}
    for name, tensor in tensors.items():
        values = _nested(tensor)
        cut = cuts.get("prompt_cu_seqlens" if name in BY_PROMPT else "cu_seqlens" if name in BY_ROW else "")
        head[name] = values if cut is None else [values[begin:end] for begin, end in pairwise(cut)]
    return head


def _numbers(tensor: Tensor) -> list[Any]:
    numbers = array(TYPECODES[tensor.dtype], tensor.data.tobytes()).tolist()
    return numbers if tensor.dtype.startswith("I") else [value if isfinite(value) else None for value in numbers]


def _nested(tensor: Tensor) -> list[Any]:
    numbers = _numbers(tensor)
    for size in reversed(tensor.shape[1:]):
        numbers = [numbers[i : i + size] for i in range(0, len(numbers), size)] if size else []
    return numbers
