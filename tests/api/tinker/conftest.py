"""A server of its own, whose sessions a scripted worker serves, and a client that speaks the Tinker wire by hand."""

import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from pydantic import SecretStr

from scripted_sessions import ScriptedWorker
from service.settings import Settings
from service.store import keys
from service.tinker.messages import ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse, read

PROTOBUF = "application/x-protobuf"
_projects = count(1)


@dataclass
class Wire:
    """One API key at work: a session, its models, and their next seq."""

    http: httpx.Client
    session_id: str = ""
    seqs: dict[str, "count[int]"] = field(default_factory=dict)
    models: "count[int]" = field(default_factory=count)

    def __post_init__(self) -> None:
        self.session_id = self.ok("create_session", tags=["test"], user_metadata={"a": "b"}, sdk_version="0")["session_id"]

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/api/v1/{path}", json=body)

    def ok(self, path: str, /, **body: Any) -> Any:
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def model(self, base_model: str = "tiny", **lora: Any) -> str:
        body = {"session_id": self.session_id, "model_seq_id": next(self.models), "base_model": base_model}
        answer = self.ok("create_model", **body, lora_config={"rank": 4, **lora})
        made = self.result(answer["request_id"]).json()
        assert made == {"model_id": answer["model_id"], "type": "create_model"}
        self.seqs[made["model_id"]] = count(1)
        return made["model_id"]

    def ordered(self, path: str, model_id: str, /, **body: Any) -> str:
        """Send the model's next operation. Returns the request's id."""
        return self.ok(path, model_id=model_id, seq_id=next(self.seqs[model_id]), **body)["request_id"]

    def forward_backward(self, model_id: str, *rows: list[int], seq_id: int | None = None, **fields: Any) -> str:
        message = self.message(model_id, *rows, seq_id=next(self.seqs[model_id]) if seq_id is None else seq_id, **fields)
        answer = self.send(message.SerializeToString())
        assert answer.status_code == 200, answer.text
        return answer.json()["request_id"]

    def message(self, model_id: str, *rows: list[int], loss_fn: str = "cross_entropy", **fields: Any) -> Any:
        """cross_entropy of each row's own tokens."""
        message = ForwardBackwardRequest(model_id=model_id, loss_fn=loss_fn, **fields)
        for row in rows:
            datum = message.data.add()
            datum.model_input.add().encoded_text.tokens = array("i", row).tobytes()
            for name, kind, numbers in (
                ("target_tokens", 2, array("q", row)),
                ("weights", 1, array("f", [1.0] * len(row))),
            ):
                value = datum.loss_fn_inputs[name]
                value.dense, value.dtype = numbers.tobytes(), kind
                value.shape.append(len(row))
        return message

    def send(self, raw: bytes, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post("/api/v1/forward_backward", content=raw, headers={"Content-Type": PROTOBUF, **named})

    def result(self, request_id: str) -> httpx.Response:
        """Poll as the client does: again after a 408."""
        while (answer := self.post("retrieve_future", request_id=request_id)).status_code == 408:
            assert answer.json()["queue_state"] in ("active", "paused_capacity")
        return answer

    def done(self, request_id: str) -> Any:
        """The result of an operation that did not fail."""
        answer = self.result(request_id)
        assert answer.status_code == 200, answer.text
        if answer.headers["content-type"] != PROTOBUF:
            said = answer.json()
            assert "error" not in said, said
            return said
        return read(SampleResponse if "/" in request_id else ForwardBackwardOutput, answer.content)

    def failed(self, request_id: str) -> dict[str, Any]:
        """{error, category, code} of an operation that failed, which comes with 200."""
        answer = self.result(request_id)
        assert answer.status_code == 200, answer.text
        assert "error" in answer.json(), answer.text
        return answer.json()

    def sampler(self, **of: Any) -> str:
        number = 1000 + next(self.models)
        body = {"session_id": self.session_id, "sampling_session_seq_id": number, **(of or {"base_model": "tiny"})}
        return self.ok("create_sampling_session", **body)["sampling_session_id"]

    def sample(self, sampler_id: str, prompt: list[int], seq_id: int = 0, **fields: Any) -> str:
        parameters = {"max_tokens": 3, **fields.pop("sampling_params", {})}
        body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]}, "sampling_params": parameters}
        return self.ok("asample", sampling_session_id=sampler_id, seq_id=seq_id, **body, **fields)["request_id"]


@dataclass(frozen=True)
class Served:
    api: Any
    worker: ScriptedWorker

    def key(self, project: str | None = None) -> httpx.Client:
        with self.api.store.begin() as session:
            _, text = keys.create(session, project=project or f"tinker-{next(_projects)}", name="test")
        return httpx.Client(base_url=self.api.url, headers={"X-API-Key": text}, timeout=60, verify=False)

    def client(self, project: str | None = None) -> Wire:
        return Wire(self.key(project))


@pytest.fixture(scope="module")
def served(
    sqlite_template: Path, new_redis: Any, tmp_path_factory: pytest.TempPathFactory, serve_for_long: Any
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tinker")
    shutil.copyfile(sqlite_template, folder / "ratchet.db")
    with new_redis() as redis:
        settings = Settings(
            environment="development", data_dir=folder, redis_url=SecretStr(redis.url), max_loss_body_bytes=2**20
        )
        with serve_for_long(settings) as api, ScriptedWorker(api.store, settings, api.doorbell) as worker:
            yield Served(api, worker)


@pytest.fixture
def wire(served: Served) -> Iterator[Wire]:
    client = served.client()
    yield client
    client.http.close()


@pytest.fixture
def new_wire() -> type[Wire]:
    """For tests with a server of their own."""
    return Wire


@pytest.fixture
def compress() -> Callable[[bytes], bytes]:
    return zstandard.ZstdCompressor().compress
