"""Every call of the client, and what other servers get wrong."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from click.testing import CliRunner
from sqlalchemy import func, select
from tinker import types
from tinker.cli.__main__ import main_cli as cli

from service.store.session import open_store
from service.store.tables import Operation

TOKENS = [4, 41, 4, 45, 5, 1]
PROMPT = types.ModelInput.from_ints(TOKENS[:4])
ADAM = types.AdamParams(learning_rate=1e-3)
GREEDY = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])


def datum(tokens=TOKENS, **inputs):
    given = {"target_tokens": tokens[1:], **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=given)


def weighted(weight=1.0, tokens=TOKENS):
    return datum(tokens, weights=[weight] * (len(tokens) - 1))


def log_probs(client, one=None):
    output = client.forward([one or weighted()], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


def step(client, *data, loss="cross_entropy", adam=ADAM, **config):
    """One update. Both requests are sent before either is waited for, as the client's manual says."""
    first = client.forward_backward(list(data), loss, loss_fn_config=config or None)
    second = client.optim_step(adam)
    return first.result(), second.result()


# ---------------------------------------------------------------- training


def test_a_model_and_its_tokenizer(untrained):
    info = untrained.get_info()
    assert (info.is_lora, info.lora_rank, info.model_data.model_name) == (True, 8, "tiny")
    tokenizer = untrained.get_tokenizer()
    assert tokenizer.encode("1+1=2") == [4, 41, 4, 45, 5] and tokenizer.decode([4, 41]) == "1+"
    assert tokenizer.eos_token_id == 1


def test_cross_entropy_is_a_sum_and_training_lowers_it(training):
    one = training.forward_backward([weighted()], "cross_entropy").result()
    two = training.forward_backward([weighted(), weighted(2.0)], "cross_entropy").result()
    assert two.metrics["loss:sum"] == pytest.approx(3 * one.metrics["loss:sum"], rel=1e-5)
    assert one.metrics["loss:sum"] == pytest.approx(-one.loss_fn_outputs[0]["logprobs"].to_numpy().sum(), rel=1e-5)
    norms = []
    for _ in range(12):
        training.forward_backward([weighted()], "cross_entropy")
        norms.append(training.optim_step(ADAM).result().metrics["grad_norm"])
    assert min(norms) > 0
    assert -log_probs(training).sum() < 0.8 * one.metrics["loss:sum"]


@pytest.mark.parametrize(
    ("loss", "config", "expected"),
    [
        ("importance_sampling", {}, lambda r, a, lp: -(r * a).sum()),
        ("ppo", {}, lambda r, a, lp: -np.minimum(r * a, r.clip(0.8, 1.2) * a).sum()),
        (
            "ppo",
            {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05},
            lambda r, a, lp: -np.minimum(r * a, r.clip(0.95, 1.05) * a).sum(),
        ),
        ("cispo", {}, lambda r, a, lp: -(r.clip(0.0, 4.0) * lp * a).sum()),
        ("dro", {"beta": 0.5}, lambda r, a, lp: -(lp * a - 0.25 * np.log(r) ** 2).sum()),
    ],
)
def test_losses_of_policy_gradients_are_sums_over_tokens(untrained, loss, config, expected):
    new = log_probs(untrained).astype(np.float64)
    old = new + np.array([0.1, -0.3, 0.0, 0.5, -0.02])
    advantages = np.array([0.0, 1.0, -1.0, 0.5, 2.0])
    one = datum(logprobs=old.astype(np.float32), advantages=advantages.astype(np.float32))
    output = untrained.forward_backward([one], loss, loss_fn_config=config or None).result()
    assert output.metrics["loss:sum"] == pytest.approx(expected(np.exp(new - old), advantages, new), rel=1e-4)
    assert np.allclose(output.loss_fn_outputs[0]["logprobs"].to_numpy(), new, atol=1e-5)


