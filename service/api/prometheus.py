"""Numbers for Prometheus: this process's own counters, and those of the whole service from the database. No key is needed.

Workers are other processes on other machines: their numbers are read from the ledger, which they write. Labels have few
values: states, failure codes, phases, resource classes, and live workers.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session

from service.doorbell import CLASSES
from service.edge.context import ContextDep
from service.failures import CODES
from service.states import Phase, Status
from service.store import clock, jobs, usage, webhooks, workers

router = APIRouter(tags=["health"])

OTHER = "other"  # codes of failures that this version no longer knows
MEMORY = {
    "process": ("ratchet_worker_memory_bytes", "Resident memory of a worker: its parent and its training process"),
    "gpu_used": ("ratchet_worker_gpu_memory_used_bytes", "Memory in use on the GPUs that a worker's machine shows"),
    "gpu_total": ("ratchet_worker_gpu_memory_total_bytes", "Memory of the GPUs that a worker's machine shows"),
}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
def prometheus(context: ContextDep) -> Response:
    """Counters and gauges in Prometheus' text format."""
    with context.store.begin(readonly=True) as session:
        ledger = context.ledger.get(lambda: usage.whole(session))  # cached: reading it takes longer with every attempt
        found = [*_gauges(session, clock.now(session)), *_counters(ledger)]
    registry = CollectorRegistry()
    registry.register(_Found(found))
    return Response(generate_latest(REGISTRY) + generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Found(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _gauges(session: Session, now: datetime) -> Iterator[Metric]:
    counts, living = jobs.count_by_status(session), workers.alive(session, now)
    yield _gauge("ratchet_jobs", "Jobs by status", "status", {status.value: counts.get(status.value, 0) for status in Status})
    classes = dict.fromkeys([*CLASSES, *jobs.classes_queued(session, now)])
    depth = {class_: jobs.count_queued(session, class_, now) for class_ in classes}
    yield _gauge("ratchet_queue_depth", "Queued jobs that may start now, by class", "resource_class", depth)
    since = {class_: jobs.queued_since(session, class_, now) or now for class_ in classes}
    waits = {class_: max(0.0, (now - moment).total_seconds()) for class_, moment in since.items()}
    help_ = "How long the job of a class has waited that may start now and waits longest"
    yield _gauge("ratchet_queue_oldest_wait_seconds", help_, "resource_class", waits)
    yield GaugeMetricFamily("ratchet_workers_alive", "Workers that were seen within the last minute", value=len(living))
    help_ = "Deliveries that wait to be sent, or to be sent again"
    yield GaugeMetricFamily("ratchet_webhook_deliveries_waiting", help_, value=webhooks.count_waiting(session))
    told = {worker.id: worker.memory or {} for worker in living}
    for key, (name, help_) in MEMORY.items():
        yield _gauge(name, help_, "worker", {id_: memory[key] for id_, memory in told.items() if key in memory})


def _gauge(name: str, help_: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, help_, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _counters(ledger: usage.Whole) -> Iterator[Metric]:
    amounts = ledger.amounts
    yield CounterMetricFamily("ratchet_steps", "Training steps, those that were done again included", value=amounts["steps"])
    for name, help_ in (("", "Tokens"), ("wasted_", "Tokens of attempts that ended without saving what they had done")):
        by_kind = {kind: amounts[f"{name}{kind}_tokens"] for kind in ("sampled", "trained")}
        yield _counter(f"ratchet_{name}tokens", help_, "kind", by_kind)
    seconds = {phase.value: amounts[f"{phase}_s"] for phase in Phase}
    yield _counter("ratchet_worker_seconds", "Seconds that workers spent on jobs", "phase", seconds)
    known = dict.fromkeys([*sorted(CODES), OTHER], 0)
    for code, count in ledger.failures.items():
        known[code if code in CODES else OTHER] += count
    help_ = "Attempts that ended with a failure, whatever became of the job, and jobs that failed in the queue"
    yield _counter("ratchet_failures", help_, "code", known)
    yield SummaryMetricFamily(
        "ratchet_queue_wait_seconds", "How long jobs that could start waited for a worker", ledger.attempts, amounts["queued_s"]
    )


def _counter(name: str, help_: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, help_, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
