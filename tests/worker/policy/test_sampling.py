"""Sampling: reproducible, from the distribution that was asked for, ended where it must end."""

from collections import Counter

import pytest
import torch
from tokenizers import decoders

from service.errors import JobFailed
from service.spec.model import Full, ModelSpec
from workers.policy.score.layout import Sequence
from workers.rollout import local
from workers.rollout.draw import draw, key_of, uniforms
from workers.rollout.engine import Request, SamplingParams

PROMPTS = ["rev 1>", "ab", "rev 123456="]


def sample(policy, prompts=PROMPTS, **kwargs):
    how = {"group_size": 3, "max_tokens": 8, "temperature": 1.0, "seed": 0, **kwargs}
    return policy.sample([policy.text.encode(prompt) for prompt in prompts], **how)


def test_the_same_call_gives_the_same_answers_and_another_seed_gives_others(load):
    policy = load()
    first = sample(policy)
    torch.manual_seed(123)  # the global generator has no say
    assert sample(policy) == first
    assert sample(policy, seed=1) != first
    assert sample(load()) == first


def test_groups_stand_in_the_order_of_the_prompts(load):
    policy = load()
    groups = sample(policy, temperature=0.0)
    alone = [sample(policy, [prompt], temperature=0.0)[0] for prompt in PROMPTS]
    assert [[answer.tokens for answer in group] for group in groups] == [[answer.tokens for answer in group] for group in alone]
    assert len({tuple(group[0].tokens) for group in groups}) == len(PROMPTS), "or the order could not be told"


