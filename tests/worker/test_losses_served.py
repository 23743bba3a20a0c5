"""Loss requests over HTTP, computed by a real Celery worker: answers, deaths and bursts."""

import json
import math
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
import uvicorn
from pydantic import SecretStr

from service.app import create_app
from service.settings import Settings
from workers.app import queues

TAKEN, WORKERS = "ratchet:losses:taken:", "ratchet:losses:workers"
KEY = "tml-0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"
TENSORS = "application/vnd.safetensors"
TIME_LIMIT_S = 15.0  # longer than it takes until a worker says again that it lives
RETURN = ["gradients", "log_importance_ratio", "ratio", "clipped", "token_loss", "weights"]
WORKED = {
    "objective": {"preset": "gspo", "surrogate": {"clip_low": 3e-4, "clip_high": 4e-4}},
    "batch": {
        "log_probs": [[-2.0, -1.8, -1.5, -1.2], [-1.9, -1.6, -1.3]],
        "old_log_probs": [[-2.2, -2.0, -1.6, -1.3], [-2.1, -1.8, -1.5]],
        "advantages": [1.0, -1.0],
    },
    "return": RETURN,
}
LOSS = (math.exp(0.2) - 1.0004) / 2


class Losses:
    """A stack whose worker does nothing but losses, and the API in front of it."""

    def __init__(self, stack: Any, redis: Any, url: str) -> None:
        self.stack, self.redis = stack, redis
        headers = {"Authorization": f"Bearer {KEY}", "Prefer": "wait=60"}
        limits = httpx.Limits(max_connections=64)
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False, limits=limits)
        self.worker = self.start_worker()

    def start_worker(self) -> Any:
        self.worker = self.stack.start_worker(RATCHET_SERVES="losses")
        return self.worker

    def post(self, *items: dict[str, Any], **members: Any) -> httpx.Response:
        return self.http.post("/v1/losses", json={"items": items, **members})

    def until_at_work(self) -> None:
        """Its child is in its loop."""
        deadline = time.monotonic() + 60
        while (answer := self.post(WORKED)).status_code != 200:
            assert time.monotonic() < deadline, answer.text + self.stack.logs()

    def child(self) -> int:
        """The process that computes, which leads a group; beside it stands one that looks after semaphores."""
        children = Path(f"/proc/{self.worker.pid}/task/{self.worker.pid}/children").read_text().split()
        (pid,) = [pid for pid in map(int, children) if os.getpgid(pid) == pid]
        return pid

    def in_hand(self) -> int:
        with self.redis.client() as client:
            return sum(client.llen(key) for key in client.scan_iter(f"{TAKEN}*"))

    def hold(self, pool: ThreadPoolExecutor) -> Any:
        """A request that the child has taken and, being stopped, does not answer. Its answer, later."""
        for _ in range(10):
            os.kill(self.child(), signal.SIGSTOP)
            request, until = pool.submit(self.post, WORKED), time.monotonic() + 1
            while time.monotonic() < until:
                if self.in_hand():
                    return request
                time.sleep(0.02)
            os.kill(self.child(), signal.SIGCONT)  # it was not listening at that moment
            request.result()
        raise AssertionError(f"nothing was taken\n{self.stack.logs()}")


@contextmanager
def api(settings: Settings) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def losses(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, new_redis: Any, new_stack: Any, zygote: Any
) -> Iterator[Losses]:
    folder = tmp_path_factory.mktemp("losses")
    (folder / "data").mkdir()
    shutil.copyfile(sqlite_template, folder / "data" / "ratchet.db")
    with new_redis() as redis:
        settings = Settings(
            environment="development",
            data_dir=folder / "data",
            redis_url=SecretStr(redis.url),
            bootstrap_key=SecretStr(KEY),
            loss_time_limit_s=TIME_LIMIT_S,
        )
        stack = new_stack(settings, folder, zygote)
        with api(settings) as url:
            found = Losses(stack, redis, url)
            found.until_at_work()
            yield found
            found.http.close()
            stack.stop()


# ---------------------------------------------------------------- answers


