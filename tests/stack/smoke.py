"""What a first user does over the published port: ask for a loss, train a small job on uploaded rows, fetch the checkpoint."""

import io
import json
import tarfile
import time
from collections.abc import Callable
from typing import Any

import httpx

WAIT_S = 240
FINAL = ("succeeded", "failed", "cancelled")


class Failed(Exception):
    """The stack answered, but not as it should."""


class User:
    """Somebody with a key."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/v1", headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False)

    def upload_rows(self) -> str:
        """Through the API to the volume that it shares with the worker."""
        rows = "".join(json.dumps({"digits": f"{n:03d}", "reversed": f"{n:03d}"[::-1]}) + "\n" for n in range(200))
        headers = {"Content-Type": "application/jsonl"}
        return answered(self.http.post("/datasets", params={"name": "digits"}, content=rows, headers=headers), 201)["id"]

    def submit(self, dataset_id: str, steps: int) -> str:
        return answered(self.http.post("/jobs", json=spec(dataset_id, steps)), 201)["id"]

    def wait(self, job_id: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Follow a job by long poll until it is as it should be. Raises Failed when it ends before, or takes too long."""
        deadline, event = time.monotonic() + WAIT_S, 0
        while True:
            job = answered(self.http.get(f"/jobs/{job_id}", params={"wait_s": 20, "after_event": event}), 200)
            if until(job):
                return job
            if job["status"] in FINAL or time.monotonic() > deadline:
                raise Failed(f"{job_id} is {job['status']} ({job['status_reason']}) at step {job['step']}: {job['error']}")
            event = job["last_event"]


def refuses_strangers(url: str) -> None:
    answered(httpx.get(f"{url}/v1/jobs", trust_env=False), 401)


def answers_a_loss(user: User) -> None:
    """The service `losses`, by way of Redis."""
    batch = {"log_probs": [[-2.0, -1.8], [-1.9]], "old_log_probs": [[-2.2, -2.0], [-2.1]], "advantages": [1.0, -1.0]}
    asked = {"items": [{"objective": "gspo", "batch": batch, "return": ["ratio"]}]}
    answer = answered(user.http.post("/losses", json=asked, headers={"Prefer": "wait=60"}), 200)["data"][0]
    if answer["status"] != "ok" or not 1.22 < answer["ratio"][0][0] < 1.23:  # exp(0.2)
        raise Failed(f"a loss request was answered with {answer}")
    print(f"the loss of three tokens is {answer['loss']:.4f}")


def trains_a_job(user: User, dataset_id: str) -> None:
    job_id = user.submit(dataset_id, steps=3)
    job = user.wait(job_id, lambda job: job["status"] == "succeeded")
    if job["step"] != 3:
        raise Failed(f"{job_id} succeeded after {job['step']} steps, not 3")
    print(f"{job_id} succeeded after 3 steps on {job['resolved'].get('device')}, {job['run_s']:.1f} s of running")
    archive = user.http.get(f"/checkpoints/{job['checkpoint_id']}/archive").raise_for_status().content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = tar.getnames()
    if not any(name.endswith(".safetensors") for name in names):
        raise Failed(f"the checkpoint's archive holds no weights: {names}")
    print(f"{job['checkpoint_id']} downloaded: {len(archive)} bytes, {len(names)} files")


def survives_a_restart(user: User, dataset_id: str, stop_worker: Callable[[], None], start_worker: Callable[[], None]) -> None:
    """A worker that is stopped saves its job and puts it back; the next one goes on where it was."""
    job_id = user.submit(dataset_id, steps=100_000)
    user.wait(job_id, lambda job: job["step"] >= 2)
    stop_worker()
    job = user.wait(job_id, lambda job: True)
    if job["status"] != "queued" or job["checkpoint_id"] is None:
        raise Failed(f"{job_id} is {job['status']} with checkpoint {job['checkpoint_id']} after its worker was stopped")
    print(f"{job_id} is back in the queue at step {job['step']} ({job['status_reason']})")
    start_worker()
    resumed = user.wait(job_id, lambda later: later["step"] > job["step"])
    print(f"{job_id} goes on, attempt {resumed['attempt']}, step {resumed['step']}")
    answered(user.http.post(f"/jobs/{job_id}/cancel"), 200)
    user.wait(job_id, lambda job: job["status"] == "cancelled")


def spec(dataset_id: str, steps: int) -> dict[str, Any]:
    return {
        "kind": "rl",
        "name": "stack-test",
        "model": {"source": "tiny", "tiny": {"hidden_size": 32, "heads": 2, "intermediate_size": 64}},
        "data": {"train": {"source": "dataset", "id": dataset_id}, "prompt": "rev {digits}>", "answer": "{reversed}"},
        "objective": {"preset": "gspo"},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 4},
        "reward": {"graders": [{"kind": "similarity", "metric": "position", "reference": "{reversed}"}]},
        "limits": {"max_steps": steps},
    }


def answered(response: httpx.Response, status: int) -> dict[str, Any]:
    if response.status_code != status:
        request = response.request
        raise Failed(f"{request.method} {request.url} answered {response.status_code}, not {status}: {response.text}")
    return response.json()