def test_stable_reinforce_is_the_user_s_error_and_names_another(training):
    one = datum(logprobs=[-1.0] * 5, advantages=[1.0] * 5)
    refused, later = training.forward_backward([one], "stable_reinforce"), training.optim_step(ADAM)
    with pytest.raises(tinker.RequestFailedError, match="importance_sampling") as caught:
        refused.result()
    assert caught.value.category == types.RequestErrorCategory.User
    assert "grad_norm" in later.result().metrics  # the client goes on counting


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (weighted(tokens=[4, 5, 900]), "900"),
        (weighted(float("nan")), "finite"),
        (weighted(tokens=[4] * 200), "context"),
        (datum(advantages=[1.0] * 5), "weights|advantages"),
    ],
)
def test_values_that_cannot_be_are_the_user_s_error(untrained, one, message):
    with pytest.raises(tinker.RequestFailedError, match=message) as caught:
        untrained.forward_backward([one], "cross_entropy").result()
    assert caught.value.category == types.RequestErrorCategory.User


@pytest.mark.parametrize(
    ("loss", "given", "named"),
    [
        ("ppo", {"advantages": [1.0] * 5}, "the loss ppo needs the tensor logprobs "),
        ("gspo", {"advantages": [1.0] * 5, "logprobs": [-1.0] * 5}, "the loss gspo needs the tensor sequence_ratio_mask "),
        ("ppo", {"weights": [1.0] * 5, "advantages": [1.0] * 5, "logprobs": [-1.0] * 5}, "it takes logprobs, advantages, seq"),
    ],
)
def test_an_error_of_the_worker_has_the_names_of_the_client_s_tensors(untrained, loss, given, named):
    with pytest.raises(tinker.RequestFailedError, match=named):
        untrained.forward_backward([datum(**given)], loss).result()


def test_targets_of_two_dimensions(untrained):
    targets = np.array([TOKENS[1:], [7] * 5]).T
    weights = np.full((5, 2), 0.5, np.float32)
    wide = datum(target_tokens=targets, weights=weights)
    output = untrained.forward([wide, weighted()], "cross_entropy").result()
    both, plain = (each["logprobs"] for each in output.loss_fn_outputs)
    assert (both.shape, plain.shape) == ([5, 2], [5])
    assert np.allclose(both.to_numpy()[:, 0], plain.to_numpy(), atol=1e-6)
    mostly = torch.zeros(5, 8, dtype=torch.int64)
    mostly[:, 0] = torch.tensor(TOKENS[1:])
    sparse = datum(target_tokens=mostly, weights=(mostly > 0).float())
    assert untrained.forward([sparse], "cross_entropy").result().metrics["loss:sum"] == pytest.approx(
        -plain.to_numpy().sum(), rel=1e-5
    )


def test_many_datums_are_sent_in_chunks_and_counted_once(training):
    many = [weighted(tokens=[4, 5]) for _ in range(2500)]
    whole = training.forward_backward(many, "cross_entropy").result()
    one = training.forward([many[0]], "cross_entropy").result()
    assert len(whole.loss_fn_outputs) == 2500
    assert whole.metrics["loss:sum"] == pytest.approx(2500 * one.metrics["loss:sum"], rel=1e-4)
    assert training.optim_step(ADAM).result().metrics["grad_norm"] > 0


def test_a_custom_loss_has_the_gradient_of_what_it_computes(service, training):
    def twice(data, all_log_probs):
        return sum(-2 * values.sum() for values in all_log_probs), {"mine:sum": 3.0}

    output = training.forward_backward_custom([weighted()], twice).result()
    assert output.metrics["mine:sum"] == 3.0 and output.metrics["loss:sum"] == pytest.approx(
        -2 * log_probs(training).sum(), rel=1e-5
    )
    custom = training.optim_step(ADAM).result().metrics["grad_norm"]
    other = service.create_lora_training_client(base_model="tiny", rank=8, seed=1).result()
    plain = step(other, weighted(2.0))[1].metrics["grad_norm"]
    assert custom == pytest.approx(plain, rel=1e-5)
    assert np.allclose(log_probs(training), log_probs(other), atol=1e-6)


