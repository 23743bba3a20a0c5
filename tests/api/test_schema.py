"""openapi.json: complete, and kept in the repository."""

import html
import json
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from jsonschema import Draft202012Validator

from service.api import reference
from service.api.examples import JOB_SPEC
from service.app import create_app
from service.openai.face import FACES
from service.settings import Settings

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def document():
    return create_app(Settings()).openapi()


@pytest.fixture(scope="module")
def operations(document):
    return [(path, method, one) for path, methods in document["paths"].items() for method, one in methods.items()]


def test_every_reference_leads_somewhere(document):
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names <= set(document["components"]["schemas"])
    assert {"JobSpec", "RLSpec", "ObjectiveSpec", "JobView", "Problem", "EventView"} <= set(document["components"]["schemas"])


def test_every_operation_is_named_and_described(operations):
    names = [one["operationId"] for _, _, one in operations]
    assert len(names) == len(set(names))
    for path, method, one in operations:
        assert one.get("description") or method == "get", f"{method} {path} has no docstring"


def test_every_operation_announces_its_refusals(operations):
    for path, method, one in operations:
        if not path.startswith("/v1/"):
            continue
        openai = path.startswith(tuple(face.prefix for face in FACES))  # their face has no 422, and errors of another shape
        wanted = {"400", "401", "500", "503"} | (set() if openai else {"422"}) | ({"404"} if "{" in path else set())
        if "requestBody" in one:
            wanted |= {"413", "415"}
        assert wanted <= set(one["responses"]), f"{method} {path}"
        assert one["security"], f"{method} {path}"
        for status, answer in one["responses"].items():
            if int(status) >= 400:
                kind, name = ("application/json", "OpenAIErrors") if openai else ("application/problem+json", "Problem")
                assert answer["content"][kind]["schema"] == {"$ref": f"#/components/schemas/{name}"}


def test_every_answer_has_a_type(operations):
    for path, method, one in operations:
        good = next(answer for status, answer in one["responses"].items() if status.startswith("2"))
        if method != "delete":
            assert all(content.get("schema") for content in good["content"].values()), f"{method} {path}"


def test_every_field_of_a_spec_is_described(document):
    """A description is also the documentation; constants and models speak for themselves."""
    for name in ("RolloutSpec", "OptimizerSpec", "ModelSpec", "DataSpec", "RewardSpec", "UpdateSpec", "Limits"):
        for key, field in document["components"]["schemas"][name]["properties"].items():
            assert "description" in field or "const" in field, f"{name}.{key}"


def test_the_example_fits_its_schema_and_is_accepted(document, client):
    example = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert example == JOB_SPEC
    schema = {"$ref": "#/components/schemas/JobSpec", "components": document["components"]}
    Draft202012Validator(schema).validate(example)
    assert client.post("/v1/jobs", json=example).status_code == 201


def test_it_is_served_without_a_key(api, document):
    with api.anonymous() as anybody:
        assert anybody.get("/openapi.json").json() == document


def test_it_can_be_printed():
    printed = subprocess.run([sys.executable, "-m", "service.openapi"], cwd=REPOSITORY, capture_output=True, check=True)
    assert json.loads(printed.stdout)["info"]["title"] == "Ratchet"


# ---------------------------------------------------------------- /docs


def test_the_reference_is_a_page_without_scripts_that_its_policy_lets_through(api):
    answer = httpx.get(f"{api.url}/docs")  # no key, and no part of openapi.json
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    allowed = b64encode(sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{allowed}'" in policy and policy.startswith("default-src 'none'; ")
    assert "<script" not in answer.text and "http://" not in answer.text and "https://" not in answer.text.split("<h2>")[0]
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"


def test_the_reference_names_every_route_and_every_shape_and_leads_to_them(api):
    document, page = api.app.openapi(), reference.page(api.app.openapi())
    for path, item in document["paths"].items():
        for method in item:
            assert f"<b>{method.upper()}</b> <code>{html.escape(path)}</code>" in page
    ids = set(re.findall(r' id="([^"]+)"', page))
    assert ids == set(document["components"]["schemas"])
    assert set(re.findall(r'href="#([^"]+)"', page)) <= ids


def test_nothing_in_the_reference_is_markup():
    bad = "<img src=x onerror=alert(1)>\"'&"
    operation = {"tags": [bad], "description": f"{bad}\n{bad}", "parameters": [{"name": bad, "in": bad, "description": bad}]}
    schema = {"description": bad, "properties": {bad: {"enum": [bad], "default": bad}, "b": {"$ref": f"#/{bad}"}}}
    page = reference.page(
        {
            "info": {"title": bad, "version": bad, "description": bad},
            "paths": {bad: {"get": {**operation, "responses": {bad: {"description": bad, "content": {bad: {}}}}}}},
            "components": {"schemas": {bad: schema, "plain": {"type": bad}}},
        }
    )
    assert "<img" not in page and "&lt;img" in page


def test_a_method_that_a_path_does_not_offer_is_a_405_that_names_those_it_does(api):
    paths, wrong = api.app.openapi()["paths"], list[str]()
    with httpx.Client(base_url=api.url) as client:
        for path, offered in paths.items():
            named = re.sub(r"{.*?}", "x", path)
            others = [other for other in paths if other != path and re.fullmatch(re.sub(r"{.*?}", "[^/]+", other), named)]
            of_another = {method for other in others for method in paths[other]}
            for method in {"get", "put", "post", "delete", "patch", "options"} - offered.keys() - of_another:
                answer = client.request(method, named)
                allowed = {name.lower() for name in answer.headers.get("allow", "").split(", ")} - {"head"}
                told = answer.json().get("error", answer.json())  # OpenAI's shape has it there
                as_told = (answer.status_code, told.get("code")) == (405, "method_not_allowed")
                if not as_told or not allowed or allowed - offered.keys() - of_another:
                    wrong.append(f"{method} {path}: {answer.status_code}, {allowed}")
    assert wrong == []
