"""Checks that a loop writes only metrics that service/metric_names.py lists. With strict_metrics (the tests) any other is an
error."""

import logging
from collections.abc import Iterable
from functools import cache

from service.metric_names import METRICS, find

log = logging.getLogger(__name__)


def check(names: Iterable[str], kind: str, *, strict: bool) -> None:
    """Check the metric names of a job of this kind. A name that the table lacks is logged once or, if `strict`, raises
    ValueError."""
    unknown = [name for name in names if not is_known(name, kind)]
    if unknown and strict:
        allowed = ", ".join(metric.name for metric in METRICS if kind in metric.of)
        raise ValueError(
            f"a job of kind {kind} writes metrics that service/metric_names.py does not name for it: {', '.join(unknown)}; "
            f"add each there, or write one of: {allowed}"
        )
    for name in unknown:
        _warn(name, kind)


def is_known(name: str, kind: str) -> bool:
    metric = find(name)
    return metric is not None and kind in metric.of


@cache
def _warn(name: str, kind: str) -> None:
    """Once in a process: a loop writes its names at every step."""
    log.warning("a job of kind %s writes the metric %r, which service/metric_names.py does not name for it", kind, name)