def test_negative_weights_keep_sign_and_size(service):
    """A weight of -0.1 is a tenth of -1 in the same direction, and the loss is not normalised by them."""
    norms, losses = [], []
    for weight in (-1.0, -0.1):
        client = service.create_lora_training_client(base_model="tiny", rank=8, seed=1).result()
        first, second = step(client, weighted(weight))
        losses.append(first.metrics["loss:sum"])
        norms.append(second.metrics["grad_norm"])
    assert losses[0] < 0 and losses[0] == pytest.approx(10 * losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(10 * norms[1], rel=1e-4)


# ---------------------------------------------------------------- weights


def test_saving_loading_and_resuming_with_and_without_the_optimizer(service, training):
    for _ in range(3):
        step(training, weighted())
    path = training.save_state("three", ttl_seconds=3600, user_metadata={"k": "v"}).result().path
    assert path == f"tinker://{training.model_id}/weights/three"
    whole = service.create_training_client_from_state_with_optimizer(path).result()
    fresh = service.create_training_client_from_state(path).result()
    before = log_probs(training)
    assert np.array_equal(log_probs(whole), before) and np.array_equal(log_probs(fresh), before)
    for client in (training, whole, fresh):
        step(client, weighted(tokens=[4, 9, 9, 1]))
    assert np.array_equal(log_probs(whole), log_probs(training))
    assert np.abs(log_probs(fresh) - log_probs(training)).max() > 1e-4
    with pytest.warns(FutureWarning):
        training.load_state(path).result()
    assert np.array_equal(log_probs(training), before)
    with pytest.raises(tinker.RequestFailedError, match="three"):
        training.save_state("three").result()
    assert training.save_state("three", overwrite=True).result().path == path


def test_another_session_s_weight_decay_leaves_ours_alone(service, training):
    before = log_probs(training)
    other = service.create_lora_training_client(base_model="tiny", rank=4, seed=2).result()
    for _ in range(3):
        step(other, weighted(), adam=types.AdamParams(learning_rate=0.1, weight_decay=0.5))
    assert np.array_equal(log_probs(training), before)


def test_weights_info_echoes_what_is_trained(service):
    parts = {"train_mlp": False, "train_attn": True, "train_unembed": False}
    client = service.create_lora_training_client(base_model="tiny", rank=3, **parts).result()
    path = client.save_state("one").result().path
    about = tinker.RestClient().get_weights_info_by_tinker_path(path).result()
    assert (about.base_model, about.is_lora, about.lora_rank) == ("tiny", True, 3)
    assert {name: getattr(about, name) for name in parts} == parts


# ---------------------------------------------------------------- sampling


def test_the_sampler_and_the_trainer_agree(training):
    step(training, weighted())
    sampler = training.save_weights_and_get_sampling_client().result()
    answer = sampler.sample(PROMPT, 3, types.SamplingParams(max_tokens=8, seed=5)).result()
    assert len(answer.sequences) == 3 and len({one.sequence_id for one in answer.sequences}) == 3
    for one in answer.sequences:
        tokens = [*TOKENS[:4], *one.tokens]
        trained = log_probs(training, weighted(tokens=tokens))[3:]
        assert np.abs(np.array(one.logprobs) - trained).max() < 1e-5
        if one.stop_reason == "stop":
            assert one.tokens[-1] == 1  # the end token is part of the answer
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()
    assert scored[0] is None and np.abs(np.array(scored[1:]) - log_probs(training)).max() < 1e-5


def test_a_seed_draws_the_same_again_and_without_one_it_does_not(service):
    sampler = service.create_sampling_client(base_model="tiny").result()
    how = types.SamplingParams(max_tokens=8, seed=3, stop=[])
    first, again = (sampler.sample(PROMPT, 2, how).result() for _ in range(2))
    assert [one.tokens for one in first.sequences] == [one.tokens for one in again.sequences]
    free = types.SamplingParams(max_tokens=8, stop=[])
    drawn = {tuple(sampler.sample(PROMPT, 1, free).result().sequences[0].tokens) for _ in range(4)}
    assert len(drawn) > 1


def test_what_may_be_asked_of_a_prompt_and_an_answer(service):
    sampler = service.create_sampling_client(base_model="tiny").result()
    targets = types.TensorData(data=[7, 41, -1, 4, 45, -1], dtype="int64", shape=[3, 2])
    answer = sampler.sample(
        PROMPT,
        1,
        GREEDY,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs=targets,
    ).result()
    prompt, top = answer.prompt_logprobs, answer.topk_prompt_logprobs
    assert prompt[0] is None and top[0] is None and len(prompt) == len(top) == 4
    assert all(len(place) == 3 for place in top[1:])
    best = answer.sequences[0].topk_logprobs
    assert [place[0][0] for place in best] == answer.sequences[0].tokens  # greedy takes the likeliest
    named = answer.target_prompt_logprobs.to_numpy()
    assert named[0, 1] == pytest.approx(prompt[1], abs=1e-6) and named[1, 1] == pytest.approx(prompt[2], abs=1e-6)
    last = sampler.sample(PROMPT, 1, GREEDY, include_prompt_logprobs=True, prompt_logprobs_last_n=1).result()
    assert last.prompt_logprobs[:3] == [None] * 3 and last.prompt_logprobs[3] == pytest.approx(prompt[3], abs=1e-6)


def test_stops(service):
    sampler = service.create_sampling_client(base_model="tiny").result()
    never = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])).result().sequences[0]
    assert (never.stop_reason, len(never.tokens)) == ("length", 6)
    first = never.tokens[1]
    stopped = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=6, temperature=0.0, stop=[first])).result().sequences[0]
    assert stopped.stop_reason == "stop" and stopped.tokens == never.tokens[: never.tokens.index(first) + 1]


