"""What jobs leave behind when nothing happens to them: each spec is run once, on a worker of its own."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from chaos.oracle import Standing, standing
from chaos.rig import Rig, Zygote, new_rig
from chaos.servers import own_redis_server


class References:
    def __init__(self, zygote: Zygote, folder: Path, template: Path) -> None:
        self._zygote, self._folder, self._template = zygote, folder, template
        self._known: dict[str, Standing] = {}
        self._stack = ExitStack()
        self._rig: Rig | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def __call__(self, spec: dict[str, Any]) -> Standing:
        key = json.dumps(spec, sort_keys=True)
        if key not in self._known:
            rig = self._running()
            job_id = rig.submit(spec)
            job = rig.finished(job_id)
            assert (job.status, job.attempt) == ("succeeded", 1), f"{job.error}\n{rig.tails()}"
            self._known[key] = standing(rig, job_id)
        return self._known[key]

    def rest(self) -> None:
        """Stop its worker; the next spec that is not known starts another."""
        self._stack.close()
        self._rig = None

    def _running(self) -> Rig:
        if self._rig is None:
            redis = self._stack.enter_context(own_redis_server())
            # As in production: nothing shall happen here, however busy the machine is.
            times: dict[str, Any] = {"lease_ttl_s": 60.0, "lease_self_stop_s": 45.0, "lease_renew_s": 10.0}
            folder = self._folder / f"rig-{len(self._known)}"
            rig = new_rig(self._zygote, folder, redis, template=self._template, **times)
            self._rig = self._stack.enter_context(rig)
            self._rig.start_worker()
            self._rig.start_api()
        return self._rig