def test_the_worked_example_in_json(losses: Losses) -> None:
    answer = losses.post(WORKED, dtype="float64")
    assert answer.status_code == 200 and answer.headers["Preference-Applied"] == "wait"
    (found,) = answer.json()["data"]
    assert found["status"] == "ok" and found["loss"] == pytest.approx(LOSS, abs=1e-12)
    assert found["metrics"]["policy/ratio_mean"] == pytest.approx(1.1873636, abs=1e-7)
    assert found["log_importance_ratio"] == [pytest.approx([0.15] * 4), pytest.approx([0.2] * 3)]
    assert found["ratio"][0] == pytest.approx([math.exp(0.15)] * 4)
    assert found["clipped"] == [[True] * 4, [False] * 3]
    assert found["gradients"]["log_probs"] == [pytest.approx([0.0] * 4), pytest.approx([math.exp(0.2) / 6] * 3)]
    assert found["weights"] == [pytest.approx([1 / 8] * 4), pytest.approx([1 / 6] * 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_the_worked_example_in_safetensors(losses: Losses, dtype: torch.dtype, layout: str) -> None:
    lists = {name: WORKED["batch"][name] for name in ("log_probs", "old_log_probs")}
    if layout == "ragged":
        tensors = {name: torch.tensor([*rows[0], *rows[1]], dtype=dtype) for name, rows in lists.items()}
        tensors["cu_seqlens"] = torch.tensor([0, 4, 7])
    else:
        tensors = {name: torch.tensor([rows[0], [*rows[1], math.nan]], dtype=dtype) for name, rows in lists.items()}
        tensors["response_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=dtype)
    tensors["advantages"] = torch.tensor([1.0, -1.0], dtype=dtype)
    request = {"items": [{name: WORKED[name] for name in ("objective", "return")}]}
    body = safetensors.torch.save({f"0/{name}": t for name, t in tensors.items()}, {"request": json.dumps(request)})
    answer = losses.http.post("/v1/losses", content=body, headers={"Content-Type": TENSORS})
    assert answer.status_code == 200 and answer.headers["Content-Type"] == TENSORS, answer.text
    found = safetensors.torch.load(answer.content)
    size = int.from_bytes(answer.content[:8], "little")
    (entry,) = json.loads(json.loads(answer.content[8 : 8 + size])["__metadata__"]["response"])["data"]
    gradient, rough = found["0/gradients/log_probs"], dtype == torch.bfloat16
    assert gradient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert entry["loss"] == pytest.approx(LOSS, rel=2e-2 if rough else 1e-6)
    counted = gradient if layout == "ragged" else gradient.flatten()[:7]
    assert counted.tolist() == pytest.approx([0.0] * 4 + [math.exp(0.2) / 6] * 3, rel=2e-2 if rough else 1e-6)
    assert found["0/clipped"].dtype == torch.bool and found["0/ratio"].shape == tensors["log_probs"].shape


def test_content_that_is_wrong_comes_back_by_item(losses: Losses) -> None:
    bad = {**WORKED, "batch": {**WORKED["batch"], "log_probs": [[-2.0, "NaN", -1.5, -1.2], [-1.9, -1.6, -1.3]]}}
    answer = losses.post(WORKED, bad)
    assert answer.status_code == 200
    first, second = answer.json()["data"]
    assert first["loss"] == pytest.approx(LOSS) and second["status"] == "error"
    assert (second["error"]["code"], second["error"]["pointer"]) == ("nonfinite", "/items/1/batch/log_probs")
    answer = losses.post(WORKED, bad, all_or_nothing=True)
    assert answer.status_code == 422 and answer.json()["code"] == "nonfinite"
    answer = losses.post(WORKED, bad, on_nonfinite="mask")
    assert answer.json()["data"][1]["nonfinite_rows"] == [0]


def test_a_result_can_be_fetched_later(losses: Losses) -> None:
    ticket = losses.http.post("/v1/losses", json={"items": [WORKED]}, headers={"Prefer": "respond-async"})
    assert ticket.status_code == 202 and ticket.json()["status"] == "queued"
    answer = losses.http.get(ticket.headers["Location"])
    assert answer.status_code == 200 and answer.json()["data"][0]["loss"] == pytest.approx(LOSS)


@pytest.mark.parametrize(
    ("serves", "listens_to"),
    [
        ("all", ["train.any", "train.cpu", "losses"]),
        ("training", ["train.any", "train.cpu"]),
        ("losses", ["losses"]),
    ],
)
def test_a_worker_listens_to_what_it_serves(serves: Any, listens_to: list[str]) -> None:
    assert queues(Settings(serves=serves, device="cpu")) == listens_to


# ---------------------------------------------------------------- bursts and deaths


def test_a_burst_loses_none(losses: Losses) -> None:
    def one(number: int) -> float:
        item = {**WORKED, "batch": {**WORKED["batch"], "advantages": [float(number), 0.0]}, "return": ["gradients"]}
        answer = losses.post(item)
        while answer.status_code == 503 and answer.json()["code"] == "loss_queue_unavailable":
            answer = losses.post(item)  # a machine so busy that Redis had no turn for a second: nothing was computed
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]["loss"]

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(one, range(50)))
    assert found == pytest.approx([-number * 1.0004 / 2 for number in range(50)])


def test_a_child_that_is_killed_with_requests_in_hand_is_said_to_be_at_once(losses: Losses) -> None:
    with ThreadPoolExecutor(1) as pool:
        request, child = losses.hold(pool), losses.child()
        os.kill(child, signal.SIGKILL)
        refused = request.result(TIME_LIMIT_S + 10)
    problem = refused.json()
    assert refused.status_code == 503 and problem["code"] == "loss_worker_died" and problem["retryable"]
    assert "Retry-After" in refused.headers  # and not loss_timed_out: it did not wait for the time limit
    losses.until_at_work()
    assert losses.post(WORKED).json()["data"][0]["loss"] == pytest.approx(LOSS)
    assert losses.in_hand() == 0


def test_what_a_worker_that_is_gone_had_in_hand_is_computed_by_another(losses: Losses) -> None:
    """The hand of this worker's child becomes that of one that died with its parent, long ago."""
    with ThreadPoolExecutor(1) as pool:
        request = losses.hold(pool)
        with losses.redis.client() as client:
            (hand,) = client.scan_iter(f"{TAKEN}*")
            client.rename(hand, f"{TAKEN}wrk_gone")
            client.zadd(WORKERS, {"wrk_gone": 0})
        os.kill(losses.child(), signal.SIGKILL)  # it may have read what it was given
        answer = request.result(TIME_LIMIT_S + 10)
    assert answer.status_code == 200, answer.text + losses.stack.logs()
    assert answer.json()["data"][0]["loss"] == pytest.approx(LOSS)
    losses.until_at_work()


def test_a_stopping_worker_leaves_promptly_and_the_next_one_takes_over(losses: Losses) -> None:
    losses.worker.terminate()
    stopped = time.monotonic()
    assert losses.worker.wait(20) == 0
    assert time.monotonic() - stopped < 8
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(losses.post, WORKED)
        losses.start_worker()
        losses.until_at_work()
        assert request.result().status_code in (200, 503)  # 503: the new one needed longer than the time limit to start


def test_a_worker_that_is_killed_costs_a_refusal_by_the_time_limit(losses: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_s = 4.0
    with (
        api(losses.stack.settings.model_copy(update={"loss_time_limit_s": limit_s})) as url,
        httpx.Client(base_url=url, headers=losses.http.headers, timeout=60, trust_env=False) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        monkeypatch.setattr(losses, "http", http)
        asked = time.monotonic()
        request = losses.hold(pool)
        losses.worker.kill()
        losses.worker.wait()
        refused = request.result(TIME_LIMIT_S + 10)
    assert refused.status_code == 503 and refused.json()["code"] == "loss_timed_out" and refused.json()["retryable"]
    assert limit_s - 1 < time.monotonic() - asked < limit_s + 5
