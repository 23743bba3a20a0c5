"""A small server that speaks the wire of vLLM 0.33 over HTTP, with our own tiny model and sampler inside, and vLLM's faults.

What it takes and answers is written down from vLLM's sources; docs/rollout-engines.md names the places.
"""

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from workers.policy.base import Base
from workers.policy.policy import Policy
from workers.policy.score.layout import Sequence
from workers.rollout.engine import Request, SamplingParams

# Fields of CompletionRequest (vllm/entrypoints/openai/completion/protocol.py). vLLM only logs others; here they are refused.
KNOWN = {
    "model", "prompt", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed",
    "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user", "use_beam_search", "top_k", "min_p",
    "repetition_penalty", "length_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "allowed_token_ids", "prompt_logprobs",
    "add_special_tokens", "priority", "request_id", "return_tokens_as_token_ids", "return_token_ids", "cache_salt",
}  # fmt: skip
Answer = tuple[int, Any]


def error(status: int, message: str, kind: str = "BadRequestError") -> Answer:
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Vllm:
    """Listens on a port of this machine, until `stop`. The attributes are what an operator may have set, or a test broken."""

    def __init__(self, base: Base, name: str = "base") -> None:
        self.base = base
        self.name, self.rows, self.max_model_len = name, self.base.text.rows, self.base.text.context
        self.processed = True  # --logprobs-mode processed_logprobs
        self.updates_adapters, self.max_lora_rank, self.key, self.version = True, 16, "", "0.33.0"
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.before: Callable[[str, dict[str, Any]], Answer | None] = lambda path, body: None  # an answer in place of its own
        self.after: Callable[[str, dict[str, Any]], None] = lambda path, answer: None  # changes its own
        self._lock, self._port = Lock(), 0
        self.connections = set[socket.socket]()
        self._adapters: dict[str, str] = {}
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def adapters(self) -> list[str]:
        return sorted(self._adapters)

    def paths(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == path]

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_port
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """The process ends: nobody listens, and nothing is remembered."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for name in self.adapters:
                self._forget(name)

    def answer(self, path: str, body: dict[str, Any], key: str) -> Answer:
        self.asked.append((path, body))
        if path.startswith("/v1") and self.key and key != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if (instead := self.before(path, body)) is not None:
            return instead
        with self._lock:
            route = {
                "/health": lambda body: (200, None),
                "/version": lambda body: (200, {"version": self.version}),
                "/v1/models": self._models,
                "/tokenize": self._tokenize,
                "/v1/completions": self._complete,
                **(
                    {"/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload}
                    if self.updates_adapters
                    else {}
                ),
            }.get(path)
            if route is None:
                return 404, {"detail": "Not Found"}
            status, answer = route(body)
        if status == 200 and answer is not None:
            self.after(path, answer)
        return status, answer

    def _models(self, _: dict[str, Any]) -> Answer:
        base = {"id": self.name, "object": "model", "root": self.name, "parent": None, "max_model_len": self.max_model_len}
        loras = [{"id": name, "object": "model", "root": path, "parent": self.name} for name, path in self._adapters.items()]
        return 200, {"object": "list", "data": [base, *loras]}

    def _tokenize(self, body: dict[str, Any]) -> Answer:
        tokens = self.base.text.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return 200, {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens, "token_strs": None}

    def _load(self, body: dict[str, Any]) -> Answer:
        name, path = body["lora_name"], body["lora_path"]
        if name in self._adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded. ...", "InvalidUserInput")
        if not (Path(path) / "adapter_config.json").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            message = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            return error(500, message, "InternalServerError")
        self.base.adapters.add_saved(name, Path(path))
        self._adapters[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: dict[str, Any]) -> Answer:
        if body["lora_name"] not in self._adapters:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.", "NotFoundError")
        self._forget(body["lora_name"])
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def _forget(self, name: str) -> None:
        del self._adapters[name]
        self.base.adapters.remove(name)

    def _complete(self, body: dict[str, Any]) -> Answer:
        if strange := body.keys() - KNOWN:
            return error(400, f"unknown fields {strange}")
        if body["model"] not in (self.name, *self._adapters):
            return error(404, f"The model `{body['model']}` does not exist. Valid aliases: {self.name}.", "NotFoundError")
        if out := [token for token in map(int, body.get("logit_bias") or ()) if token >= self.rows]:
            message = f"token_id(s) {out} in logit_bias contain out-of-vocab token ids. Vocabulary size: {self.rows}"
            return error(400, message)
        if not 0 <= body["temperature"] <= 2:
            return error(400, f"temperature must be in [0, 2], got {body['temperature']}.")
        prompt, adapter = body["prompt"], None if body["model"] == self.name else body["model"]
        how = SamplingParams(
            min(body["max_tokens"], self.max_model_len - len(prompt)),
            body["temperature"],
            body.get("top_p", 1.0),
            body.get("top_k", 0),
            tuple(body.get("stop", ())),
            tuple(body.get("stop_token_ids", ())),
            ends=not body.get("ignore_eos", False),
        )
        [drawn] = self.base.engine.run([Request(prompt, how, body.get("seed") or 0, adapter)])
        log_probs = drawn.log_probs
        if not self.processed:
            log_probs = Policy(self.base, adapter).score([Sequence(prompt, drawn.tokens)]).log_probs[0].tolist()
        names = [f"token_id:{token}" for token in drawn.tokens]
        choice = {
            "index": 0,
            "text": drawn.text,
            "logprobs": {"text_offset": [], "token_logprobs": log_probs, "tokens": names, "top_logprobs": []},
            "finish_reason": drawn.finish_reason,
            "stop_reason": None,
            "token_ids": drawn.tokens if body.get("return_token_ids") else None,
            "prompt_logprobs": None,
            "prompt_token_ids": prompt if body.get("return_token_ids") else None,
        }
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice], "usage": {}}


def _handler(vllm: Vllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            vllm.connections.add(self.connection)

        def finish(self) -> None:
            vllm.connections.discard(self.connection)
            with suppress(OSError):
                super().finish()

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            status, answer = vllm.answer(self.path, body, self.headers.get("Authorization", ""))
            content = b"" if answer is None else answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            with suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            pass

    return Handler


def until(holds: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
