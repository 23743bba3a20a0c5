"""Uploads: streamed, checked line by line, used by jobs."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

JSONL = {"Content-Type": "application/jsonl"}
ROWS = [{"q": f"{number}+1=", "a": str(number + 1)} for number in range(50)]


def lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def upload(client, content=None, name="rows", **headers):
    return client.post("/v1/datasets", params={"name": name}, content=content or lines(ROWS), headers={**JSONL, **headers})


def left_behind(api):
    """Files in the blob store, whatever they are."""
    return {path for path in api.store.blobs.root.rglob("*") if path.is_file()}


def test_a_dataset_is_uploaded_read_used_and_deleted(each_api, spec):
    api = each_api
    with api.client() as client:
        made = upload(client)
        assert made.status_code == 201, made.text
        dataset = made.json()
        assert (dataset["name"], dataset["rows"]) == ("rows", 50)
        assert dataset["columns"] == {"q": {"types": ["string"], "rows": 50}, "a": {"types": ["string"], "rows": 50}}
        assert client.get(f"/v1/datasets/{dataset['id']}").json() == dataset
        assert [one["id"] for one in client.get("/v1/datasets").json()["data"]] == [dataset["id"]]

        page = client.get(f"/v1/datasets/{dataset['id']}/rows", params={"offset": 45, "limit": 3}).json()
        assert page["data"] == ROWS[45:48]
        assert (page["has_more"], page["first_id"], page["last_id"], page["total"]) == (True, 45, 47, 50)
        page = client.get(f"/v1/datasets/{dataset['id']}/rows", params={"offset": 48}).json()
        assert (page["data"], page["has_more"]) == (ROWS[48:], False)
        page = client.get(f"/v1/datasets/{dataset['id']}/rows", params={"offset": 500}).json()
        assert (page["data"], page["first_id"], page["last_id"]) == ([], None, None)

        job = client.post("/v1/jobs", json=spec(data={"train": {"source": "dataset", "id": dataset["id"]}})).json()
        assert job["status"] == "queued"
        refused = client.delete(f"/v1/datasets/{dataset['id']}")
        assert refused.status_code == 409
        assert job["id"] in refused.json()["detail"]
        client.post(f"/v1/jobs/{job['id']}/cancel")
        assert client.delete(f"/v1/datasets/{dataset['id']}").status_code == 204
        assert client.get(f"/v1/datasets/{dataset['id']}").status_code == 404
        assert left_behind(api) == set()


def test_a_form_is_taken_too(client):
    made = client.post("/v1/datasets", files={"file": ("addition.jsonl", lines(ROWS), "application/jsonl")})
    assert made.status_code == 201, made.text
    assert (made.json()["name"], made.json()["rows"]) == ("addition.jsonl", 50)
    assert made.json()["sha256"] == upload(client).json()["sha256"]


def test_a_form_without_a_file_is_refused(client):
    assert client.post("/v1/datasets", files={"rows": ("x", b"{}")}).json()["code"] == "missing_file"
    broken = client.post("/v1/datasets", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=y"})
    assert broken.status_code == 400
    assert broken.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("name", "status"),
    [(b"addition", 201), (b"a\nb", 422), (b"x" * 201, 422), (b"a\0b", 422), (b"a\xffb", 201), (b"a\tb", 422)],
)
def test_file_names_in_forms_are_checked(client, name, status):
    head = b'--y\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\n'
    made = client.post(
        "/v1/datasets",
        content=head + b'{"q": 1}\r\n--y--\r\n',
        headers={"Content-Type": "multipart/form-data; boundary=y"},
    )
    assert made.status_code == status, made.text


def test_a_dataset_whose_file_is_gone_says_so(api, client, spec):
    dataset = upload(client).json()
    api.store.blobs.delete(f"datasets/{dataset['id']}.jsonl")
    gone = client.get(f"/v1/datasets/{dataset['id']}/rows")
    assert (gone.status_code, gone.json()["code"]) == (404, "files_missing")
    job = client.post("/v1/jobs", json=spec(data={"train": {"source": "dataset", "id": dataset["id"]}}))
    assert job.status_code == 422, job.text
    assert job.json()["errors"][0]["pointer"] == "/data/train/id"


def test_numbers_come_back_as_they_were_sent(client):
    row = b'{"big": 123456789012345678901234567890, "small": 1e-300, "one": 1.0}'
    dataset = upload(client, row + b"\n").json()
    rows = client.get(f"/v1/datasets/{dataset['id']}/rows")
    assert rows.json()["data"] == [{"big": 123456789012345678901234567890, "small": 1e-300, "one": 1.0}]


@pytest.mark.parametrize(
    ("content", "code", "pointers"),
    [
        (b'{"q": 1}\n{"q": 2,}\n\n[3]\n{"q": NaN}\n', "bad_dataset", ["/lines/2", "/lines/4", "/lines/5"]),
        (b'{"q": 1}\n{"q": "\xff"}\n', "bad_dataset", ["/lines/2"]),
        (b'{"q": 1, "q": 2}\n', "bad_dataset", ["/lines/1"]),
        (b'{"q": 1}\n' + b"nonsense\n" * 100, "bad_dataset", [f"/lines/{number}" for number in range(2, 22)]),
        (b"\n\n", "empty_dataset", [""]),
    ],
)
def test_a_broken_dataset_is_refused_by_line(api, client, content, code, pointers):
    before = left_behind(api)
    refused = upload(client, content)
    assert refused.status_code == 422
    assert refused.json()["code"] == code
    assert [one["pointer"] for one in refused.json()["errors"]] == pointers
    assert left_behind(api) == before
    assert client.get("/v1/datasets").json()["data"] == []


def test_an_empty_upload_is_refused(client):
    refused = client.post("/v1/datasets", content=b"", headers=JSONL)
    assert (refused.status_code, refused.json()["code"]) == (422, "empty_dataset")


def test_an_upload_over_the_limit_is_refused(api, client):
    before = left_behind(api)
    row = lines([{"q": "x" * 1000}])
    for content in (row * 400, (row for _ in range(400))):  # with and without a Content-Length
        refused = client.post("/v1/datasets", content=content, headers=JSONL)
        assert refused.status_code == 413
        assert refused.json()["limit_bytes"] == 300_000
    form = client.post("/v1/datasets", files={"file": ("x", row * 400)})
    assert form.status_code == 413
    assert left_behind(api) == before


@pytest.mark.parametrize("kind", ["application/json", "text/csv", ""])
def test_other_formats_are_refused(client, kind):
    refused = client.post("/v1/datasets", content=b"{}", headers={"Content-Type": kind})
    assert refused.status_code == 415
    assert "application/jsonl" in refused.json()["detail"]


def test_an_upload_is_made_once_under_one_key(client):
    first = upload(client, **{"Idempotency-Key": "one"})
    assert upload(client, **{"Idempotency-Key": "one"}).json() == first.json()
    assert upload(client, lines(ROWS[:3]), **{"Idempotency-Key": "one"}).json()["code"] == "idempotency_key_reused"
    assert upload(client, name="other", **{"Idempotency-Key": "one"}).json()["code"] == "idempotency_key_reused"
    assert len(client.get("/v1/datasets").json()["data"]) == 1


def test_uploads_at_once_do_not_mix(client):
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda number: upload(client, lines(ROWS[: number + 1])).json(), range(12)))
    assert [one["rows"] for one in made] == list(range(1, 13))
    page = client.get("/v1/datasets", params={"limit": 5}).json()
    assert (len(page["data"]), page["has_more"]) == (5, True)


def test_an_upload_that_is_cut_leaves_nothing(api, client):
    import socket
    from time import sleep

    before = left_behind(api)
    with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), timeout=10) as one:
        head = (
            f"POST /v1/datasets HTTP/1.1\r\nHost: x\r\nAuthorization: {client.headers['Authorization']}\r\n"
            "Content-Type: application/jsonl\r\nContent-Length: 100000\r\n\r\n"
        )
        one.sendall(head.encode() + lines(ROWS))
        sleep(0.3)
    sleep(0.3)
    assert left_behind(api) == before
    assert client.get("/v1/datasets").json()["data"] == []
