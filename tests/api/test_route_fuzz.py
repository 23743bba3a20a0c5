"""Each route of sessions, of the Tinker wire and of OpenAI's, called with requests that are nearly right.

Between them and the application there is no server, so a call takes a few milliseconds. What it names is there: sessions,
operations of every kind that wait, are done or were refused, checkpoints, samplers, files. After each call: no 5xx; the status,
the media type and, of the native and OpenAI's routes, the schema are documented; an error has the shape of its face; nothing
internal is told; another project's key gets a 404 for what this one got. What a Tinker route took is asked for: its result is
one, or an error of the category `user`.

In the suite: a few calls of each route, the same ones in every run. Many:
`make fuzz-routes FUZZ_CALLS=10000 ARGS="-k optim_step"`.
"""

import asyncio
import json
import os
import random
import re
import shutil
from array import array
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

import pytest
import zstandard
from api.conftest import log_is_kept
from jsonschema import Draft202012Validator
from mutations import Mutator
from pydantic import SecretStr
from session_operations import LORA, TINY, forward_backward, optim_step, row, train_step
from session_stand_in import working

from chaos.standin import said, sampler
from service.api.examples import SESSION_SPEC
from service.app import create_app
from service.doorbell import Doorbell
from service.edge.rate import Limiter, RateReply
from service.ids import new_id, utcnow
from service.sessions.body import OperationBody, asked
from service.sessions.codec import unpack
from service.settings import Settings
from service.store import keys
from service.store.operations import Answered
from service.store.tables import Checkpoint, TinkerModel
from service.tinker import futures
from service.tinker.messages import FLOAT32, INT64, ForwardBackwardRequest
from service.tinker.routes import ROUTERS as TINKER
from service.validation import parse

CALLS = int(os.environ.get("RATCHET_TEST_FUZZ_CALLS", "8"))
SEED = os.environ.get("RATCHET_TEST_FUZZ_SEED", "1")
MARK = "only-for-its-owner"  # in everything of the owner's that has a text
INTERNAL = re.compile(
    rb"Traceback|\.py\b|sqlalchemy|sqlite3?\b|psycopg|site-packages|errors\.pydantic|INSERT INTO|SELECT |UPDATE |"
    rb" at 0x[0-9a-f]{6,}|object at |starlette|uvicorn|<class|ValueError|KeyError|TypeError"
)
RENEWED = 250  # calls after which there is a new session, so that none is full
AT_ONCE = 4
JSON, TENSORS, PROTOBUF = "application/json", "application/vnd.safetensors", "application/x-protobuf"
LORA_8 = {"rank": 8}
ROWS = b'{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2=", "completion": "3"}\n'
FORM_HEADERS = {"content-type": "multipart/form-data; boundary=b"}


