"""Makes what tests/worker/test_upgrade.py starts from. Run in a checkout of the commit that is left behind; NEW is this one:

    PYTHONPATH=.:tests:NEW/tests python NEW/tests/worker/upgrade/make.py OUT WORK && tar -C OUT -cJf COMMIT.tar.xz .

A worker is killed in the middle of a job (LoRA with dropout, so that adapters, optimizer and draws have to be taken over)
while another one (supervised, all weights) waits; OUT/data is the data directory as it then lies there. After that the same
code sees both to their ends: their last checkpoints are what the new code has to reach.
"""

import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr
from rounding import rounding
from safetensors.torch import save_file

from chaos.servers import own_redis_server
from job_specs import DIGITS, rl_spec, supervised_spec
from service.settings import Settings
from service.store.session import open_store, upgrade

STOPPED_AT, LAST = 10, 40


def main(out: Path, work: Path) -> None:
    found = importlib.util.spec_from_file_location("conftest_of_workers", "tests/worker/conftest.py")
    assert found is not None and found.loader is not None
    conftest = importlib.util.module_from_spec(found)
    found.loader.exec_module(conftest)
    tiny = {"source": "tiny", "tiny": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}}
    rl = rl_spec(
        name="was running",
        model={**tiny, "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}},
        limits={"max_steps": LAST},
        checkpoints={"every_steps": 3, "keep_last": 1},
        eval={"every_steps": 200, "temperature": 1.0},
        log_rollouts={"every_steps": 400, "groups": 1},
    )
    supervised = supervised_spec(name="was queued", model=tiny)
    for spec in (rl, supervised):
        spec["data"]["train"]["rows"] = DIGITS[:60]
    data = work / "data"
    data.mkdir(parents=True)
    upgrade(f"sqlite:///{data}/ratchet.db")
    with own_redis_server() as server:
        settings = Settings(environment="development", data_dir=data, redis_url=SecretStr(server.url))
        stack = conftest.Stack(settings, work)
        running = stack.submit(rl)
        worker = stack.start_worker()
        stack.until(running.id, lambda job: job.step >= STOPPED_AT and job.checkpoint_id is not None)
        queued = stack.submit(supervised)
        children = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True, check=True).stdout.split()
        for pid in (worker.pid, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        worker.wait()
        stack.workers.clear()
        time.sleep(0.5)
        jobs = {"running": stack.job(running.id), "queued": stack.job(queued.id)}
        assert {name: job.status for name, job in jobs.items()} == {"running": "running", "queued": "queued"}
        stack.store.close()
        with sqlite3.connect(data / "ratchet.db") as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copytree(data, out / "data", ignore=shutil.ignore_patterns("*-wal", "*-shm", "lock"))
        stack.store = open_store(settings)
        stack.start_worker()
        facts = {"rounding": rounding(), "jobs": {}}
        for name, job in jobs.items():
            ended = stack.succeeded(job.id, 180)
            save_file(stack.weights(ended), out / f"{name}.safetensors")
            facts["jobs"][name] = {"id": job.id, "step": job.step, "ends_at": ended.step}
        (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
        stack.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
