"""Others get their turn while large bodies are read."""

import asyncio
import json
import threading
from typing import Any

import orjson

from losses_over_http import TENSORS, in_tensors, post
from service.edge.arrays import parse_arrays
from service.relay import queue as queue_of_losses
from service.relay.line import losses
from service.relay.orders import Order, Parcel
from service.relay.queue import RequestQueue
from service.relay.tensors import decode, encode


def test_whoever_waits_for_redis_is_not_overtaken(api, monkeypatch):
    """With more requests than connections a pool serves who comes at the right moment, and some wait for ever."""
    monkeypatch.setattr(queue_of_losses, "CONNECTIONS", 1)
    served = []

    async def ask(name: str, times: int) -> None:
        for _ in range(times):
            await queue.standing("default", "loss_none")
            served.append(name)

    async def all_at_once() -> None:
        await asyncio.gather(ask("greedy", 20), *(ask(f"patient {n}", 1) for n in range(10)))
        await queue.close()

    queue = RequestQueue(api.settings, losses(api.settings))
    asyncio.run(all_at_once())
    assert served[:11] == ["greedy", *(f"patient {n}" for n in range(10))]


def test_bodies_are_read_beside_the_event_loop(api, client, standin, monkeypatch):
    """A body of a few kilobytes can hold a thousand mistakes, each of which takes a while to explain."""
    threads = []

    def spied(self: Order, body: bytes | None = None) -> Parcel:
        threads.append(threading.current_thread().name)
        return encode_order(self, body)

    encode_order = Order.encode
    monkeypatch.setattr(Order, "encode", spied)
    row = [-0.123456789] * 100
    batch = {"log_probs": [row], "old_log_probs": [row], "advantages": [1.0]}
    assert post(client, {"items": [{"objective": "gspo", "batch": batch}]}).status_code == 200
    assert post(client, {"items": [{"objective": "gspo", "return": ["ratio"] * 50, "batch": batch}] * 8}).status_code == 200
    many = {"items": [{"objective": "gspo", "return": ["ratio"] * 50, "seed": n} for n in range(3)]}
    sound, _ = decode(in_tensors())
    each = {f"{n}/{name.removeprefix('0/')}": one for n in range(3) for name, one in sound.items()}
    assert post(client, encode(each, {"request": json.dumps(many)}), **{"Content-Type": TENSORS}).status_code == 200
    assert len(threads) == 3 and all(name.startswith("AnyIO worker thread") for name in threads), threads


def test_a_short_request_wakes_no_thread(api, client, standin, monkeypatch):
    threads = []
    encode_order = Order.encode

    def spied(self: Order, body: bytes | None = None) -> Parcel:
        threads.append(threading.current_thread().name)
        return encode_order(self, body)

    monkeypatch.setattr(Order, "encode", spied)
    assert post(client).status_code == post(client, in_tensors(), **{"Content-Type": TENSORS}).status_code == 200
    assert len(threads) == 2 and not any(name.startswith("AnyIO worker thread") for name in threads), threads


def test_a_long_body_of_json_lets_the_others_in_between(monkeypatch):
    """What is read in C, where nobody else can run, is never more than a row."""
    lengths = []

    class Spy:
        JSONDecodeError = orjson.JSONDecodeError

        @staticmethod
        def loads(text: str) -> Any:
            lengths.append(len(text))
            return orjson.loads(text)

    rows = [[-0.5] * 1000] * 50
    raw = orjson.dumps({"items": [{"objective": "gspo", "batch": {"log_probs": rows, "old_log_probs": rows}}]})
    monkeypatch.setattr("service.edge.arrays.orjson", Spy)
    assert parse_arrays(raw)["items"][0]["batch"]["log_probs"] == rows
    assert len(lengths) == 100
    assert max(lengths) == 5001
