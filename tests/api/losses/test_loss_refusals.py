"""What bad bodies and bad items get."""

from collections.abc import Iterator

import orjson
import pytest

from chaos.standin import worker
from losses_over_http import ITEM, JSON, PREFIX, TENSORS, floats, in_tensors, post, refused
from service.api.examples import LOSS_REQUEST
from service.relay.orders import Order, answered
from service.relay.tensors import Tensor, encode


def test_one_bad_item_beside_a_good_one(client, standin):
    bad = {**ITEM, "batch": {**ITEM["batch"], "advantages": [1.0, "x"]}}
    answer = post(client, {"items": [ITEM, bad, ITEM]})
    assert answer.status_code == 200
    first, second, third = answer.json()["data"]
    assert (first["status"], third["status"]) == ("ok", "ok")
    assert second == {
        "index": 1,
        "status": "error",
        "error": {
            "code": "invalid",
            "pointer": "/items/1/batch/advantages/1",
            "detail": "must be a number, got 'x'",
            "got": "x",
            "allowed": "a number",
        },
    }


def test_all_or_nothing_refuses_the_good_one_too_and_asks_nobody(client, store):
    bad = {**ITEM, "objective": "gpso"}
    problem = refused(post(client, {"items": [ITEM, bad], "all_or_nothing": True}), 422)
    assert problem["code"] == "unknown_value"
    assert [one["pointer"] for one in problem["errors"]] == ["/items/1/objective/preset"]
    assert problem["error"]["param"] == "/items/1/objective/preset"
    assert [one["error"]["code"] for one in problem["data"]] == ["all_or_nothing", "unknown_value"]
    assert "did you mean 'gspo'?" in problem["detail"]
    assert not store.keys(f"{PREFIX}*")


def test_a_request_without_a_good_item_is_a_problem(client, store):
    batch = {"log_probs": [[-1.0]], "advantages": [1.0]}
    problem = refused(post(client, {"items": [{"objective": "gspo", "batch": batch}] * 2}), 422)
    assert problem["code"] == "missing_tensor"
    assert [one["pointer"] for one in problem["errors"]] == [f"/items/{i}/batch/old_log_probs" for i in range(2)]
    assert [one["index"] for one in problem["data"]] == [0, 1]


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_what_the_worker_finds_wrong_is_a_problem_like_any_other(api, client, all_or_nothing):
    wrong = {"code": "mask_not_binary", "pointer": "/items/1/batch/response_mask/0/1", "detail": "must be 0 or 1", "got": 2}

    def reply(order: Order) -> bytes:
        assert order.all_or_nothing is all_or_nothing
        first = {"index": 0, "status": "ok", "loss": 1.0, "metrics": {}} if all_or_nothing else {**second, "index": 0}
        return answered("invalid", [first, second], {})

    second = {"index": 1, "status": "error", "error": wrong, "errors": [wrong, {**wrong, "code": "nonfinite"}]}
    with worker(api.settings, reply):
        problem = refused(post(client, {"items": [ITEM, ITEM], "all_or_nothing": all_or_nothing}), 422)
        url = post(client, {"items": [ITEM, ITEM], "all_or_nothing": all_or_nothing}, wait=None).headers["location"]
        polled = refused(client.get(url, headers={"Prefer": "wait=10"}), 422)
    assert problem["code"] == "mask_not_binary"
    assert {one["code"] for one in problem["errors"]} == {"mask_not_binary", "nonfinite"}
    assert [one["status"] for one in problem["data"]] == ["error", "error"]  # no result is given beside an error
    assert problem["data"][0]["error"]["code"] == ("all_or_nothing" if all_or_nothing else "mask_not_binary")
    assert problem["data"][1]["error"] == wrong
    assert polled["data"] == problem["data"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "empty_body"),
        (b'{"items": [', 400, "malformed_body"),
        (b"[" * 100_000, 400, "too_deep"),
        (b'{"items": [], "items": []}', 400, "duplicate_key"),
        (b'{"\\ud800": 1}', 400, "not_storable"),
        (b"\xff\xfe", 400, "malformed_body"),
        (b"7", 422, "invalid_request"),
        (b'{"items": []}', 422, "invalid_request"),
        (b'{"items": [7]}', 422, "invalid"),
        (b'{"items": [{"objective": "gspo", "batch": {"log_probs": [["\xc3\xa4"]]}}]}', 422, "invalid"),
    ],
)
def test_bodies_of_json_that_are_none(client, store, body, status, code):
    assert refused(post(client, body), status)["code"] == code


def test_a_header_that_lies_is_a_problem_with_a_pointer(client, store):
    lying = in_tensors().replace(b'"shape":[2]', b'"shape":[9]')
    problem = refused(post(client, lying, **{"Content-Type": TENSORS}), 400)
    assert problem["code"] == "malformed_safetensors"
    assert [one["pointer"] for one in problem["errors"]] == ["/items/0/batch/advantages"]
    assert "has 8 bytes of data, but F32 of shape [9] takes 36" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed_safetensors"),
        (in_tensors()[:-1], 400, "malformed_safetensors"),
        (in_tensors() + b"x", 400, "malformed_safetensors"),
        (b"\xff" * 8 + b"{}", 400, "malformed_safetensors"),
        (encode({}, {}), 422, "invalid_request"),
        (encode({}, {"request": ""}), 400, "empty_body"),
        (encode({}, {"request": "{"}), 400, "malformed_body"),
        (encode({}, {"request": '{"items": [], "items": []}'}), 400, "duplicate_key"),
        (encode({}, {"request": '{"items": [{"objective": "gspo"}]}'}), 422, "missing"),
        (in_tensors(logprobs=floats(1.0)), 422, "unknown_key"),
        (in_tensors(log_probs=Tensor("F16", (3,), memoryview(bytes(6)))), 422, "dtype_not_taken"),
        (in_tensors({"items": [{"objective": "gspo"}], "dtype": "float8"}), 422, "invalid_request"),
        (encode({"1/log_probs": floats(1.0)}, {"request": '{"items": [{"objective": "gspo"}]}'}), 422, "invalid_request"),
    ],
)
def test_bodies_of_tensors_that_cannot_be_taken(client, store, body, status, code):
    assert refused(post(client, body, **{"Content-Type": TENSORS}), status)["code"] == code


def test_other_formats_are_refused(client):
    problem = refused(post(client, b"items: []", **{"Content-Type": "application/yaml"}), 415)
    assert f"taken are {JSON} and {TENSORS}" in problem["detail"]


@pytest.mark.parametrize("kind", [JSON, TENSORS])
@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "gzip, identity"])
def test_compressed_bodies_are_refused(client, kind, encoding):
    answer = post(client, b"\x1f\x8b", **{"Content-Type": kind, "Content-Encoding": encoding})
    assert refused(answer, 415)["code"] == "unsupported_encoding"


def test_bodies_have_a_limit_of_their_own(serve, settings):
    mine = settings.model_copy(update={"max_loss_body_bytes": 10_000, "max_body_bytes": 1024})
    with serve(mine) as api, api.client() as client, worker(mine):
        fits = orjson.dumps(LOSS_REQUEST) + b" " * (10_000 - len(orjson.dumps(LOSS_REQUEST)))
        assert post(client, fits).status_code == 200
        assert refused(post(client, fits + b" "), 413)["limit_bytes"] == 10_000

        def endless() -> Iterator[bytes]:
            for _ in range(1000):
                yield b" " * 1000

        answer = client.post("/v1/losses", content=endless(), headers={"Content-Type": JSON})
        assert refused(answer, 413)["code"] == "body_too_large"