def test_greedy_answers_are_the_likeliest_tokens_with_the_policys_own_log_probs(load):
    policy = load()
    answer = sample(policy, ["rev 1>"], temperature=0.0, group_size=1)[0][0]
    prompt = policy.text.encode("rev 1>")
    with torch.no_grad():
        logits = policy.base.model(input_ids=torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == answer.tokens
    torch.testing.assert_close(torch.tensor(answer.log_probs), logits.log_softmax(-1).max(-1).values)


def test_an_answer_ends_with_its_first_eos_and_keeps_it(load):
    policy = load()
    eos = policy.text.tokenizer.eos_token_id
    answers = [answer for group in sample(policy, group_size=64, max_tokens=30) for answer in group]
    stopped = [answer for answer in answers if answer.finish_reason == "stop"]
    cut = [answer for answer in answers if answer.finish_reason == "length"]
    assert stopped and cut
    assert all(answer.tokens.index(eos) == len(answer.tokens) - 1 for answer in stopped)
    assert all(len(answer.tokens) == 30 and eos not in answer.tokens for answer in cut)
    assert all(len(answer.log_probs) == len(answer.tokens) for answer in answers)
    assert all("<" not in answer.text.replace("<", "", answer.tokens.count(policy.text.encode("<")[0])) for answer in stopped)


def test_eos_on_the_last_allowed_token_is_a_stop(load):
    policy = load()
    answers = sample(policy, ["a"], group_size=400, max_tokens=1)[0]
    reasons = {answer.tokens == [policy.text.tokenizer.eos_token_id]: answer.finish_reason for answer in answers}
    assert reasons == {True: "stop", False: "length"}


def test_a_stop_text_ends_an_answer_and_stays_in_it(load):
    policy = load()
    plain = sample(policy, ["a"], group_size=16, max_tokens=12)[0]
    text = next(answer.text for answer in plain if answer.finish_reason == "length")
    stop = text[4:6]
    answers = sample(policy, ["a"], group_size=16, max_tokens=12, stop=[stop, "never in it"])[0]
    with_stop = [answer for answer in answers if stop in answer.text]
    assert with_stop
    for answer in with_stop:
        assert answer.finish_reason == "stop"
        assert answer.text.index(stop) == len(answer.text) - len(stop)
    assert all(len(answer.tokens) == 12 for answer in answers if answer.finish_reason == "length")


def test_answers_follow_the_models_distribution(load):
    policy = load()
    prompt = policy.text.encode("rev 1>")
    answers = policy.sample([prompt], group_size=8000, max_tokens=1, temperature=1.0, seed=0)[0]
    counts = Counter(answer.tokens[0] for answer in answers)
    with torch.no_grad():
        probs = policy.base.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    seen = torch.tensor([counts[token] for token in range(len(probs))], dtype=torch.float64)
    chi_square = ((seen - 8000 * probs) ** 2 / (8000 * probs)).sum()
    freedom = len(probs) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_temperature_scales_the_log_probs_that_are_reported(load):
    policy = load()
    groups = sample(policy, temperature=0.5)
    sequences = [Sequence(policy.text.encode(p), a.tokens) for p, group in zip(PROMPTS, groups, strict=True) for a in group]
    scores = policy.score(sequences, temperature=0.5)
    reported = torch.tensor([value for group in groups for answer in group for value in answer.log_probs])
    torch.testing.assert_close(scores.log_probs[scores.mask], reported, atol=1e-4, rtol=0)
    assert not torch.allclose(policy.score(sequences).log_probs[scores.mask], reported, atol=1e-4)


def points(count):
    """A number for each row, as the rows of one prompt would get them."""
    return uniforms([key_of(seed) for seed in range(count)], [0] * count)


LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (SamplingParams(1, top_k=2), [0.5, 0.25]),
        (SamplingParams(1, top_p=0.75), [0.5, 0.25]),
        (SamplingParams(1, top_p=0.76), [0.5, 0.25, 0.15]),
        (SamplingParams(1, top_p=0.01), [0.5]),
        (SamplingParams(1, top_p=1e-320), [0.5]),
        (SamplingParams(1, top_k=3, top_p=0.9), [0.5, 0.25, 0.15]),
        (SamplingParams(1, top_k=9), [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_truncated_distributions_are_renormalised(how, kept):
    order = torch.tensor([3, 0, 2, 1])  # likelihood does not follow the tokens' numbers
    logits = torch.empty(4).index_put((order,), LOGITS).expand(4000, 4)
    tokens, log_probs = draw(logits, how, points(4000))
    whole = sum(kept)
    expected = {int(order[i]): p / whole for i, p in enumerate(kept)}
    assert set(tokens.tolist()) == set(expected)
    for token, probability in expected.items():
        assert abs((tokens == token).float().mean().item() - probability) < 0.04
        torch.testing.assert_close(log_probs[tokens == token].exp().mean().item(), probability, atol=1e-5, rtol=0)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]).expand(2000, 5)
    tokens, log_probs = draw(logits, SamplingParams(1), points(2000))
    assert set(tokens.tolist()) == {1, 3}
    assert torch.isfinite(log_probs).all()


def test_small_batches_give_valid_groups_too(load, monkeypatch):
    policy = load()
    monkeypatch.setattr(local, "MOST_ROWS", 4)  # groups of 6 do not fit into one batch
    groups = sample(policy, group_size=6)
    assert [len(group) for group in groups] == [6, 6, 6]
    sequences = [Sequence(policy.text.encode(p), a.tokens) for p, group in zip(PROMPTS, groups, strict=True) for a in group]
    scores = policy.score(sequences)
    reported = torch.tensor([value for group in groups for answer in group for value in answer.log_probs])
    torch.testing.assert_close(scores.log_probs[scores.mask], reported, atol=1e-4, rtol=0)
    assert len({tuple(sequence.completion) for sequence in sequences}) > 12


@pytest.mark.parametrize(("family", "padded"), [("llama", True), ("lfm2", False)])
def test_a_recurrent_state_never_reads_padding(family, padded, family_folder, load):
    policy = load(ModelSpec(source=str(family_folder(family)), dtype="float32", adapter=Full()))
    masks = []

    def look(layer, arguments, keywords):
        masks.append(keywords["attention_mask"])

    policy.base.model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    groups = sample(policy)
    assert any(mask is not None for mask in masks) is padded
    assert [len(group) for group in groups] == [3, 3, 3]


def test_logits_that_are_not_finite_fail_the_job_by_name(load):
    policy = load()
    with torch.no_grad():
        policy.base.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(JobFailed) as failed:
        sample(policy)
    assert failed.value.code == "non_finite_logits"


def test_an_empty_prompt_is_refused_by_its_number(load):
    with pytest.raises(ValueError, match="request 1 is empty"):
        load().sample([[5], []], group_size=1, max_tokens=2, temperature=1.0, seed=0)


def test_a_stop_text_may_be_a_special_token_that_no_text_shows(load):
    policy = load()
    unknown = policy.text.tokenizer.unk_token_id
    answers = sample(policy, ["a"], group_size=64, max_tokens=12, stop=["<unk>"])[0]
    stopped = [answer for answer in answers if unknown in answer.tokens]
    assert stopped
    assert all(answer.tokens.index(unknown) == len(answer.tokens) - 1 and answer.finish_reason == "stop" for answer in stopped)


def test_a_stop_text_may_hold_a_token_that_no_text_shows_in_its_middle(load):
    policy = load()
    encode, engine = policy.text.encode, policy.base.engine
    tokens = [*encode("xa"), policy.text.tokenizer.unk_token_id, *encode("b")]
    how = SamplingParams(9, stop=("a<unk>b", "never"), stop_ids=tuple(policy.text.stop_ids(["a<unk>b"])))
    drawn = iter([*tokens, *encode("yyyyyyy")])
    engine._draw = lambda rows, logits: (rows[0].tokens.append(next(drawn)), rows[0].log_probs.append(0.0))
    [answer] = engine.run([Request(encode("a"), how, seed=0)])
    assert (answer.tokens, answer.text, answer.finish_reason) == (tokens, "xa<unk>b", "stop")


def by_byte_fallback(row):
    """As Llama's tokenizers do: bytes in a row that are no text together are none at all."""
    return decoders.ByteFallback().decode([f"<0x{byte:02X}>" for byte in row])


@pytest.mark.parametrize("decode", [lambda row: bytes(row).decode(errors="replace"), by_byte_fallback])
@pytest.mark.parametrize("before", ["x", "日本", "x日本", "é日🙂"])
@pytest.mark.parametrize("stop", ["\u0e01" * 10, "。", "🙂。", "é!"])
def test_a_stop_text_of_many_tokens_a_character_is_seen(load, decode, before, stop):
    """One token a byte, and an end of the answer that begins within a character."""
    engine = load().base.engine
    engine._decode = lambda rows: [decode(row) for row in rows]
    row = engine._row(7, Request([1], SamplingParams(100, stop=(stop, "never")), seed=0))
    before *= 20
    row.tokens = list((before + stop[:-1]).encode())
    assert engine._at_stop([row]) == set()
    row.tokens = list((before + stop).encode())
    assert engine._at_stop([row]) == {7}
