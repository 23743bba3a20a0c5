"""Orders and answers as they travel between API and worker."""

from array import array

import orjson

from loss_batches import INF, NAN, numbers, tensor
from service.api.examples import LOSS_REQUEST
from service.losses import numbers as numbers_of_json
from service.losses import request as requests
from service.losses.answers import as_json
from service.relay.orders import Answer, Order, answered, unavailable


def test_an_order_is_read_as_it_was_written():
    checked = requests.check(LOSS_REQUEST)
    order = Order("loss_1", "team", 12.5, False, checked.items, checked.tensors)
    again = Order.decode(order.encode())
    assert (again.id, again.project, again.deadline, again.all_or_nothing) == ("loss_1", "team", 12.5, False)
    assert again.items == order.items
    assert {name: numbers(one) for name, one in again.tensors.items()} == {
        name: numbers(one) for name, one in order.tensors.items()
    }


def test_an_answer_in_json_has_the_rows_that_were_sent():
    data = [
        {"index": 0, "status": "ok", "loss": 0.5, "metrics": {"policy/loss": 0.5}},
        {"index": 1, "status": "error", "error": {"code": "x", "pointer": "/items/1", "detail": "y"}},
        {"index": 2, "status": "ok", "loss": 1.5, "metrics": {}},
    ]
    tensors = {
        "0/gradients/log_probs": tensor([1.0, NAN, INF, -INF, 0.25], dtype="F64"),
        "0/clipped": tensor([True, False, False, True, True], dtype="BOOL"),
        "0/cu_seqlens": tensor([0, 2, 2, 5], dtype="I64"),
        "2/ratio": tensor([1.0, 2.0, 3.0, 1e308], 2, 2, dtype="F64"),
        "2/token_loss": tensor([1e308, 1e308, -1e308, 0.5], 2, 2, dtype="F64"),
    }
    answer = Answer.decode(answered("ok", data, tensors))
    assert answer.outcome == "ok"
    assert orjson.loads(as_json(answer)) == {
        "object": "list",
        "data": [
            {
                **data[0],
                "gradients": {"log_probs": [[1.0, "NaN"], [], ["Infinity", "-Infinity", 0.25]]},
                "clipped": [[True, False], [], [False, True, True]],
            },
            data[1],
            {**data[2], "ratio": [[1.0, 2.0], [3.0, 1e308]], "token_loss": [[1e308, 1e308], [-1e308, 0.5]]},
        ],
    }


def test_an_answer_of_an_empty_batch_has_no_rows():
    data = [{"index": 0, "status": "ok", "loss": 0.0, "metrics": {}}]
    tensors = {"0/ratio": tensor([], dtype="F32"), "0/cu_seqlens": tensor([0], dtype="I64")}
    assert orjson.loads(as_json(Answer.decode(answered("ok", data, tensors))))["data"][0]["ratio"] == []
    tensors = {"0/ratio": tensor([], 2, 0, dtype="F32")}
    assert orjson.loads(as_json(Answer.decode(answered("ok", data, tensors))))["data"][0]["ratio"] == [[], []]


def test_an_answer_that_did_not_come_says_why():
    answer = Answer.decode(unavailable("loss_worker_died", "it died"))
    assert answer.outcome == "unavailable"
    assert answer.problem == {"code": "loss_worker_died", "detail": "it died", "retryable": True}


def test_arrays_are_taken_without_a_copy():
    values = array("d", [1.0, 2.0])
    one = numbers_of_json.tensor(values)
    values[0] = 7.0
    assert numbers(one) == [7.0, 2.0]