@dataclass(frozen=True)
class Call:
    """A request: `path` has its parameters in braces. `body`: JSON, unless it is bytes."""

    route: str  # METHOD /path
    params: dict[str, str] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    sent: bytes | None = None  # the body as it is sent


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]

    def json(self) -> Any:
        return json.loads(self.body, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


# ---------------------------------------------------------------- what there is


class World:
    """An application, two projects, and objects of the first."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.app, self.ids = settings, create_app(settings), dict[str, str]()
        self.seqs = dict[str, int]()
        self.tickets = list[str]()
        self.signed = SplitResult("", "", "", "", "")

    async def start(self) -> None:
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()
        self.context = self.app.state.context
        with self.context.store.begin() as session:
            self.key, self.other = (keys.create(session, project=name, name="fuzz")[1] for name in ("ours", "theirs"))

    async def stop(self) -> None:
        await self._life.__aexit__(None, None, None)

    async def ask(self, call: Call, key: str | None = None) -> Answer:
        method, template = call.route.split(" ", 1)
        path = template
        for name, value in call.params.items():
            path = re.sub(rf"\{{{name}(:path)?\}}", lambda _, value=value: quote(value, safe="", errors="surrogatepass"), path)
        sent = call.sent if call.sent is not None else b"" if call.body is None else json.dumps(call.body).encode()
        headers = {"authorization": f"Bearer {key or self.key}", "content-length": str(len(sent))}
        if sent and "content-type" not in call.headers:
            headers["content-type"] = JSON
        headers |= call.headers
        return await self._call(method, path, urlencode(call.query, errors="surrogatepass"), headers, sent)

    async def _call(self, method: str, path: str, query: str, headers: dict[str, str], body: bytes) -> Answer:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path, errors="replace"),
            "raw_path": path.encode(),
            "query_string": query.encode("ascii"),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()],
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        left, over = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()
        told: list[Any] = []

        async def receive() -> Any:
            if left:
                return left.pop()
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            told.append(message)

        with suppress(Exception):  # after a 500 it is raised again, for the server's log
            await self.app(scope, receive, send)
        over.set()
        [start, *parts] = told
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
        content = b"".join(part.get("body", b"") for part in parts if part["type"] == "http.response.body")
        if headers.get("content-encoding") == "zstd":
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=2**30)
        return Answer(start["status"], headers, content)

    async def made(self, route: str, body: Any = None, **more: Any) -> Any:
        """The answer of a call that must succeed."""
        answer = await self.ask(Call(route, body=body, **more))
        assert answer.status < 300, (route, answer.status, answer.body[:1000])
        return answer.json() if answer.body else None

    def seq(self, what: str) -> int:
        self.seqs[what] = self.seqs.get(what, 0) + 1
        return self.seqs[what]

    async def settle(self) -> None:
        """Objects of every kind, of which some are answered."""
        ids = self.ids
        with working(self.context.store, self.settings, Doorbell(self.settings)):
            await self.renew()
            ids["old_session"], ids["old_model"], ids["old_tinker"] = ids["session"], ids["model"], ids["tinker"]
            wait = {"prefer": "wait=20"}
            bodies = [body for body in operations(self) if body["kind"] not in ("finish", "eval", "load_checkpoint")]
            for seq, body in enumerate([*bodies, forward_backward(row(99, 5, 6))], 1):
                ids["operation"] = (await self.operate({**body, "seq": seq}, wait))["id"]
            for ticket in [await self.train(), await self.step(), await self.save(), await self.refused()]:
                await self.resolved(ticket)
                self.tickets.append(ticket)
        self.tickets += [await self.train(), f"model={ids['model']}"]
        await self.weights()
        seed = {"sampling_session_id": ids["sampler"], "seq_id": 10**9, **sample_body()}
        ticket = (await self.made("POST /api/v1/asample", seed))["request_id"]
        await self.resolved(ticket)
        self.tickets += [ticket, f"{ticket.partition(';')[0]};last=1"]
        await self.tune()
        self.checkpoint(ids["tuning"], None, "training", {"source": "tiny"})
        of_checkpoint = {"model_id": ids["model"], "kind": "weights", "name": "first"}
        route = "GET /api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/external_weights_urls"
        [url] = (await self.made(route, params=of_checkpoint))["urls"].values()
        self.signed = urlsplit(url)

    async def tune(self) -> None:
        """A file that a job waits for, and one that none does."""
        ids, headers = self.ids, FORM_HEADERS
        for name in ("file", "unused"):
            ids[name] = (await self.made("POST /v1/files", headers=headers, sent=multipart({"purpose": "fine-tune"}, ROWS)))[
                "id"
            ]
        tune = {"model": "tiny", "training_file": ids["file"], "suffix": MARK}
        for name in ("paused", "tuning"):
            ids[name] = (await self.made("POST /v1/fine_tuning/jobs", tune))["id"]
        await self.made("POST /v1/fine_tuning/jobs/{id}/pause", params={"id": ids["paused"]})

    async def renew(self) -> None:
        """A new session, and a new client of the Tinker wire with a model."""
        ids = self.ids
        self.seqs = {name: value for name, value in self.seqs.items() if name in ("sample", "made")}
        spec = {**SESSION_SPEC, "name": MARK, "model": LORA}
        ids["session"] = (await self.made("POST /v1/sessions", spec))["id"]
        ids["tinker"] = (await self.made("POST /api/v1/create_session", {"display_name": MARK, "tags": []}))["session_id"]
        create = {"session_id": ids["tinker"], "model_seq_id": 0, "base_model": "tiny", "lora_config": LORA_8}
        ids["model"] = (await self.made("POST /api/v1/create_model", create))["model_id"]
        sampling = {"session_id": ids["tinker"], "sampling_session_seq_id": 0, "base_model": "tiny"}
        ids["sampler"] = (await self.made("POST /api/v1/create_sampling_session", sampling))["sampling_session_id"]
        await self.weights()

    async def weights(self) -> None:
        """Named checkpoints of the model, whichever were deleted."""
        run = await self.made("GET /api/v1/training_runs/{id}/checkpoints", params={"id": self.ids["model"]})
        there = {one["checkpoint_id"] for one in run["checkpoints"]}
        with self.context.store.begin(readonly=True) as session:
            job_id = session.get(TinkerModel, self.ids["model"]).job_id
        for kind, name, purpose in (
            ("weights", "first", "training"),
            ("sampler_weights", "first", "sampler"),
            ("external_weights", "_external.first", "sampler"),
        ):
            if f"{kind}/first" not in there:
                self.checkpoint(job_id, name, purpose, {**TINY, "adapter": {**LORA["adapter"], "target_modules": "all-linear"}})
            self.ids[kind] = f"tinker://{self.ids['model']}/{kind}/first"

    def checkpoint(self, job_id: str, name: str | None, purpose: str, model: dict[str, Any]) -> None:
        id_ = self.ids["checkpoint"] = new_id("ckpt")
        folder = self.context.store.blobs.temporary_dir()
        (folder / "manifest.json").write_text("{}")
        path = f"checkpoints/{job_id}/{id_}"
        self.context.store.blobs.commit_dir(folder, path)
        with self.context.store.begin() as session:
            session.add(
                Checkpoint(
                    id=id_,
                    project="ours",
                    job_id=job_id,
                    step=1,
                    attempt=1,
                    adapter="lora",
                    model=model,
                    path=path,
                    size_bytes=2,
                    manifest_sha256="0" * 64,
                    metrics={},
                    has_optimizer=purpose == "training",
                    is_final=False,
                    created_at=utcnow(),
                    name=name,
                    purpose=purpose,
                )
            )

    async def operate(self, body: Any, headers: Any) -> Any:
        route = "POST /v1/sessions/{session_id}/operations"
        return await self.made(route, body, params={"session_id": self.ids["session"]}, headers=headers)

    async def train(self) -> str:
        sent = datums(self).SerializeToString()
        headers = {"content-type": PROTOBUF}
        return (await self.made("POST /api/v1/forward_backward", sent=sent, headers=headers))["request_id"]

    async def step(self) -> str:
        return (await self.made("POST /api/v1/optim_step", {"model_id": self.ids["model"], "seq_id": self.seq("model")}))[
            "request_id"
        ]

    async def save(self) -> str:
        body = {"model_id": self.ids["model"], "seq_id": self.seq("model"), "path": "kept"}
        return (await self.made("POST /api/v1/save_weights", body))["request_id"]

    async def refused(self) -> str:
        body = {"model_id": self.ids["model"], "seq_id": self.seq("model"), "adam_params": {"beta1": "x"}}
        return (await self.made("POST /api/v1/optim_step", body))["request_id"]

    async def resolved(self, ticket: str) -> None:
        for _ in range(500):
            if (await self.ask(Call("POST /api/v1/retrieve_future", body={"request_id": ticket}))).status != 408:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"no answer to {ticket}")


def sampled(head: dict[str, Any]) -> Answered:
    """The stand-in's answer, whatever it is asked."""
    if head["kind"] == "refused":
        return Answered(head["id"], error=head["error"])
    if head["num_samples"] * len(head.get("texts", [0])) > 256:
        return Answered(head["id"], error={"code": "too_many", "detail": "more than I sample", "category": "user"})
    return said({**head, "top_prompt_log_probs": head["top_prompt_log_probs"] if head["prompt_log_probs"] else 0})


# ---------------------------------------------------------------- right requests


def operations(world: World) -> list[dict[str, Any]]:
    """One of each kind and form, in the session's next places."""
    ppo = row(
        5, 6, 7, log_probs=[-1.0, -0.5], advantages=[0.0, 1.0], clip_low_threshold=[0.8, 0.8], clip_high_threshold=[1.2, 1.2]
    )
    wide = {"tokens": [5, 6], "target_tokens": [[6, 7], [7, 8]], "weights": [[0.5, 0.5], [1.0, 0.0]]}
    gspo = row(5, 6, 7, log_probs=[-1.0, -0.5], advantages=[0.0, 1.0], mask=[0, 1])
    answers = [
        {"tokens": [8, 9], "log_probs": [-0.5, -1.0], "advantage": [0.5, -1.0], "mask": [1, True]},
        {"tokens": [8], "log_probs": [-1.0], "advantage": [1.0], "truncated": True},
    ]
    grouped = {
        "kind": "forward_backward",
        "objective": {"preset": "gspo"},
        "groups": [{"prompt_tokens": [5], "answers": answers}],
    }
    sampling = {"max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "stop": ["x"], "stop_ids": [3], "ends": False}
    exact = {"kind": "exact", "reference": "{answer}", "name": "right"}
    made: list[dict[str, Any]] = [
        forward_backward(row(5, 6, 7), row(8, 9, 10, weights=[0.5, 1.0]) | {"weights": None}),
        forward_backward(ppo, ppo, loss="ppo", config={"clip_low_threshold": 0.9}),
        forward_backward(wide, kind="forward"),
        forward_backward(gspo, loss="gspo"),
        forward_backward(ppo | {"clip_low_threshold": None, "clip_high_threshold": None}, loss="dro", config={"beta": 0.1}),
        grouped,
        optim_step(betas=[0.9, 0.95], eps=1e-8, max_grad_norm=None),
        train_step(),
        train_step(objective={"preset": "grpo"}, minibatches=1, epochs=1, microbatch_tokens=64),
        {
            "kind": "sample",
            "prompts": [[5, 6], [7]],
            "num_samples": 2,
            "sampling": sampling,
            "seed": 3,
            "prompt_log_probs": True,
            "top_prompt_log_probs": 2,
            "top_log_probs": 1,
        },
        {"kind": "sample", "texts": ["1+1=", "2"], "sampling": {"max_tokens": 2}},
        {
            "kind": "eval",
            "rows": [{"prompt": "1+1=", "answer": "2"}],
            "graders": [exact, {"kind": "regex", "pattern": "[0-9]+", "name": "digits"}],
            "sampling": {"max_tokens": 2},
        },
        {
            "kind": "save_checkpoint",
            "name": f"v{world.seq('made')}",
            "purpose": "sampler",
            "ttl_s": 3600,
            "overwrite": True,
            "metadata": {"a": [1]},
        },
        {"kind": "load_checkpoint", "checkpoint": world.ids.get("checkpoint", "ckpt_1"), "optimizer": False},
        {"kind": "finish"},
    ]
    seq = world.seqs.get("session", 0)
    world.seqs["session"] = seq + len(made)
    return [{**body, "seq": seq + 1 + place} for place, body in enumerate(made)]


def datums(world: World, kind: int = 0) -> Any:
    """A ForwardBackwardRequest in the model's next place."""
    message = ForwardBackwardRequest(model_id=world.ids["model"], seq_id=world.seq("model"), loss_fn="cross_entropy")
    for length in (3, 2):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = array("i", range(5, 5 + length)).tobytes()
        wide = kind == 1 or (kind == 2 and length == 3)
        given: dict[str, tuple[int, Any]] = {"target_tokens": (INT64, array("q", range(6, 6 + length * (2 if wide else 1))))}
        if kind == 3:
            message.loss_fn = "ppo"
            message.loss_fn_config["clip_low_threshold"] = 0.9
            message.loss_fn_config_v2["clip_high_threshold"].number = 1.1
            given |= {name: (FLOAT32, array("f", [-0.5] * length)) for name in ("logprobs", "advantages", "clip_low_threshold")}
        else:
            given["weights"] = (FLOAT32, array("f", [0.5] * len(given["target_tokens"][1])))
        for name, (dtype, numbers) in given.items():
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype, tensor.dense = dtype, numbers.tobytes()
            tensor.shape.extend((length, 2) if wide else (length,))
        if kind == 4:  # as zeros with a few others
            tensor = datum.loss_fn_inputs["weights"]
            for name, width in (("weights", 2), ("target_tokens", 2)):
                tensor = datum.loss_fn_inputs[name]
                csr = tensor.sparse_csr
                csr.values = (array("f", [1.0] * length) if name == "weights" else array("q", [6] * length)).tobytes()
                csr.crow_indices, csr.col_indices = array("q", range(length + 1)).tobytes(), array("q", [1] * length).tobytes()
                del tensor.shape[:]
                tensor.shape.extend((length, width))
    message.forward_only = kind == 1
    return message


def sample_body() -> dict[str, Any]:
    return {
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}, {"type": "encoded_text", "tokens": [8]}]},
        "sampling_params": {"max_tokens": 3, "seed": 1, "stop": ["x"], "temperature": 0.5, "top_k": 3, "top_p": 0.9},
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 1,
        "prompt_logprobs_last_n": 2,
        "target_prompt_logprobs": {"data": [5, 6, 7, 8, 9, -1], "dtype": "int64", "shape": [3, 2]},
    }


