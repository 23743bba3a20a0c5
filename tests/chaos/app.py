"""The worker under test: `celery -A chaos.app worker` is `celery -A workers.app worker` with the points installed."""

from typing import Any

from celery import signals

from chaos import points
from workers.app import app

app.conf.imports = ["workers.app", "chaos.app"]  # the child, too
points.install_rings()


@signals.worker_process_init.connect
def _child(**_: Any) -> None:
    points.install_in_worker()
