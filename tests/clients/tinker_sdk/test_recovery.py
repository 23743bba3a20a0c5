"""A loop of reinforcement learning by the real client, whose worker is killed, ends as the undisturbed one does."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tinker
import torch
from clients.conftest import Whole
from safetensors.torch import load_file
from sqlalchemy import select
from tinker import types

from service.store.session import open_store
from service.store.tables import Checkpoint, Job, TinkerModel

PROMPTS = [[4, 41, 4, 45], [4, 9, 12]]
FREE = types.SamplingParams(max_tokens=6, stop=[])  # no seed
ROUNDS = 3


@dataclass
class Ran:
    drawn: list[Any] = field(default_factory=list)  # tokens and log-probs of each answer
    metrics: list[Any] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def recipe(server: Whole, disturb: Callable[[int, str], None]) -> Ran:
    """Samples, advantages, a gradient, a step, new weights for the sampler. `disturb` is called while answers are awaited."""
    ran, service = Ran(), tinker.ServiceClient()
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    reference = service.create_sampling_client(base_model="tiny").result()
    for number in range(ROUNDS):
        answers = sample(training.save_weights_and_get_sampling_client().result())
        ran.drawn += told(answers)
        data = [
            datum(prompt, one) for prompt, answer in zip(PROMPTS, answers, strict=True) for one in answer.result().sequences
        ]
        pair = training.forward_backward(data, "importance_sampling"), training.optim_step(types.AdamParams(learning_rate=1e-2))
        beside = sample(reference)
        disturb(number, training.model_id)
        ran.metrics += [pair[0].result().metrics, pair[1].result().metrics]
        ran.drawn += told(beside)
    path = training.save_weights_for_sampler("end").result().path
    ran.drawn += told(sample(service.create_sampling_client(model_path=path).result()))
    training.save_state("end").result()
    ran.weights = weights(server, training.model_id)
    service.close("success").result()
    return ran


def sample(client: tinker.SamplingClient) -> list[Any]:
    return [client.sample(types.ModelInput.from_ints(prompt), 4, FREE) for prompt in PROMPTS]


def told(answers: list[Any]) -> list[Any]:
    return [(one.tokens, one.logprobs) for answer in answers for one in answer.result().sequences]


def datum(prompt: list[int], answer: Any) -> types.Datum:
    tokens, before = [*prompt, *answer.tokens], len(prompt) - 1
    advantage = sum(answer.tokens) / len(answer.tokens) / 50 - 0.5
    inputs = {
        "target_tokens": tokens[1:],
        "logprobs": [0.0] * before + list(answer.logprobs),
        "advantages": [0.0] * before + [advantage] * len(answer.tokens),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def weights(server: Whole, model_id: str) -> dict[str, torch.Tensor]:
    """Of the checkpoint `end`, with the optimizer's state."""
    store = open_store(server.settings)
    with store.begin(readonly=True) as session:
        query = select(Checkpoint.path).join(TinkerModel, TinkerModel.job_id == Checkpoint.job_id)
        path = session.scalar(
            query.where(TinkerModel.id == model_id, Checkpoint.name == "end", Checkpoint.purpose == "training")
        )
        assert path is not None
        folder = store.blobs.path(path)
    store.close()
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def test_a_killed_loop_draws_learns_and_ends_as_the_undisturbed_one(server: Whole) -> None:
    store, killed = open_store(server.settings), list[int]()

    def kill(number: int, model_id: str) -> None:
        """While a gradient, a step and samples are on their way."""
        if number != 1:
            return
        with store.begin(readonly=True) as session:
            job = session.scalar(select(Job).join(TinkerModel, TinkerModel.job_id == Job.id).where(TinkerModel.id == model_id))
            assert job is not None and job.resolved is not None
        killed.append(job.resolved["process"]["pid"])
        os.kill(killed[-1], signal.SIGKILL)

    disturbed = recipe(server, kill)
    quiet = recipe(server, lambda *_: None)
    store.close()
    assert len(killed) == 1
    assert disturbed.drawn == quiet.drawn
    assert disturbed.metrics == quiet.metrics
    assert disturbed.weights.keys() == quiet.weights.keys() and quiet.weights
    assert all(torch.equal(value, quiet.weights[name]) for name, value in disturbed.weights.items())
    assert len({str(tokens) for tokens, _ in quiet.drawn}) > len(quiet.drawn) / 2  # each request draws for itself


def test_a_run_of_another_seed_draws_other_tokens(service: tinker.ServiceClient) -> None:
    """Of the same weights: an adapter begins with none of its own."""

    def drawn(seed: int) -> list[Any]:
        training = service.create_lora_training_client(base_model="tiny", rank=4, seed=seed).result()
        return told(sample(training.save_weights_and_get_sampling_client().result()))

    assert drawn(7) != drawn(8)
