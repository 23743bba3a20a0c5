"""Models that a job can start from."""

from ratchet_client.resources.base import Resource
from ratchet_client.types import Model, Page


class Models(Resource):
    def list_models(self) -> Page[Model]:
        return self._get("/v1/models")