def sparse_sample() -> dict[str, Any]:
    sparse = {
        "data": [5, 6],
        "dtype": "int64",
        "shape": [3, 2],
        "sparse_crow_indices": [0, 1, 1, 2],
        "sparse_col_indices": [0, 1],
    }
    return {**sample_body(), "target_prompt_logprobs": sparse, "sampling_params": {"stop": [3], "max_tokens": 1}}


def multipart(fields: dict[str, str], file: bytes) -> bytes:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()
    ]
    head = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\nContent-Type: application/jsonl\r\n\r\n'
    )
    return b"".join((*parts, head, file, b"\r\n--b--\r\n"))


def seeds(world: World, route: str) -> list[Call]:
    """Right calls of a route."""
    ids, model, client = world.ids, {"model_id": world.ids["model"]}, {"session_id": world.ids["tinker"]}
    ordered = {**model, "seq_id": world.seq("model")}
    at = {"session_id": ids["session"]}
    run = {"model_id": ids["model"]}
    named = [{**run, "kind": kind, "name": "first"} for kind in ("weights", "sampler_weights", "external_weights")]
    paged = {"limit": "2", "offset": "1"}
    made = world.seq("made")
    tuned = {"fine_tuning_job_id": ids["tuning"]}
    completion = {
        "model": "tiny",
        "prompt": "1+1=",
        "max_tokens": 2,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "seed": 1,
        "logprobs": 1,
        "echo": True,
        "user": "u",
    }
    chat = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 2,
        "n": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": None,
        "tool_choice": "auto",
        "chat_template_kwargs": {"a": 1},
        "response_format": {"type": "text"},
    }
    bodies: dict[str, list[Any]] = {
        "POST /v1/sessions": [
            {**SESSION_SPEC, "model": LORA, "name": MARK},
            {
                "model": {"source": "tiny", "adapter": {"kind": "full"}},
                "tags": ["a"],
                "metadata": {"k": [1]},
                "seed": 3,
                "budget": {"tokens": 10},
                "checkpoints": {"every_steps": 2, "keep_last": 1, "ttl_s": 3600},
                "limits": {"max_runtime_s": 60},
            },
            {"model": {"from_checkpoint": {"id": ids["checkpoint"], "load": "weights"}}},
        ],
        "POST /v1/completions": [
            completion,
            {"model": ids["checkpoint"], "prompt": [[5, 6], [7]], "max_tokens": 1},
            {"model": "tiny", "prompt": "1+1=", "stream": True, "stream_options": {"include_usage": True}},
        ],
        "POST /v1/chat/completions": [
            chat,
            {"model": ids["tuning"], "messages": [{"role": "user", "content": "hi"}], "stream": True},
        ],
        "POST /v1/fine_tuning/jobs": [
            {
                "model": "tiny",
                "training_file": ids["file"],
                "validation_file": ids["file"],
                "suffix": MARK,
                "seed": 1,
                "metadata": {"a": "b"},
                "method": {
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": "auto"}},
                },
            },
            {
                "model": ids["checkpoint"],
                "training_file": ids["file"],
                "method": {
                    "type": "reinforcement",
                    "reinforcement": {
                        "grader": {
                            "type": "string_check",
                            "name": "g",
                            "input": "{{sample.output_text}}",
                            "reference": "{{item.completion}}",
                            "operation": "eq",
                        },
                        "hyperparameters": {"n_epochs": 1, "batch_size": 1, "compute_multiplier": 1, "eval_interval": 1},
                    },
                },
            },
        ],
        "POST /api/v1/client/config": [{"client": "x"}],
        "POST /api/v1/client/dynamic_config": [{}],
        "POST /api/v1/telemetry": [{"events": [{"a": 1}]}],
        "POST /api/v1/create_session": [{"tags": ["a"], "user_metadata": {"k": "v"}, "display_name": MARK}],
        "POST /api/v1/session_heartbeat": [client],
        "POST /api/v1/sessions/search": [
            {
                **client,
                "project_ids": ["ours"],
                "user_metadata": {"k": "v"},
                "display_name": "only",
                "statuses": [{"type": "active", "reasons": ["success"]}],
                "limit": 2,
                "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": ids["tinker"]},
            },
            {"limit": 1},
        ],
        "POST /api/v1/create_model": [
            {
                **client,
                "model_seq_id": made,
                "base_model": "tiny",
                "user_metadata": {"k": "v"},
                "lora_config": {"rank": 4, "seed": 1, "train_unembed": True, "train_mlp": False, "train_attn": True},
                "optimizer_config": {"type": "adamw"},
            },
            {**client, "model_seq_id": made, "base_model": "tiny"},
        ],
        "POST /api/v1/get_info": [model],
        "POST /api/v1/optim_step": [
            {
                **ordered,
                "adam_params": {
                    "learning_rate": 1e-3,
                    "beta1": 0.9,
                    "beta2": 0.99,
                    "eps": 1e-8,
                    "weight_decay": 0.1,
                    "grad_clip_norm": 1.0,
                },
            },
            {**ordered, "optimizer_params": {"type": "dimuon"}},
        ],
        "POST /api/v1/save_weights": [
            {**ordered, "path": f"v{made}", "ttl_seconds": 3600, "overwrite": True, "user_metadata": {"k": "v"}}
        ],
        "POST /api/v1/save_weights_external": [
            {**ordered, "path": f"v{made}", "ttl_seconds": 3600, "age_encryption_recipients": None}
        ],
        "POST /api/v1/save_weights_for_sampler": [
            {**ordered, "sampling_session_seq_id": 1000 + made},
            {**ordered, "path": f"v{made}", "sampling_session_seq_id": None},
        ],
        "POST /api/v1/load_weights": [
            {**ordered, "path": ids["weights"], "optimizer": True},
            {
                **client,
                "model_seq_id": made,
                "path": ids["weights"],
                "optimizer": False,
                "base_model": "tiny",
                "user_metadata": {},
                "optimizer_config": {"type": "adamw"},
            },
        ],
        "POST /api/v1/create_sampling_session": [
            {**client, "sampling_session_seq_id": made, "base_model": "tiny"},
            {**client, "sampling_session_seq_id": made, "model_path": ids["sampler_weights"]},
        ],
        "POST /api/v1/asample": [
            {"sampling_session_id": ids["sampler"], "seq_id": world.seq("sample"), **body}
            for body in (sample_body(), sparse_sample())
        ],
        "POST /api/v1/retrieve_future": [{"request_id": ticket} for ticket in world.tickets],
        "POST /api/v1/cancel_future": [{"request_id": ticket} for ticket in reversed(world.tickets)],
        "POST /api/v1/weights_info": [
            {"tinker_path": ids[kind]} for kind in ("weights", "sampler_weights", "external_weights")
        ],
        "POST /api/v1/copy_weights": [
            {
                "source_path": ids["weights"],
                **client,
                "model_seq_id": 10**6 + made,
                "destination_project_id": "ours",
                "ttl_seconds": 3600,
            },
            {"source_path": ids["sampler_weights"]},
        ],
    }
    of_checkpoint = "/api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}"
    calls: dict[str, list[Call]] = {
        "GET /v1/sessions": [
            Call(route, query={"limit": "2", "kind": "sampler", "status": "queued"}),
            Call(route, query={"after": ids["old_session"]}),
        ],
        "GET /v1/sessions/{session_id}": [Call(route, at)],
        "GET /v1/sessions/{session_id}/operations": [
            Call(route, {"session_id": ids["old_session"]}, {"after": "1", "limit": "3"}),
            Call(route, {"session_id": ids["old_session"]}, {"order": "newest_first", "before": ids["operation"]}),
        ],
        "GET /v1/sessions/{session_id}/operations/{operation}": [
            Call(route, {"session_id": ids["old_session"], "operation": name}, headers=accept)
            for name in ("1", "7", ids["operation"])
            for accept in ({}, {"accept": TENSORS}, {"prefer": "wait=0"})
        ],
        "GET /v1/models": [Call(route)],
        "GET /v1/models/{model_id}": [Call(route, {"model_id": name}) for name in ("tiny", ids["checkpoint"])],
        "GET /v1/files": [Call(route, query={"limit": "2", "purpose": "fine-tune", "order": "desc", "after": ids["file"]})],
        "GET /v1/files/{file_id}": [Call(route, {"file_id": ids["file"]})],
        "GET /v1/files/{file_id}/content": [Call(route, {"file_id": ids["file"]})],
        "DELETE /v1/files/{file_id}": [Call(route, {"file_id": ids[name]}) for name in ("unused", "file")],
        "GET /v1/fine_tuning/jobs": [Call(route, query={"limit": "2", "after": ids["tuning"]})],
        "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/events": [
            Call(route, tuned, {"limit": "2", "after": f"evt_{ids['tuning']}_2"})
        ],
        "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints": [Call(route, tuned, {"limit": "2"})],
        **{
            f"{how} /v1/fine_tuning/jobs/{{fine_tuning_job_id}}{what}": [
                Call(route, {"fine_tuning_job_id": ids[name]}) for name in ("tuning", "paused")
            ]
            for how, what in (("GET", ""), ("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume"))
        },
        "GET /api/v1/healthz": [Call(route)],
        "GET /api/v1/get_server_capabilities": [Call(route)],
        "POST /api/v1/sessions/{session_id}/finish": [
            Call(route, {"session_id": ids["tinker"]}, body={"reason": {"type": "success"}, "detail": "x"})
        ],
        **{f"GET /api/v1/{what}": [Call(route, query=paged)] for what in ("sessions", "training_runs", "checkpoints")},
        "GET /api/v1/sessions/{session_id}": [Call(route, client)],
        "PUT /api/v1/sessions/{session_id}/project": [Call(route, client, body={"project_id": "x"})],
        "GET /api/v1/sessions/{session_id}/trace_export": [Call(route, client)],
        "GET /api/v1/samplers/{sampler_id}": [Call(route, {"sampler_id": ids["sampler"]})],
        "GET /api/v1/training_runs/{model_id}": [Call(route, run)],
        "GET /api/v1/training_runs/{model_id}/checkpoints": [Call(route, run)],
        f"PUT {of_checkpoint}/ttl": [Call(route, one, body={"ttl_seconds": 3600}) for one in named],
        **{
            f"{method} {of_checkpoint}{what}": [Call(route, one) for one in named]
            for method, what in (
                ("DELETE", ""),
                ("POST", "/publish"),
                ("DELETE", "/publish"),
                ("GET", "/external_weights_urls"),
            )
        },
        "GET /api/v1/files/{checkpoint_id}/{file:path}": [
            Call(
                route,
                dict(zip(("checkpoint_id", "file"), world.signed.path.split("/")[-2:], strict=True)),
                dict(parse_qsl(world.signed.query)),
            )
        ],
    }
    if route == "POST /v1/sessions/{session_id}/operations":
        several = operations(world)
        return [Call(route, at, body=body) for body in several] + [Call(route, at, body={"operations": several[:3]})]
    if route == "POST /v1/files":
        return [Call(route, headers=FORM_HEADERS, sent=multipart({"purpose": "fine-tune"}, ROWS))]
    if route == "POST /api/v1/forward_backward":
        return [Call(route, headers={"content-type": PROTOBUF}, body=datums(world, kind)) for kind in range(5)]
    return calls[route] if route in calls else [Call(route, body=body) for body in bodies[route]]


