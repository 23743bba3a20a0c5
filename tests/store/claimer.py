"""Run as a process of its own: claims, works a moment and releases until the job has been claimed often enough.

Begins when the file `go` is in the folder. Prints each fencing number, and `leaked` for each write of a zombie that the store
took.
"""

import sys
import time
from pathlib import Path

from pydantic import SecretStr

from service.errors import LeaseLost
from service.jobs import lease as leases
from service.settings import Settings
from service.store.session import open_store


def main(database_url: str, data_dir: str, owner: str, claims: int) -> None:
    settings = Settings(environment="development", data_dir=Path(data_dir), database_url=SecretStr(database_url))
    store = open_store(settings)
    print("ready", flush=True)
    while not (Path(data_dir) / "go").exists():
        time.sleep(0.001)
    while True:
        claimed = leases.claim(store, settings, owner, {"any"})
        if claimed is None:
            time.sleep(0.001)
            continue
        lease, _ = claimed
        leases.commit_step(store, lease, lease.attempt, {"attempt": lease.attempt})
        print(lease.attempt, flush=True)
        if lease.attempt >= claims:
            leases.succeed(store, lease, {}, "enough")
            return
        leases.release(store, lease, "next")
        try:
            leases.commit_step(store, lease, 0, {"zombie": 1.0})
            print("leaked", flush=True)
        except LeaseLost:
            pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
