"""/openapi.json: FastAPI's own description, plus the bodies that we parse ourselves."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from service.api.aliases import PromoteRequest, RollbackRequest
from service.api.checkpoints import DeleteRequest
from service.api.events import EventView
from service.api.jobs import CancelRequest, ForkRequest, PauseRequest, ResumeRequest
from service.api.keys import KeyRequest, KeyRotation
from service.api.loss_views import LossResults, LossTicket
from service.api.usage import BudgetRequest
from service.api.webhooks import RotateRequest, WebhookChange, WebhookRequest
from service.edge.auth import DESCRIPTION, KEY_HEADER
from service.edge.problems import Problem
from service.losses.request import LossRequest
from service.openai.answers import ChatAnswer, CompletionAnswer
from service.openai.face import FACES, OpenAIErrors
from service.openai.requests import ChatRequest, CompletionRequest
from service.openai.tuning import FineTuningRequest
from service.sessions.body import OperationRequest
from service.spec.job import JobSpec
from service.spec.session import SessionSpec

REF = "#/components/schemas/{model}"
# Request bodies in the forms that callers may write, which FastAPI cannot see in a route's signature.
SENT = {
    "JobSpec": JobSpec,
    "ForkRequest": ForkRequest,
    "PauseRequest": PauseRequest,
    "ResumeRequest": ResumeRequest,
    "BudgetRequest": BudgetRequest,
    "DeleteRequest": DeleteRequest,
    "CancelRequest": CancelRequest,
    "PromoteRequest": PromoteRequest,
    "RollbackRequest": RollbackRequest,
    "KeyRequest": KeyRequest,
    "KeyRotation": KeyRotation,
    "WebhookRequest": WebhookRequest,
    "WebhookChange": WebhookChange,
    "RotateRequest": RotateRequest,
    "LossRequest": LossRequest,
    "SessionSpec": SessionSpec,
    "OperationRequest": OperationRequest,
    "CompletionRequest": CompletionRequest,
    "ChatRequest": ChatRequest,
    "FineTuningRequest": FineTuningRequest,
}
ANSWERED = {
    "Problem": Problem,
    "EventView": EventView,
    "LossResults": LossResults,
    "LossTicket": LossTicket,
    "CompletionAnswer": CompletionAnswer,
    "ChatAnswer": ChatAnswer,
    "OpenAIErrors": OpenAIErrors,
}


def version() -> str:
    try:
        return version_of("ratchet-rl")
    except PackageNotFoundError:  # run from a folder that was not installed
        return "0"


def complete(app: FastAPI) -> None:
    """Make `app.openapi()` include these bodies."""
    found_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = found_by_fastapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name, model in SENT.items():
                _add(schemas, name, model, "validation")
            for name, model in ANSWERED.items():
                _add(schemas, name, model, "serialization")
            _add_key_header(document)
            for face in FACES:  # FastAPI adds it where a route has parameters; it is a 400 there
                for path in document["paths"]:
                    if path.startswith(face.prefix):
                        for operation in document["paths"][path].values():
                            operation["responses"].pop("422", None)
            document["components"]["schemas"] = dict(sorted(schemas.items()))
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi


def _add_key_header(document: dict[str, Any]) -> None:
    """Wherever a key may come as a bearer token, it may come in a header of its own."""
    header = {"type": "apiKey", "description": DESCRIPTION, "in": "header", "name": KEY_HEADER}
    document["components"]["securitySchemes"]["x-api-key"] = header
    for methods in document["paths"].values():
        for operation in methods.values():
            if {"bearer": []} in operation.get("security", []):
                operation["security"].append({"x-api-key": []})


def _add(schemas: dict[str, Any], name: str, model: Any, mode: Any) -> None:
    schema = TypeAdapter(model).json_schema(ref_template=REF, mode=mode)
    for below, definition in schema.pop("$defs", {}).items():
        if schemas.setdefault(below, definition) != definition:
            raise RuntimeError(f"two models are called {below} in openapi.json")
    schemas[name] = schema