# ---------------------------------------------------------------- nearly right ones

HEADERS: dict[str, tuple[str, ...]] = {
    "content-type": (
        JSON,
        PROTOBUF,
        TENSORS,
        "application/yaml",
        "text/plain",
        "",
        "application/json; charset=latin-1",
        "multipart/form-data",
        "multipart/form-data; boundary=b",
        "a" * 300,
    ),
    "content-encoding": ("zstd", "gzip", "identity", "br", "", "ZSTD, zstd"),
    "accept": (TENSORS, JSON, "*/*", "text/html", "text/event-stream", f"{TENSORS};q=0", ";;;,", "a" * 300),
    "accept-encoding": ("zstd", "gzip", "zstd;q=0", "*"),
    "prefer": ("wait=0", "wait=x", "wait=-1", "respond-async", "wait=0.5"),
    "authorization": ("", "Bearer", "Bearer x", "Basic eDp5", "Bearer tml-" + "a" * 300, "Bearer é"),
    "idempotency-key": ("one", "two", "", "x" * 300, "a b", "é"),
    "content-length": ("0", "x", "-1", "99999999999999"),
    "x-api-key": ("", "x", "tml-x"),
    "range": ("bytes=0-1", "bytes=9-", "bytes=-", "x"),
    "if-none-match": ("*", '"x"'),
    "traceparent": ("00-0-0-0", "x"),
}


