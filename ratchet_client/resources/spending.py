"""What was spent, and what may be."""

from datetime import date
from typing import Literal

from ratchet_client.resources.base import Resource, given
from ratchet_client.types import Budget, Usage


class Spending(Resource):
    def usage(
        self,
        *,
        group_by: Literal["day", "job", "key", "project"] | None = None,
        first_day: str | date | None = None,
        last_day: str | date | None = None,
        job_id: str | None = None,
        key_id: str | None = None,
        project: str | None = None,
    ) -> Usage:
        """What the project spent, by day (the default), job or API key; or every project, with a key of the
        administrators' project. Days are UTC and inclusive."""
        days = {"from": first_day and str(first_day), "to": last_day and str(last_day)}
        filters = {"group_by": group_by, "job_id": job_id, "key_id": key_id, "project": project}
        return self._get("/v1/usage", {**days, **filters})

    def get_budget(self, *, project: str | None = None) -> Budget:
        return self._get("/v1/budget", {"project": project})

    def set_budget(
        self, project: str, *, tokens: int | None = None, worker_s: float | None = None, since: str | date | None = None
    ) -> Budget:
        """Replace a project's budget, with a key of the administrators' project; without bounds there is none."""
        bounds = given(project=project, tokens=tokens, worker_s=worker_s, since=since and str(since))
        return self._transport.json("PUT", "/v1/budget", json=bounds)