def test_a_snapshot_does_not_drift_and_sampling_changes_no_weight(service, training):
    step(training, weighted())
    saved = training.save_weights_for_sampler("before").result().path
    old = service.create_sampling_client(model_path=saved).result()
    before = old.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()
    for _ in range(3):
        step(training, weighted(tokens=[4, 9, 9, 1]))
    trained = log_probs(training)
    assert old.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result() == before
    assert np.array_equal(log_probs(training), trained)
    assert np.abs(np.array(before[1:]) - trained).max() > 1e-4
    assert old.get_base_model() == "tiny"


def test_a_sample_that_is_cancelled_is_withdrawn(server, service):
    sampler = service.create_sampling_client(base_model="tiny").result()
    store, sampler_id = open_store(server.settings), sampler._sampling_session_id
    logged = select(func.count()).select_from(Operation).where(Operation.lane == sampler_id)

    def count():
        with store.begin(readonly=True) as session:
            return session.scalar(logged)

    def until(wanted):
        deadline = time.monotonic() + 30
        while count() != wanted:
            assert time.monotonic() < deadline, count()
            time.sleep(0.02)

    later = sampler.sample(PROMPT, 1024, types.SamplingParams(max_tokens=100, stop=[]))
    until(1)
    time.sleep(0.5)  # the client knows its number by now
    later.future().cancel()
    until(0)
    store.close()
    assert sampler.sample(PROMPT, 1, GREEDY).result().sequences[0].tokens


def test_a_clone_of_a_sampling_client(service):
    sampler = service.create_sampling_client(base_model="tiny").result()
    clone = pickle.loads(pickle.dumps(sampler))
    assert (
        clone.sample(PROMPT, 1, GREEDY).result().sequences[0].tokens
        == sampler.sample(PROMPT, 1, GREEDY).result().sequences[0].tokens
    )


# ---------------------------------------------------------------- REST and the command


