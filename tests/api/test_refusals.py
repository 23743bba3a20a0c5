"""What bad input gets: a problem that says where, what came, and what is allowed."""

import socket

import httpx
import pytest

PROBLEM = "application/problem+json"


def refused(answer, status):
    """The problem, with what every one of them must have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    problem = answer.json()
    assert problem["status"] == status
    assert problem["error"] == {
        "message": problem["detail"],
        "type": problem["error"]["type"],
        "code": problem["code"],
        **({"param": problem["errors"][0]["pointer"]} if problem.get("errors") else {}),
    }
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


def field(answer, status=422):
    """The only field that is wrong."""
    problem = refused(answer, status)
    assert len(problem["errors"]) == 1, problem["errors"]
    return problem["errors"][0]


# ---------------------------------------------------------------- fields of a spec


@pytest.mark.parametrize(
    ("sections", "pointer", "says"),
    [
        ({"rollout": {"group_sise": 4}}, "/rollout/group_sise", "did you mean 'group_size'?"),
        ({"group_size": 4}, "/group_size", "a key of this name belongs to /rollout/group_size"),
        ({"objective": {"preset": "gspo", "surrogate": {"clip_high": 1.2}}}, "/objective/surrogate/clip_high", "got 1.2"),
        ({"objective": {"preset": "gpso"}}, "/objective/preset", "did you mean 'gspo'?"),
        ({"rollout": {"group_size": 1}, "update": {"minibatches": 1}}, "/rollout/group_size", "Use group_size >= 2"),
        ({"rollout": {"temperature": 0}}, "/rollout/temperature", "must be at least 1e-06, got 0"),
        ({"rollout": {"top_k": "many"}}, "/rollout/top_k", "must be an integer, got 'many'"),
        ({"model": {"source": "/nowhere/at/all"}}, "/model/source", "there is no folder /nowhere/at/all"),
        ({"model": {"from_checkpoint": "ckpt_absent"}}, "/model/from_checkpoint/id", "no checkpoint ckpt_absent"),
        ({"model": {"adapter": {"kind": "lor"}}}, "/model/adapter/kind", "did you mean 'lora'?"),
        ({"data": {"prompt": "{question}"}}, "/data/prompt", "{question} names no column"),
        ({"data": {"prompt": "{q"}}, "/data/prompt", "expected '}' before end of string"),
        ({"data": {"train": {"source": "inline", "rows": []}}}, "/data/train/rows", "must be at least 1 long"),
        ({"data": {"train": {"source": "dataset", "id": "ds_absent"}}}, "/data/train/id", "no dataset ds_absent"),
        ({"reward": {"graders": [{"kind": "regex", "pattern": "("}]}}, "/reward/graders/0/pattern", "missing )"),
        (
            {"reward": {"graders": [{"kind": "exact", "reference": "{b}"}]}},
            "/reward/graders/0/reference",
            "{b} names no column",
        ),
        (
            {"reward": {"graders": [{"kind": "number", "reference": "on 2025-12-26"}]}},
            "/reward/graders/0/reference",
            "row 0 of data.train: the reference 'on 2025-12-26'",
        ),
        (
            {"reward": {"graders": [{"kind": "number", "reference": r"\foo{{3}}"}]}},
            "/reward/graders/0/reference",
            "holds no formula that can be read",
        ),
        (
            {"reward": {"graders": [{"kind": "json_schema", "schema": {"$ref": "#/$defs/x"}}]}},
            "/reward/graders/0/schema",
            "points to nothing in the schema",
        ),
        (
            {"reward": {"graders": [{"kind": "exact", "reference": "1", "name": "mean"}]}},
            "/reward/graders/0/name",
            "reward/mean is a metric of every job",
        ),
        ({"reward": {"graders": [{"kind": "reasoning_gym"}]}}, "/reward/graders/0/kind", "source reasoning_gym only"),
        (
            {"reward": {"graders": [{"kind": "http", "url": "http://x/", "secret": "judgee"}]}},
            "/reward/graders/0/secret",
            "did you mean 'judge'?",
        ),
        ({"rollout": {"max_prompt_tokens": 500}}, "/rollout/max_prompt_tokens", "context holds 128 tokens"),
        ({"update": {"minibatches": 3}}, "/update/minibatches", "must divide"),
        ({"early_stopping": {"patience": 2}}, "/early_stopping", "needs evaluations"),
        ({"kind": "rll"}, "/kind", "did you mean 'rl'?"),
        ({"seed": -1}, "/seed", "must be at least 0"),
    ],
)
def test_wrong_fields_are_refused_where_they_stand(client, spec, sections, pointer, says):
    wrong = field(client.post("/v1/jobs", json=spec(**sections)))
    assert wrong["pointer"] == pointer
    assert says in wrong["detail"]
    assert field(client.post("/v1/jobs:validate", json=spec(**sections))) == wrong  # the dry run says the same


def test_everything_wrong_is_said_at_once(client, spec):
    sent = spec(rollout={"group_sise": 4, "top_p": 3}, optimizer={"learning_rate": "fast"}, nmae="x")
    problem = refused(client.post("/v1/jobs", json=sent), 422)
    assert {one["pointer"] for one in problem["errors"]} == {
        "/rollout/group_sise",
        "/rollout/top_p",
        "/optimizer/learning_rate",
        "/nmae",
    }
    assert problem["detail"].endswith("(and 3 more)")
    wanting = spec(model={"source": "/nowhere"}, reward={"graders": [{"kind": "exact", "reference": "{b}"}]})
    problem = refused(client.post("/v1/jobs", json=wanting), 422)
    assert {one["pointer"] for one in problem["errors"]} == {"/model/source", "/reward/graders/0/reference"}


def test_a_missing_model_has_a_code_of_its_own(client, spec):
    problem = refused(client.post("/v1/jobs", json=spec(model={"source": "/nowhere"})), 422)
    assert problem["code"] == "model_not_found"


def test_secrets_are_not_repeated(client, spec):
    key = client.headers["Authorization"].removeprefix("Bearer ")
    graders = [{"kind": "http", "url": "https://me:hunter2@x/", "secret": ["hunter2"], "password": "hunter2"}]
    answer = client.post("/v1/jobs", json=spec(reward={"graders": graders}, name=[key], model={"source": key + "?"}))
    refused(answer, 422)
    assert "hunter2" not in answer.text
    assert key not in answer.text


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("content", "media_type", "status", "code", "says"),
    [
        (b'{"kind": "rl",}', "application/json", 400, "malformed_body", "line 1, column 15"),
        (b'{"kind":\n "rl"', "application/json", 400, "malformed_body", "line 2, column 6"),
        (b'{"kind": "rl", "kind": "rl"}', "application/json", 400, "duplicate_key", "'kind' stands twice"),
        (b"", "application/json", 400, "empty_body", "empty"),
        (b'{"a": "\xff"}', "application/json", 400, "malformed_body", "line 1, column 8: not UTF-8"),
        (b"[" * 5000, "application/json", 400, "too_deep", "64 levels"),
        (b"[" * 65 + b"]" * 65, "application/json", 400, "too_deep", "64 levels"),
        (b"[" * 65 + b"]" * 65, "application/yaml", 400, "too_deep", "64 levels"),
        (b"[" * 64 + b"]" * 64, "application/json", 422, "invalid_request", "must be an object"),
        (b"[" * 64 + b"]" * 64, "application/yaml", 422, "invalid_request", "must be an object"),
        (b'{"seed": NaN}', "application/json", 422, "invalid_request", "/seed"),
        (b'{"name": "a\\u0000b"}', "application/json", 422, "invalid_request", "NUL"),
        (b'{"name": "\\ud800"}', "application/json", 422, "invalid_request", "/name"),
        (b"[]", "application/json", 422, "invalid_request", "must be an object"),
        (b"kind: rl\nmodel: {source: tiny\n", "application/yaml", 400, "malformed_body", "line 3, column 1"),
        (b"kind: rl\nkind: rl\n", "application/yaml", 400, "duplicate_key", "line 2, column 1"),
        (b"a: &a [1]\nb: *a\n", "application/yaml", 400, "malformed_body", "aliases"),
        (b"a: !!python/object:os.system {}\n", "application/yaml", 400, "malformed_body", "tags"),
        (b"kind: rl", "text/plain", 415, "unsupported_media_type", "application/json"),
        (b"kind=rl", "application/x-www-form-urlencoded", 415, "unsupported_media_type", "application/json"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(client, content, media_type, status, code, says):
    problem = refused(client.post("/v1/jobs", content=content, headers={"Content-Type": media_type}), status)
    assert problem["code"] == code
    assert says in problem["detail"]


def test_dates_in_yaml_stay_text(client, spec):
    content = b"kind: rl\nname: 2024-01-01\nrollout: 3\n"
    problem = refused(client.post("/v1/jobs", content=content, headers={"Content-Type": "application/yaml"}), 422)
    assert "/name" not in {one["pointer"] for one in problem["errors"]}


def test_compressed_bodies_are_refused(client):
    for path in ("/v1/jobs", "/v1/datasets"):
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/jsonl" if "data" in path else "application/json"}
        problem = refused(client.post(path, content=b"\x1f\x8b", headers=headers), 415)
        assert problem["code"] == "unsupported_encoding"


def test_a_body_over_the_limit_is_refused_before_it_is_sent_whole(api, client):
    big = b'{"name": "' + b"x" * 300_000 + b'"}'
    headers = {"Content-Type": "application/json"}
    problem = refused(client.post("/v1/jobs", content=big, headers=headers), 413)
    assert (problem["code"], problem["limit_bytes"]) == ("body_too_large", 200_000)

    def endless():
        for _ in range(10_000):
            yield b"x" * 10_000

    # Without Content-Length the limit is found while the body streams.
    try:
        answer = client.post("/v1/jobs", content=endless(), headers=headers)
    except httpx.WriteError:
        pytest.fail("the connection was cut before the answer came")
    assert refused(answer, 413)["code"] == "body_too_large"


def test_the_limit_is_exact(client):
    headers = {"Content-Type": "application/json"}
    fits = b'"' + b"x" * 199_998 + b'"'
    assert client.post("/v1/jobs", content=fits, headers=headers).status_code == 422
    assert client.post("/v1/jobs", content=fits + b" ", headers=headers).status_code == 413


# ---------------------------------------------------------------- keys, routes, parameters


def test_who_shows_no_key_or_a_wrong_one_is_refused(api, client):
    key = client.headers["Authorization"].removeprefix("Bearer ")
    for headers, code in (
        ({}, "missing_api_key"),
        ({"Authorization": f"Basic {key}"}, "missing_api_key"),
        ({"Authorization": "Bearer sk-something"}, "invalid_api_key"),
        ({"Authorization": "Bearer tml-" + "x" * 43}, "invalid_api_key"),
        ({"X-API-Key": "tml-" + "x" * 5000}, "invalid_api_key"),
        ([(b"X-API-Key", "tml-ümlaut".encode("latin-1"))], "invalid_api_key"),
    ):
        with httpx.Client(base_url=api.url, headers=headers) as stranger:
            answer = stranger.get("/v1/jobs")
            assert refused(answer, 401)["code"] == code
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    for headers in ({"Authorization": f"Bearer {key}"}, {"Authorization": f"bearer {key}"}, {"X-API-Key": key}):
        with api.anonymous(**headers) as known:
            assert known.get("/v1/jobs").status_code == 200


def test_a_stranger_s_body_is_not_read(api):
    """The answer comes while the body is still being sent."""
    with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), timeout=10) as stranger:
        head = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
        stranger.sendall(head + b"{")
        assert b"401 Unauthorized" in stranger.recv(1000)


@pytest.mark.parametrize(
    ("query", "pointer", "says"),
    [
        ("stauts=running", "/query/stauts", "did you mean 'status'?"),
        ("status=runing", "/query/status/0", "did you mean 'running'?"),
        ("limit=0", "/query/limit", "must be at least 1"),
        ("limit=1000", "/query/limit", "must be at most 100"),
        ("limit=many", "/query/limit", "must be an integer"),
        ("after=job_absent", "/query/after", "no object job_absent"),
        ("kind=dpo", "/query/kind", "must be one of rl, supervised"),
    ],
)
def test_wrong_parameters_are_refused(client, query, pointer, says):
    wrong = field(client.get(f"/v1/jobs?{query}"))
    assert wrong["pointer"] == pointer
    assert says in wrong["detail"]


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("metrics", "points=0"),
        ("metrics", "from_step=-1"),
        ("metrics", "to_step=99999999999999999999"),
        ("rollouts", "split=test"),
        ("rollouts", "after=99999999999999999999.train.0"),
        ("rollouts", "after=nonsense"),
        ("rollouts", "step=1e3"),
        ("events", "after=-1"),
        ("events", "after=99999999999999999999"),
        ("checkpoints", "limit=-5"),
    ],
)
def test_wrong_parameters_of_a_job_s_parts_are_refused(client, submit, path, query):
    field(client.get(f"/v1/jobs/{submit()['id']}/{path}?{query}"))


def test_paths_that_are_none(client):
    nothing = refused(client.get("/v1/nothing"), 404)
    assert (nothing["code"], nothing["detail"]) == (
        "route_not_found",
        "there is no /v1/nothing; the routes are listed under /docs and in /openapi.json",
    )
    assert refused(client.get("/v1/jobs/"), 404)["code"] == "route_not_found"
    answer = client.put("/v1/jobs")
    assert refused(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["Allow"] == "GET, POST"
    assert refused(client.get("/v1/jobs/%00"), 400)["code"] == "malformed_url"
    assert refused(client.get("/v1/jobs?name=%00"), 400)["code"] == "malformed_url"
    assert refused(client.get("/v1/jobs/" + "x" * 5000), 404)["code"] == "not_found"
    assert refused(client.get("/v1/jobs/%F0%9F%98%80"), 404)["code"] == "not_found"


# ---------------------------------------------------------------- what nobody expected


def test_an_unexpected_error_says_nothing_of_its_cause(api, client, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr("service.api.models._of_folder", broken)
    (api.settings.local_models_dir / "m").mkdir(parents=True, exist_ok=True)
    (api.settings.local_models_dir / "m" / "config.json").write_text("{}")
    try:
        answer = client.get("/v1/models")
    finally:
        (api.settings.local_models_dir / "m" / "config.json").unlink()
    problem = refused(answer, 500)
    assert problem["code"] == "internal"
    assert "hunter2" not in answer.text


def test_a_database_that_is_away_is_a_503(api, client, monkeypatch):
    from sqlalchemy.exc import OperationalError

    def away(*args, **kwargs):
        raise OperationalError("SELECT secret", {}, Exception("password=hunter2"))

    monkeypatch.setattr("service.store.jobs.page", away)
    answer = client.get("/v1/jobs")
    problem = refused(answer, 503)
    assert (problem["code"], problem["retryable"]) == ("database_unavailable", True)
    assert answer.headers["Retry-After"] == "5"
    assert "hunter2" not in answer.text