def right(call: Call) -> Call:
    if call.body is None:
        return call
    is_message = isinstance(call.body, ForwardBackwardRequest)
    return replace(call, sent=call.body.SerializeToString() if is_message else json.dumps(call.body).encode())


def nearly(world: World, mutator: Mutator, calls: list[Call]) -> Call:
    """One of the calls with a few changes."""
    draw = mutator.draw
    call = draw.choice(calls)
    params, query, headers = dict(call.params), dict(call.query), dict(call.headers)
    bodiless = call.body is None and call.sent is None
    if params and draw.random() < (0.5 if bodiless else 0.07):
        name = draw.choice(sorted(params))
        changed = [
            params[name] + "x",
            params[name][:-1],
            params[name].upper(),
            str(mutator.value())[:3000],
            draw.choice(mutator.others),
        ]
        params[name] = draw.choice([one for one in changed if isinstance(one, str) and one.strip("./")] or ["x"])
    if draw.random() < (0.6 if bodiless else 0.04):
        for _ in range(draw.choice((1, 1, 2))):
            name = draw.choice([*query, "limit", "offset", "after", "before", "order", "x"])
            query[name] = str(draw.choice([mutator.value(), draw.randrange(-2, 200), draw.choice(mutator.others)]))[:4000]
    if draw.random() < 0.12:
        name = draw.choice(sorted(HEADERS))
        headers[name] = draw.choice(HEADERS[name])
    sent = call.sent
    if isinstance(call.body, ForwardBackwardRequest):
        names = ("weights", "target_tokens", "logprobs", "advantages", "sequence_ratio_mask", "beta", "clip_low_threshold")
        sent = mutator.message(call.body, names)  # pyright: ignore[reportArgumentType]  it is a Message
        if draw.random() < 0.3:
            sent = zstandard.ZstdCompressor(write_content_size=draw.random() < 0.8).compress(sent)
            sent = mutator.damaged(sent) if draw.random() < 0.15 else sent
            headers["content-encoding"] = "zstd"
    elif call.body is not None:
        spare = [one.body for one in calls]
        if call.route.endswith("/operations") and draw.random() < 0.35 and (as_tensors := _tensors(call.body)) is not None:
            head, tensors = as_tensors
            sent, headers["content-type"] = mutator.tensors(head, tensors), TENSORS
        else:
            sent = mutator.text(mutator.tree(call.body, spare))
    elif sent is not None:
        sent = mutator.damaged(sent, mutator.count())
    elif draw.random() < 0.05:
        sent = draw.choice((b"{}", b"x", b"[1]", b"null"))
    return replace(call, params=params, query=query, headers=headers, sent=sent)


