"""GSPO on six digits to reverse, with the loop in your hands. With `ratchet up` running: python examples/session_gspo.py

The model is random at first. A supervised warm-up teaches it the task until a fifth of its sampled answers are right; then
GSPO goes on with a reward that is only right or wrong. Held-out prompts are never trained on.
"""

import random
from math import cos, pi

from ratchet_client import Ratchet

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz \n+-*/=<>().,:;?!'"  # of the tiny model: one is one token, from 3 on
END = 1
drawn = random.Random(0).sample([f"{number:06d}" for number in range(10**6)], 10_000)
train, held_out = drawn[:-512], drawn[-512:]


def row(digits):
    """A prompt and its answer for cross_entropy: what is read, what comes next, and how much that counts."""
    tokens = [CHARACTERS.index(sign) + 3 for sign in f"rev {digits}>{digits[::-1]}"] + [END]
    return {"tokens": tokens[:-1], "target_tokens": tokens[1:], "weights": [0] * 10 + [1 / (7 * 64)] * 7}


def sampled(batch, **how):
    """Groups of answers, each with its reward, and the mean reward."""
    groups, right = session.sample([f"rev {digits}>" for digits in batch], max_tokens=8, **how), []
    for digits, group in zip(batch, groups, strict=True):
        for answer in group.answers:
            answer.reward = float(answer.text == digits[::-1])
            right.append(answer.reward)
    return groups, sum(right) / len(right)


with Ratchet() as ratchet, ratchet.session(model={"source": "tiny"}, name="reverse digits") as session:
    for step in range(300):
        session.submit.forward_backward([row(digits) for digits in random.sample(train, 64)])
        session.optim_step({"learning_rate": 2e-3 * min(1, (step + 1) / 20), "betas": (0.9, 0.98)})
        if step % 5 == 4 and sampled(train[:128])[1] >= 0.2:
            break
    print(f"after {step + 1} supervised steps, held out, greedy: {sampled(held_out, temperature=0)[1]:.3f}")

    for step in range(80):
        groups, reward = sampled(random.sample(train, 32), num_samples=8)
        learning_rate = 7e-4 * min(1, (step + 1) / 20, 0.1 + 0.45 * (1 + cos(pi * step / 80)))
        session.train_step(
            groups,
            objective={"preset": "gspo", "surrogate": {"clip_low": 0.1, "clip_high": 0.1}},
            optimizer={"learning_rate": learning_rate, "betas": (0.9, 0.95)},
            minibatches=4,
        )
        print(f"step {step + 1}: reward {reward:.3f}")
    print(f"held out, greedy: {sampled(held_out, temperature=0)[1]:.3f}")
    print(f"kept as {session.finish()}")
