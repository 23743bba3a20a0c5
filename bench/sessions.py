"""Training sessions against the same work in a plain loop of torch and peft, and against the engine called directly.

    python bench/sessions.py [--backend sqlite|postgresql] [--turns 40] [--cases small,large,sample,codec,eight,memory]

The model is a Llama of 2 layers, hidden 128, vocabulary 512, with LoRA of rank 8 on all linear layers; float32, one thread of
torch on both sides. What is compared takes turns in one run, and medians are compared: of the time by the clock, and of the CPU
seconds of every process that takes part (this one, the API, the worker, Redis; not PostgreSQL's).

small   forward_backward and optim_step on 2 x 32 tokens: `two calls` waits for each, `submitted` sends both at once and waits
        for both, `tinker` is the Tinker SDK, which does the latter
large   the same on 64 x 256 tokens
sample  64 answers of 128 tokens, in one operation of the session
codec   64 answers of 128 tokens as the Tinker wire has them (protobuf, zstd) and as JSON: bytes, and CPU to write and read them
eight   8 answers of 64 tokens from each of eight models on one base, by the Tinker SDK: all at once, and one after the other
memory  of the process that holds a base of 8 layers, hidden 512, with one to eight sessions of rank 64 trained
"""

import argparse
import json
import logging
import os
import random
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import tinker
import torch
import zstandard
from loopback import BACKENDS, Stack, cpu_s, machine, started
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ratchet_client.session import Session
from service.losses.numbers import tensor
from service.spec.model import Full, ModelSpec
from service.tinker import answers
from service.tinker.compression import LEVEL
from service.tinker.messages import SampleResponse, read
from workers.policy.base import Base
from workers.rollout.engine import Request, SamplingParams

