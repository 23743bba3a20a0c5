#!/usr/bin/env bash
# torch 2.13.0 on a CPU: float32 log_softmax and cross_entropy over a vocabulary of 49,152 tokens with a steep distribution.
#
# One would guess that log_softmax(x) and x - logsumexp(x) are the same up to the rounding of float32, with errors of both signs.
# Seen: log_softmax (and cross_entropy, which uses it) is off by 7e-6 to 1.4e-5, and always to the same side for one order of
# the tokens, so that nothing averages out over an answer; x - logsumexp(x) is off by 1e-7 to 3e-7. On the logits of
# SmolLM2-135M the bias was +7e-6 on average. With smaller or flatter distributions both are alike. So two programs that compute
# the same policy's log-probs, one each way, look like two policies at 1e-5.
#
# Seen on 2026-11-28, Python 3.11, x86-64 with AVX-512.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
TOKENS, ROWS = 49_152, 64
zipf = -2 * torch.arange(1, TOKENS + 1).log()  # the likelihood of a token falls with the square of its rank
logits = torch.stack([zipf[torch.randperm(TOKENS)] for _ in range(ROWS)])
target = logits.argmax(-1, keepdim=True)
true = logits.double().log_softmax(-1).gather(-1, target)
ways = {
    "log_softmax": logits.log_softmax(-1).gather(-1, target),
    "cross_entropy": -torch.nn.functional.cross_entropy(logits, target[:, 0], reduction="none")[:, None],
    "x - logsumexp": logits.gather(-1, target) - logits.logsumexp(-1, keepdim=True),
}
mean, spread = {}, {}
for name, found in ways.items():
    error = found.double() - true
    mean[name], spread[name] = error.mean().item(), error.std().item()
    print(f"{name:14} error: mean {mean[name]:+.1e}, spread {spread[name]:.1e}")
assert mean["log_softmax"] == mean["cross_entropy"] and 4e-6 < mean["log_softmax"] < 3e-5, "it changed"
assert spread["log_softmax"] < mean["log_softmax"], "it changed: the errors have both signs"
assert abs(mean["x - logsumexp"]) < 1e-6, "it changed"
PY
