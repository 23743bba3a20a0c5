"""What works, and what waits."""

from ratchet_client.resources.base import Resource
from ratchet_client.types import Page, Queue, Worker


class Operators(Resource):
    def list_workers(self) -> Page[Worker]:
        """The workers that were seen within the last minute; `job_ids` are those of your project."""
        return self._get("/v1/workers")

    def get_queue(self) -> Queue:
        """Your project's jobs by status, and what waits for each class of worker."""
        return self._get("/v1/queue")