def _tensors(body: dict[str, Any]) -> Any:
    if "operations" in body or body["kind"] == "eval":
        return None
    head, tensors = unpack(asked(parse(OperationBody, body)).request)
    return {
        **{name: value for name, value in head.items() if name != "checkpoint" or body["kind"] != "sample"},
        "seq": body["seq"],
    }, tensors


# ---------------------------------------------------------------- what an answer must be


class Checks:
    def __init__(self, world: World, route: str) -> None:
        self.world, self.route = world, route
        self.method, self.path = route.split()
        self.is_tinker = self.path.startswith("/api/v1")
        self.document = world.app.openapi()
        self.statuses, self.faults, self.taken = dict[int, int](), list[str](), 0
        self._validators: dict[Any, Any] = {}
        self.internal = re.compile(re.escape(str(world.settings.data_dir).encode()) + b"|" + INTERNAL.pattern)

    async def look(self, call: Call, key: str, answer: Answer, *, deep: bool) -> None:
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        try:
            self._form(call, answer, deep=deep)
            if answer.status < 300 and self.is_tinker:
                await self._told(answer)
            if deep:
                await self._theirs(call, answer)
        except AssertionError as fault:
            said = f"{call.route} {call.params} {call.query} {call.headers} {(call.sent or b'')[:600]!r}"
            self.faults.append(f"{fault}\n    {said}\n    {answer.status} {answer.body[:600]!r}")

    def _form(self, call: Call, answer: Answer, *, deep: bool) -> None:
        assert answer.status < 500, "a 5xx"
        if answer.status >= 400 and answer.status not in (408, 410):
            self._error(call, answer)
        elif answer.kind == JSON and answer.body:
            answer.json()
        if not self.is_tinker:
            self._documented(answer, deep=deep)

    def _error(self, call: Call, answer: Answer) -> None:
        body = answer.json()
        if self.is_tinker:
            assert isinstance(body.get("detail"), str) and body["detail"] and isinstance(body.get("code"), str), (
                "no Tinker error"
            )
            assert answer.status != 409, "a 409, which clients repeat"
        elif self.path.startswith(("/v1/completions", "/v1/chat", "/v1/files", "/v1/fine_tuning")):
            assert body.keys() == {"error"} and {"message", "type", "param", "code"} <= body["error"].keys(), "no OpenAI error"
        else:
            assert body["status"] == answer.status and body["detail"] and body["code"] and body["error"]["code"], "no problem"
        told = answer.body
        for word in self.internal.finditer(told):  # what was sent may be told again
            sent = (call.sent or b"") + repr((call.params, call.query, call.headers)).encode()
            assert word[0] in sent, f"{word[0]!r} is told"

    def _documented(self, answer: Answer, *, deep: bool) -> None:
        operation = self.document["paths"][self.path][self.method.lower()]
        if answer.status in (404, 405) and b"route_not_found" in answer.body:
            return
        assert str(answer.status) in operation["responses"], f"{answer.status} is not documented"
        content = operation["responses"][str(answer.status)].get("content", {})
        assert answer.status == 204 or answer.kind in content, f"{answer.kind} is not documented for {answer.status}"
        if deep and answer.kind.endswith("json"):
            schema = content[answer.kind]["schema"]
            validator = self._validators.setdefault(
                (answer.status, answer.kind), Draft202012Validator({**schema, "components": self.document["components"]})
            )
            wrong = next(validator.iter_errors(answer.json()), None)
            assert wrong is None, f"does not fit its schema: {wrong.message[:300] if wrong else ''}"

    async def _told(self, answer: Answer) -> None:
        """What is taken has a result, or an error that says what is wrong with it."""
        body = answer.json() if answer.kind == JSON and answer.body else {}
        if not isinstance(body, dict):
            return
        self.taken += 1
        if "error" in body and "category" in body:
            self._category(body)
        if "request_id" not in body:
            return
        told = await self.world.ask(Call("POST /api/v1/retrieve_future", body={"request_id": body["request_id"]}))
        assert told.status in (200, 408), f"its future is answered with {told.status}: {told.body[:300]!r}"
        if told.status == 200 and told.kind == JSON and "error" in told.json():
            self._category(told.json())

    def _category(self, body: Any) -> None:
        assert body["category"] == "user" and body["error"] and body["code"], f"no error of a user's: {body}"
        assert not self.internal.search(json.dumps(body).encode()) or b"[" in body["error"].encode(), f"tells too much: {body}"

    async def _theirs(self, call: Call, answer: Answer) -> None:
        """The same with another project's key."""
        if "authorization" in call.headers or "x-api-key" in call.headers:
            return
        world = self.world
        got = await world.ask(call, world.other)
        assert MARK.encode() not in got.body or MARK.encode() in (call.sent or b""), "another project reads it"
        assert got.status < 500, f"a 5xx for another project: {got.body[:300]!r}"
        named = repr(call.params) + ("" if self.path in WITHOUT_IDS else (call.sent or b"").decode("utf-8", "replace"))
        if (
            answer.status < 300
            and any(one in named for one in world.ids.values())
            and not self.path.startswith("/api/v1/files/")
        ):
            fine = (404,) if self.is_tinker or call.params else (400, 404, 422)
            assert got.status in fine, f"with another project's key: {got.status} {got.body[:200]!r}"