def test_lists_and_changes_of_checkpoints(service, training):
    rest = tinker.RestClient()
    training.save_state("a").result()
    path = training.save_weights_for_sampler("b", ttl_seconds=7200).result().path
    run = rest.get_training_run(training.model_id).result()
    assert run.last_checkpoint is not None and run.last_sampler_checkpoint is not None
    assert run.last_checkpoint.checkpoint_id == "weights/a" and run.last_sampler_checkpoint.tinker_path == path
    assert rest.get_training_run_by_tinker_path(path).result().training_run_id == training.model_id
    assert rest.list_training_runs(limit=1).result().training_runs[0].training_run_id == training.model_id
    assert {one.checkpoint_id for one in rest.list_checkpoints(training.model_id).result().checkpoints} == {
        "weights/a",
        "sampler_weights/b",
    }
    assert len(rest.list_user_checkpoints(limit=2).result().checkpoints) == 2
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    shown = {one.tinker_path: one for one in rest.list_checkpoints(training.model_id).result().checkpoints}[path]
    assert shown.public and shown.expires_at is None
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert [one.checkpoint_id for one in rest.list_checkpoints(training.model_id).result().checkpoints] == ["weights/a"]
    session_id = training.model_id.partition(":")[0]
    assert session_id in rest.list_sessions().result().sessions
    assert training.model_id in rest.get_session(session_id).result().training_run_ids
    assert rest.get_server_capabilities().result().supported_models[0].model_name == "tiny"
    copied = rest.copy_weights(f"tinker://{training.model_id}/weights/a", "default").result()
    assert rest.get_weights_info_by_tinker_path(copied).result().lora_rank == 8


def test_a_checkpoint_that_is_deleted_while_it_is_used(service, training):
    """What was promised goes on; what comes too late is told why; nothing else notices."""
    rest = tinker.RestClient()
    step(training, weighted())
    state, version = training.save_state("state").result().path, training.save_weights_for_sampler("version").result().path
    sampling = service.create_sampling_client(model_path=version).result()
    ask = types.SamplingParams(max_tokens=60, seed=1)
    prompt = types.ModelInput.from_ints(TOKENS)
    drawn = sampling.sample(prompt, 1, ask).result().sequences[0].tokens
    waiting = [sampling.sample(prompt, 1, ask) for _ in range(8)]
    resumed = service.create_training_client_from_state_with_optimizer(state).result()
    for path in (version, state):
        rest.delete_checkpoint_from_tinker_path(path).result()
    ends = [one.exception() or one.result() for one in waiting]  # each is there whole, or not at all
    for end in ends:
        gone = isinstance(end, (tinker.NotFoundError, tinker.RequestFailedError))
        assert ("make another sampling client" in str(end)) if gone else (end.sequences[0].tokens == drawn)
    for late in (
        lambda: sampling.sample(prompt, 1, ask).result(),
        lambda: service.create_sampling_client(model_path=version).result(),
        lambda: service.create_training_client_from_state(state).result(),
        lambda: training.load_state(state).result(),
        lambda: rest.delete_checkpoint_from_tinker_path(state).result(),
    ):
        with pytest.raises((tinker.NotFoundError, tinker.RequestFailedError), match="deleted"):
            late()
    assert np.allclose(log_probs(resumed), log_probs(training))
    step(resumed, weighted())
    step(training, weighted())
    assert np.allclose(log_probs(resumed), log_probs(training))
    assert training.save_state("state").result().path == state  # the name is free


def test_the_command_line(training, tmp_path: Path):
    path = training.save_state("cli").result().path

    def command(*arguments):
        """In this process: a new one takes seconds to import."""
        done = CliRunner().invoke(cli, ["--format", "json", *arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    assert training.model_id in command("run", "list")
    assert training.model_id in command("run", "info", training.model_id)
    assert path in command("checkpoint", "list")
    assert json.loads(command("checkpoint", "info", path))["lora_rank"] == 8
    assert "tiny" in command("model", "list")
    command("checkpoint", "set-ttl", path, "--ttl", "3600")
    command("checkpoint", "download", path, "--output", str(tmp_path))
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    command("checkpoint", "delete", path, "--yes")
    assert path not in command("checkpoint", "list")
