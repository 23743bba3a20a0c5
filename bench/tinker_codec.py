"""Answers on the Tinker wire: protobuf with zstd against the same answers as JSON. Bytes, and CPU on both sides together.

    python bench/tinker_codec.py [--count 64] [--tokens 256]

Two kinds: samples with prompt log-probs and the top k of each place, and forward_backward's log-probs of 2-D targets, as
distillation has them. Log-probs are drawn as a trained model gives them: most tokens are nearly certain.
"""

import argparse
import json
import random
import time
from array import array
from collections.abc import Callable
from math import log

import zstandard

from service.losses.numbers import tensor
from service.relay.tensors import Tensors
from service.tinker import answers, messages
from service.tinker.compression import LEVEL

K = 8


def log_prob(draw: random.Random) -> float:
    """As log_softmax has it in float32: (logit - largest) - log(sum), of logits near 20, whose steps are coarse."""
    wanted = log(1 - draw.random() ** 6 * 0.999)
    largest, sum_log = _float32(draw.gauss(20, 4)), _float32(draw.random())
    return _float32(_float32(_float32(largest + wanted + sum_log) - largest) - sum_log)


def _float32(value: float) -> float:
    return array("f", [value])[0]


def sample(draw: random.Random, tokens: int) -> Tensors:
    def floats(count: int) -> "array[float]":
        return array("f", (log_prob(draw) for _ in range(count)))

    def ids(count: int) -> "array[int]":
        return array("i", (min(int(draw.paretovariate(0.5)), 150_000) for _ in range(count)))

    return {
        "tokens": tensor(ids(tokens)),
        "cu_seqlens": tensor(array("q", (0, tokens))),
        "log_probs": tensor(floats(tokens)),
        "prompt_log_probs": tensor(floats(tokens)),
        "top_prompt_ids": tensor(ids(tokens * K), tokens, K),
        "top_prompt_log_probs": tensor(floats(tokens * K), tokens, K),
    }


def plain_sample(tensors: Tensors) -> bytes:
    """The same as JSON, in the shape that the wire had before protobuf."""
    numbers = {
        name: array({"F32": "f", "I32": "i", "I64": "q"}[t.dtype], t.data.tobytes()).tolist() for name, t in tensors.items()
    }
    ids, values = numbers["top_prompt_ids"], numbers["top_prompt_log_probs"]
    rows = [[[a, b] for a, b in zip(ids[i : i + K], values[i : i + K], strict=True)] for i in range(0, len(ids), K)]
    sequence = {"stop_reason": "stop", "tokens": numbers["tokens"], "logprobs": numbers["log_probs"]}
    return json.dumps(
        {"sequences": [sequence], "prompt_logprobs": numbers["prompt_log_probs"], "topk_prompt_logprobs": rows}
    ).encode()


def read_sample(raw: bytes) -> None:
    """As the client does: parse, and copy the numbers out of the message."""
    message = messages.read(messages.SampleResponse, raw)
    for part in (message.prompt_logprobs, message.topk_prompt_logprobs.logprobs, *(one.logprobs for one in message.sequences)):
        array("f", part)
    for part in (message.topk_prompt_logprobs.token_ids, *(one.tokens for one in message.sequences)):
        array("i", part)


def step(draw: random.Random, tokens: int) -> Tensors:
    """The answer of a forward_backward of eight datums."""
    cuts = array("q", range(0, 8 * tokens + 1, tokens))
    log_probs = array("f", (log_prob(draw) for _ in range(8 * tokens)))
    return {"log_probs": tensor(log_probs), "cu_seqlens": tensor(cuts)}


def plain_step(tensors: Tensors) -> bytes:
    numbers = array("f", tensors["log_probs"].data.tobytes()).tolist()
    each = len(numbers) // 8
    outputs = [
        {"logprobs": {"data": numbers[i : i + each], "dtype": "float32", "shape": [each]}} for i in range(0, len(numbers), each)
    ]
    return json.dumps({"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": METRICS}).encode()


def read_step(raw: bytes) -> None:
    message = messages.read(messages.ForwardBackwardOutput, raw)
    for record in message.loss_fn_outputs:
        array("f", record.fields["logprobs"].data)


def cpu_s(work: Callable[[], object]) -> float:
    """The best of five."""
    times = []
    for _ in range(5):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


METRICS = {"loss:sum": 12.5}
Kind = tuple[str, Callable[..., Tensors], Callable[[Tensors], bytes], Callable[[Tensors], bytes], Callable[[bytes], None]]
KINDS: list[Kind] = [
    (
        f"samples, with the prompt's log-probs and its top {K}",
        sample,
        lambda tensors: answers.sample({"finish_reasons": ["stop"]}, tensors, None),
        plain_sample,
        read_sample,
    ),
    (
        "forward_backward of 8 datums",
        step,
        lambda tensors: answers.forward_backward({"metrics": METRICS}, tensors),
        plain_step,
        read_step,
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    asked = parser.parse_args()
    compressor, decompressor = zstandard.ZstdCompressor(level=LEVEL), zstandard.ZstdDecompressor()
    for name, make, ours, plain, read in KINDS:
        draw = random.Random(0)
        made = [make(draw, asked.tokens) for _ in range(asked.count)]
        packed, texts = [compressor.compress(ours(each)) for each in made], [plain(each) for each in made]
        size, plain_size = sum(map(len, packed)), sum(map(len, texts))
        ours_s = cpu_s(lambda: [compressor.compress(ours(each)) for each in made])  # noqa: B023
        ours_s += cpu_s(lambda: [read(decompressor.decompress(each)) for each in packed])  # noqa: B023
        plain_s = cpu_s(lambda: [plain(each) for each in made]) + cpu_s(lambda: [json.loads(each) for each in texts])  # noqa: B023
        print(f"{asked.count} answers of {asked.tokens} tokens: {name}")
        print(f"  bytes   protobuf + zstd {size:>10,}   JSON {plain_size:>10,}   {plain_size / size:5.1f} times")
        print(f"  CPU ms  protobuf + zstd {1e3 * ours_s:>10.1f}   JSON {1e3 * plain_s:>10.1f}   {plain_s / ours_s:5.1f} times")


if __name__ == "__main__":
    main()