# Of whose bodies no id is looked up: they are kept as they are, or filter what is one's own.
WITHOUT_IDS = {
    "/v1/sessions",
    "/v1/files",
    "/v1/completions",
    "/v1/chat/completions",
    *(
        f"/api/v1/{name}"
        for name in ("create_session", "sessions/search", "telemetry", "client/config", "client/dynamic_config")
    ),
}


# ---------------------------------------------------------------- the test


def routes() -> list[str]:
    """Every route of sessions, of the Tinker wire and of OpenAI's."""
    native = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text())[
        "paths"
    ]  # `make check`: it is current
    prefixes = ("/v1/sessions", "/v1/completions", "/v1/chat/", "/v1/files", "/v1/fine_tuning", "/v1/models")
    listed = [f"{method.upper()} {path}" for path, methods in native.items() if path.startswith(prefixes) for method in methods]
    tinker = [f"{method} {one.path}" for router in TINKER for one in router.routes for method in sorted(one.methods)]  # pyright: ignore[reportAttributeAccessIssue]
    return listed + tinker


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def uncounted(*_: Any) -> RateReply:
    """In place of a question to Redis for every call."""
    return RateReply(None, b"the keys stay as they are")


@pytest.fixture(scope="module")
def world(
    loop: asyncio.Runner, sqlite_template: Path, _redis_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copyfile(sqlite_template, folder / "ratchet.db")
    settings = Settings(
        environment="development",
        data_dir=folder,
        redis_url=SecretStr(_redis_database),
        max_body_bytes=200_000,
        key_requests_per_s=0,
        reconcile_every_s=3600,
    )
    world = World(settings)
    with pytest.MonkeyPatch.context() as patch, log_is_kept():
        patch.setattr(futures, "HOLD_S", 0.03)
        patch.setattr(Limiter, "take", uncounted)
        loop.run(world.start())
        with sampler(settings, sampled):
            loop.run(world.settle())
        yield world
        loop.run(world.stop())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("route", routes())
def test_nearly_right_requests_are_answered_or_refused(world: World, loop: asyncio.Runner, route: str) -> None:
    checks = Checks(world, route)
    with sampler(world.settings, sampled) if "completions" in route or route.endswith("asample") else nullcontext():
        loop.run(many(world, checks, route))
    print(f"\n{route}: {CALLS} calls, {dict(sorted(checks.statuses.items()))}, {checks.taken} taken", flush=True)
    kinds = {fault.partition("\n")[0][:60]: fault for fault in checks.faults}
    assert not checks.faults, f"{len(checks.faults)} of {CALLS}:\n" + "\n".join(list(kinds.values())[:12])
    assert any(status < 400 or status == 410 for status in checks.statuses) or route in NEVER, (
        f"none was taken: {checks.statuses}"
    )


SEQS = {"seq", "seq_id", "operations", "model_seq_id", "sampling_session_seq_id"}  # two calls with the same are one
NEVER = {"PUT /api/v1/sessions/{session_id}/project", "GET /api/v1/sessions/{session_id}/trace_export"}


async def many(world: World, checks: Checks, route: str) -> None:
    draw = random.Random(f"{SEED}/{route}")
    again = {  # of these one call uses up what they name
        "DELETE /api/v1/training_runs": world.weights,
        "DELETE /v1/files": world.tune,
        "POST /v1/fine_tuning/jobs/": world.tune,
        "POST /api/v1/sessions/{": world.renew,
    }
    renews = next((renew for part, renew in again.items() if route.startswith(part)), None)
    left = CALLS
    while left > 0:
        await world.renew()
        mutator = Mutator(draw, [*world.ids.values(), *world.tickets])
        turns = iter(range(min(left, RENEWED)))
        left -= RENEWED

        async def one_after_the_other(mutator: Mutator = mutator, turns: Iterator[int] = turns) -> None:
            calls = seeds(world, route)
            for turn in turns:
                if any(isinstance(call.body, ForwardBackwardRequest) or SEQS & (call.body or {}).keys() for call in calls):
                    calls = seeds(world, route)
                call = nearly(world, mutator, calls) if turn else right(calls[0])
                answer = await world.ask(call)
                await checks.look(call, world.key, answer, deep=turn % 8 == 0)
                if answer.status < 300 and renews is not None:
                    await renews()
                    calls = seeds(world, route)

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE if renews is None else 1)))
