"""Your own training loop, with Ratchet's loss: a tiny Llama learns to repeat the digit that it is shown.

    python examples/loss_client/train.py              # loss and gradient from the running `ratchet up`
    python examples/loss_client/train.py --local      # the same objective in this process
    python examples/loss_client/train.py --compare    # both, from one seed: are the weights the same?

The model, the sampling, the reward and the optimizer are this file's.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

DIGITS, START, STOP = 10, 10, 11  # the vocabulary: ten digits and two marks
PROMPTS, GROUP_SIZE, LONGEST = 16, 8, 6  # a rollout: so many prompts, answers to each, tokens in an answer
UPDATES = 2  # optimizer steps on each rollout; from the second on the ratio is no longer 1
OBJECTIVE = {
    "preset": "gspo",
    "surrogate": {"clip_low": 0.05, "clip_high": 0.05},
}  # a tiny model moves by more than a large one

LossFunction = Callable[..., Tensor]


def remote_loss(log_probs: Tensor, **batch: Tensor) -> Tensor:
    """Over HTTP: no other line of this file knows of Ratchet."""
    from ratchet_client.torch import ratchet_loss

    return ratchet_loss(log_probs, objective=OBJECTIVE, **batch)


def local_loss(log_probs: Tensor, *, rewards: Tensor, group_ids: Tensor, response_mask: Tensor, **known: Tensor) -> Tensor:
    """What a loss worker does with such a batch."""
    from service.spec.objective import ObjectiveSpec
    from workers.objectives import Objective

    objective = Objective(ObjectiveSpec.model_validate(OBJECTIVE).resolve())
    advantages = objective.advantages(rewards, group_ids, lengths=response_mask.sum(dim=1))
    mask = objective.select(response_mask, rewards=rewards, group_ids=group_ids)
    step = objective.prepare(response_mask=mask, advantages=advantages, group_ids=group_ids, **known)
    loss, _ = objective.loss(log_probs, step.rows())
    return loss


# ---------------------------------------------------------------- the user's own


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, max_position_embeddings=16, **size))


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Answers [B, T] to prompts [B, 2], and the mask of their tokens: all up to the first STOP, that one too."""
    tokens = prompts
    for _ in range(LONGEST):
        probs = model(tokens).logits[:, -1].softmax(dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)], dim=1)
    answers = tokens[:, prompts.shape[1] :]
    stopped_before = (answers == STOP).cumsum(dim=1) - (answers == STOP).long()
    return answers, stopped_before == 0


def score(model: LlamaForCausalLM, prompts: Tensor, answers: Tensor) -> Tensor:
    """Log-probs of the answers' tokens. [B, T]"""
    logits = model(torch.cat([prompts, answers], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
    return logits.log_softmax(dim=-1).gather(2, answers.unsqueeze(2)).squeeze(2)


def reward(digits: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
    """The share of LONGEST tokens that are the digit: an answer that stops early earns less. [B]"""
    return ((answers == digits.unsqueeze(1)) & mask).sum(dim=1) / LONGEST


def train(loss_function: LossFunction, steps: int, seed: int) -> dict[str, Tensor]:
    """The weights after so many rollouts. Every draw comes from the seed."""
    model = make_model(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    group_ids = torch.arange(PROMPTS).repeat_interleave(GROUP_SIZE)
    for step in range(1, steps + 1):
        digits = torch.randint(DIGITS, (PROMPTS,), generator=generator).repeat_interleave(GROUP_SIZE)
        prompts = torch.stack([torch.full_like(digits, START), digits], dim=1)
        answers, mask = sample(model, prompts, generator)
        rewards = reward(digits, answers, mask)
        with torch.no_grad():
            old_log_probs = score(model, prompts, answers)
        for _ in range(UPDATES):
            loss = loss_function(
                score(model, prompts, answers),
                old_log_probs=old_log_probs,
                rewards=rewards,
                group_ids=group_ids,
                response_mask=mask,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"step {step:3}  reward {rewards.mean():.3f}  loss {loss.item():+.5f}", flush=True)
    return model.state_dict()


def compare(steps: int, seed: int) -> None:
    """Train by both ways; the exit status says whether every weight came out the same."""
    ways: dict[str, Any] = {}
    for name, loss_function in (("over HTTP", remote_loss), ("in this process", local_loss)):
        print(name)
        ways[name] = train(loss_function, steps, seed)
    remote, local = ways.values()
    furthest = max(float((remote[name] - local[name]).abs().max()) for name in local)
    if furthest:
        sys.exit(f"the weights differ by up to {furthest:.3g}")
    print(f"all {sum(weights.numel() for weights in local.values())} weights are the same, bit for bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--local", action="store_true", help="compute the loss in this process")
    how.add_argument("--compare", action="store_true", help="train both ways and compare the weights")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest with one
    if options.compare:
        compare(options.steps, options.seed)
        return
    started_at = time.monotonic()
    train(local_loss if options.local else remote_loss, options.steps, options.seed)
    print(f"{time.monotonic() - started_at:.1f} s")


if __name__ == "__main__":
    main()
