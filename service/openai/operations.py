"""Requests in OpenAI's form as `sample` operations."""

from array import array
from itertools import accumulate
from typing import Any

from service.jobs.data import plain_messages
from service.losses.numbers import tensor
from service.openai.requests import ChatRequest, CompletionRequest
from service.relay.tensors import Tensors
from service.sessions.codec import pack
from service.store.operations import Asked

ASSUMED_TOKENS = 1024  # the cost of an answer that may go on to the end of the context


def asked(request: CompletionRequest | ChatRequest, checkpoint: str | None, lane: str) -> Asked:
    """The operation. Each request has a lane of its own: operations of several never share a place."""
    head: dict[str, Any] = {
        "kind": "sample",
        "checkpoint": checkpoint,
        "num_samples": request.n or 1,
        "seed": None if request.seed is None else request.seed % 2**63,
        "sampling": {
            "max_tokens": max_tokens(request),
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "top_k": request.top_k or 0,
            "stop": request.stops,
            "stop_ids": [],
            "ends": True,
        },
        "prompt_log_probs": False,
        "top_prompt_log_probs": 0,
        "top_log_probs": 0,
    }
    tensors = Tensors()
    if isinstance(request, ChatRequest):
        prompts, size = 1, sum(len(str(message)) for message in request.messages)
        head["chats"] = [
            {
                "messages": plain_messages(request.messages),
                "tools": None if request.tool_choice == "none" else request.tools,
                "chat_template_kwargs": request.chat_template_kwargs,
            }
        ]
        head |= {"pieces": bool(request.logprobs), "top_log_probs": request.top_logprobs or 0}
    else:
        prompts, size = len(request.prompts), sum(map(len, request.prompts))
        if isinstance(request.prompts[0], str):
            head["texts"] = request.prompts
        else:
            rows: Any = request.prompts
            tensors["prompt_tokens"] = tensor(array("i", (token for row in rows for token in row)))
            tensors["prompt_cu_seqlens"] = tensor(array("q", accumulate(map(len, rows), initial=0)))
        head |= {"pieces": request.logprobs is not None or bool(request.echo), "top_log_probs": request.logprobs or 0}
        if request.echo and request.logprobs is not None:
            head |= {"prompt_log_probs": True, "top_prompt_log_probs": request.logprobs}
    head["parts"] = bool(request.stream) and not head["pieces"]
    cost = size + prompts * (request.n or 1) * (head["sampling"]["max_tokens"] or ASSUMED_TOKENS)
    return Asked("sample", 1, pack(head, tensors), cost, lane)


def max_tokens(request: CompletionRequest | ChatRequest) -> int | None:
    """None: as many as the context holds."""
    if isinstance(request, ChatRequest):
        return request.max_completion_tokens or request.max_tokens
    return 16 if request.max_tokens is None else request.max_tokens