Row = dict[str, list[int]]
Contender = Callable[[], None]
VOCABULARY, RANK, LEARNING_RATE = 512, 8, 1e-4
SMALL, LARGE, ANSWERS = (2, 32), (64, 256), (64, 128)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=BACKENDS, default="sqlite")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--cases", default="small,large,sample,codec,eight,memory")
    asked = parser.parse_args()
    cases = asked.cases.split(",")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}, {asked.backend}, medians of {asked.turns} turns", flush=True)
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-model-") as folder:
        make_model(Path(folder))
        environment = {"RATCHET_SERVES": "training", "RATCHET_TORCH_THREADS": "1"}
        with started(asked.backend, workers=1, **environment) as stack:
            if "small" in cases:
                steps("2 x 32 tokens", stack, folder, SMALL, asked.turns)
            if "large" in cases:
                steps("64 x 256 tokens", stack, folder, LARGE, max(3, asked.turns // 10))
            if "sample" in cases:
                sampling(stack, folder, max(3, asked.turns // 10))
            if "eight" in cases:
                eight(stack, folder, max(3, asked.turns // 10))
    if "codec" in cases:
        codec(asked.turns)
    if "memory" in cases:
        memory(asked.backend)


def make_model(folder: Path, *, layers: int = 2, hidden: int = 128) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w2")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder
    )


def rows_of(shape: tuple[int, int]) -> list[Row]:
    draw = random.Random(0)
    whole = [[draw.randrange(3, VOCABULARY) for _ in range(shape[1] + 1)] for _ in range(shape[0])]
    return [{"tokens": tokens[:-1], "target_tokens": tokens[1:]} for tokens in whole]


# ---------------------------------------------------------------- steps


def steps(name: str, stack: Stack, folder: str, shape: tuple[int, int], turns: int) -> None:
    rows = rows_of(shape)
    contenders = {"plain loop": plain(folder, rows)}
    with session_of(stack, folder) as session:
        contenders |= {"two calls": two_calls(session, rows), "submitted": submitted(session, rows)}
        with tinker_client(stack, folder) as training:
            contenders["tinker"] = by_tinker(training, rows)
            compare(f"forward_backward and optim_step, {name}", contenders, stack, turns, shape[0] * shape[1])


def plain(folder: str, rows: list[Row]) -> Contender:
    """What one writes without a service: the loss's sum, the log-probs of the targets, clipping, AdamW."""
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> None:
        ids = torch.tensor([row["tokens"] for row in rows])
        targets = torch.tensor([row["target_tokens"] for row in rows])
        log_probs = model(input_ids=ids).logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        (-log_probs).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log_probs.tolist()

    return step


@contextmanager
def session_of(stack: Stack, folder: str, rank: int = RANK) -> Iterator[Session]:
    adapter = {"kind": "lora", "rank": rank, "target_modules": "all-linear"}
    with stack.ratchet.session(model={"source": folder, "adapter": adapter}) as session:
        yield session
        session.finish()


def two_calls(session: Session, rows: list[Row]) -> Contender:
    def step() -> None:
        session.forward_backward(rows)
        session.optim_step({"learning_rate": LEARNING_RATE})

    return step


def submitted(session: Session, rows: list[Row]) -> Contender:
    def step() -> None:
        passed = session.submit.forward_backward(rows)
        stepped = session.submit.optim_step({"learning_rate": LEARNING_RATE})
        stepped.result()
        passed.result()

    return step


@contextmanager
def tinker_client(stack: Stack, folder: str) -> Iterator[tinker.TrainingClient]:
    service = tinker.ServiceClient(base_url=stack.url, api_key=stack.key)
    yield service.create_lora_training_client(base_model=folder, rank=RANK, seed=1).result()
    service.close("success").result()


def by_tinker(training: tinker.TrainingClient, rows: list[Row]) -> Contender:
    def step() -> None:
        data = [
            tinker.types.Datum(
                model_input=tinker.types.ModelInput.from_ints(row["tokens"]),
                loss_fn_inputs={"target_tokens": row["target_tokens"], "weights": [1.0] * len(row["tokens"])},  # pyright: ignore[reportArgumentType]
            )
            for row in rows
        ]
        passed = training.forward_backward(data, "cross_entropy")
        stepped = training.optim_step(tinker.types.AdamParams(learning_rate=LEARNING_RATE))
        passed.result()
        stepped.result()

    return step


# ---------------------------------------------------------------- sampling


def sampling(stack: Stack, folder: str, turns: int) -> None:
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(16)] for _ in range(ANSWERS[0])]
    base = Base.load(ModelSpec(source=folder, dtype="float32", adapter=Full()), device="cpu", threads=1)
    how = SamplingParams(ANSWERS[1], ends=False)

    def engine() -> None:
        base.engine.run([Request(prompt, how, row) for row, prompt in enumerate(prompts)])

    with session_of(stack, folder) as session:

        def sample() -> None:
            session.sample(prompts=prompts, max_tokens=ANSWERS[1], ends=False)

        contenders = {"engine directly": engine, "session.sample": sample}
        compare("sampling 64 answers of 128 tokens", contenders, stack, turns, ANSWERS[0] * ANSWERS[1])


def eight(stack: Stack, folder: str, turns: int) -> None:
    service = tinker.ServiceClient(base_url=stack.url, api_key=stack.key)
    models = [service.create_lora_training_client(base_model=folder, rank=RANK, seed=seed).result() for seed in range(8)]
    clients = [model.save_weights_and_get_sampling_client().result() for model in models]
    prompt = tinker.types.ModelInput.from_ints([5, 6, 7, 8])
    how = tinker.types.SamplingParams(max_tokens=64, stop=[])

    def in_turn() -> None:
        for client in clients:
            client.sample(prompt, 8, how).result()

    def at_once() -> None:
        for asked in [client.sample(prompt, 8, how) for client in clients]:
            asked.result()

    contenders = {"in turn": in_turn, "at once": at_once}
    compare("sampling 8 answers of 64 tokens from each of 8 adapters", contenders, stack, turns, 8 * 8 * 64)
    service.close("success").result()


def codec(turns: int) -> None:
    """The same answers, written and read again."""
    draw, (count, length) = random.Random(0), ANSWERS
    tokens = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]
    log_probs = torch.randn(count * length).abs().neg()
    flat = array("i", [token for row in tokens for token in row])
    cuts = array("q", range(0, count * length + 1, length))
    head = {"finish_reasons": ["length"] * count}
    tensors = {"tokens": tensor(flat), "cu_seqlens": tensor(cuts), "log_probs": tensor(array("f", log_probs.tolist()))}
    rows = log_probs.view(count, length).tolist()

    def protobuf() -> bytes:
        sent = zstandard.compress(answers.sample(head, tensors, None), LEVEL)
        read(SampleResponse, zstandard.decompress(sent))
        return sent

    def plain_json() -> bytes:
        sequences = [{"tokens": row, "logprobs": of, "stop_reason": "length"} for row, of in zip(tokens, rows, strict=True)]
        sent = json.dumps({"sequences": sequences}).encode()
        json.loads(sent)
        return sent

    print(f"\n64 answers of 128 tokens, written and read\n{'':18}{'bytes':>10}{'CPU ms':>10}")
    for name, once in {"json": plain_json, "protobuf, zstd": protobuf}.items():
        size, began = len(once()), time.process_time()
        for _ in range(turns):
            once()
        print(f"{name:18}{size:10}{(time.process_time() - began) / turns * 1e3:10.2f}", flush=True)


# ---------------------------------------------------------------- memory


def memory(backend: str) -> None:
    """What one session after another adds, all of them with gradients taken and a step made, beside the bytes it must hold."""
    rank, environment = 64, {"RATCHET_SERVES": "training", "RATCHET_TORCH_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-model-") as folder, ExitStack() as opened:
        make_model(Path(folder), layers=8, hidden=512)
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        base = sum(weight.nbytes for weight in model.parameters())
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
        adapter = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
        del model
        print(f"\nmemory: base {base / 1e6:.0f} MB; each adapter {adapter / 1e6:.1f} MB, its AdamW moments twice that")
        print(f"{'sessions':18}{'bytes MB':>10}{'PSS MB':>10}{'RSS MB':>10}{'peak MB':>10}{'added MB':>10}")
        stack = opened.enter_context(started(backend, workers=1, **environment))
        sessions, before = list[Session](), 0.0
        for count in range(1, 9):
            sessions.append(opened.enter_context(session_of(stack, folder, rank)))
            for session in sessions * 2:
                two_calls(session, rows_of(SMALL))()
            holder = max(descendants(stack.processes["worker"]), key=lambda pid: kept_mb(pid, "smaps_rollup", "Pss"))
            pss, rss = (kept_mb(holder, "smaps_rollup", which) for which in ("Pss", "Rss"))
            sizes = ((base + 3 * count * adapter) / 1e6, pss, rss, kept_mb(holder, "status", "VmHWM"), pss - before)
            print(f"{count:<18}" + "".join(f"{size:10.0f}" for size in sizes), flush=True)
            before = pss


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(below for child in children for below in descendants(child))]


def kept_mb(pid: int, file: str, which: str) -> float:
    """A line of /proc/PID/`file` that is given in KiB, in MB."""
    return int(Path(f"/proc/{pid}/{file}").read_text().partition(f"\n{which}:")[2].split()[0]) * 1024 / 1e6


# ---------------------------------------------------------------- measuring


def compare(title: str, contenders: dict[str, Contender], stack: Stack, turns: int, tokens: int) -> None:
    """A table of medians; the first contender is what the others are compared to."""
    wall, cpu = ({one: list[float]() for one in contenders} for _ in range(2))
    for turn in range(turns + 2):
        for one in random.sample(list(contenders), len(contenders)):
            theirs, own, began = stack_cpu_s(stack), time.process_time(), time.perf_counter()
            contenders[one]()
            took, own = time.perf_counter() - began, time.process_time() - own
            if turn > 1:  # the first two warm up
                wall[one].append(took)
                cpu[one].append(own + stack_cpu_s(stack) - theirs)
    print(f"\n{title}\n{'':18}{'wall ms':>10}{'tokens/s':>11}{'ratio':>8}{'CPU ms':>10}{'ratio':>8}")
    first = next(iter(contenders))
    for one in contenders:
        each, its_cpu = median(wall[one]), sum(cpu[one]) / turns  # /proc counts in steps of 10 ms: means, not medians
        ratio, cpu_ratio = each / median(wall[first]), its_cpu / (sum(cpu[first]) / turns)
        print(f"{one:18}{each * 1e3:10.1f}{tokens / each:11.0f}{ratio:8.2f}{its_cpu * 1e3:10.1f}{cpu_ratio:8.2f}", flush=True)


def stack_cpu_s(stack: Stack) -> float:
    return sum(map(cpu_s, stack.processes.values()))


if __name__ == "__main__":
    main()
