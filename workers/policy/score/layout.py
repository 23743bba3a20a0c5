"""How sequences become padded tensors, and how many of them go through the model at once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

CPU_ACTIVATION_BYTES = 2 * 2**30  # a constant, not the free memory, so that every run splits alike
GPU_ACTIVATION_SHARE = 0.25  # of the card's total memory, for the same reason
ROUND_TO = 256
LARGEST = {"cpu": 4096, "cuda": 65_536}  # more is not faster, and on a CPU it overflows the caches


class Sequence(NamedTuple):
    """A prompt and the answer to it, as token ids."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Padded:
    """Sequences as one tensor, padded on the right. Causal attention never sees the padding, so no mask is needed.

    The logits at flat position `positions_N[n]` of [B x L] predict `targets_N[n]`, which is token `steps_N[n]` of the
    answer in row `rows_N[n]`.
    """

    input_ids_B_L: Tensor
    positions_N: Tensor
    targets_N: Tensor
    rows_N: Tensor
    steps_N: Tensor


def pad(sequences: list[Sequence], pad_id: int, device: torch.device) -> Padded:
    """Pad the sequences. The last token of an answer is predicted but never read, so it is not in the input."""
    length = max(len(prompt) + max(len(completion), 1) - 1 for prompt, completion in sequences)
    input_ids, positions, targets, rows, steps = [], [], [], [], []
    for row, (prompt, completion) in enumerate(sequences):
        if not prompt:
            raise ValueError(f"sequence {row} has an empty prompt; its answer's first token would have nothing before it")
        read = prompt + completion[:-1]
        input_ids.append(read + [pad_id] * (length - len(read)))
        start = row * length + len(prompt) - 1
        positions.extend(range(start, start + len(completion)))
        targets.extend(completion)
        rows.extend([row] * len(completion))
        steps.extend(range(len(completion)))
    flat = [torch.tensor(values, dtype=torch.long, device=device) for values in (positions, targets, rows, steps)]
    return Padded(torch.tensor(input_ids, dtype=torch.long, device=device), *flat)


def response_mask(sequences: list[Sequence], device: torch.device) -> Tensor:
    """[B, T] bool: True on the tokens of the answers, T the longest of them."""
    lengths = torch.tensor([len(sequence.completion) for sequence in sequences], dtype=torch.long, device=device)
    longest = max((len(sequence.completion) for sequence in sequences), default=0)
    return torch.arange(longest, device=device) < lengths.unsqueeze(-1)


@dataclass(frozen=True)
class Items:
    """B items, one after the other: N tokens, and at each of them what the model is asked about the token that follows.

    Unlike the answers of `Sequence`, the targets need not be the item's own next tokens.
    """

    tokens_N: Tensor
    targets_N: Tensor  # [N], or [N, K]: several targets at each place
    starts: list[int]  # [B + 1] where each item begins, and the end

    def asked(self, targets_N: Tensor) -> "Items":
        """The same tokens with other targets."""
        return replace(self, targets_N=targets_N)

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.starts)]

    def row_of_token(self, device: torch.device) -> Tensor:
        """[N] the number of each token's item."""
        return torch.arange(len(self.starts) - 1, device=device).repeat_interleave(torch.tensor(self.lengths, device=device))

    def padded(self, rows: list[int], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """Some items as one tensor, padded on the right: the input [b, L], the flat places in it that are no padding [n], and
        where in the N tokens these stand [n]."""
        lengths = self.lengths
        longest, device = max(lengths[row] for row in rows), self.tokens_N.device
        input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long, device=device)
        positions = torch.cat([torch.arange(lengths[row], device=device) + i * longest for i, row in enumerate(rows)])
        places = torch.cat([torch.arange(self.starts[row], self.starts[row + 1], device=device) for row in rows])
        input_ids.view(-1)[positions] = self.tokens_N[places]
        return input_ids, positions, places


def microbatches(sequences: list[Sequence], tokens: int) -> Iterator[list[int]]:
    """Batches of rows of similar length, each at most `tokens` tokens with padding, but at least one row."""
    return batches_of([len(prompt) + len(completion) for prompt, completion in sequences], tokens)


def batches_of(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """The same for rows of these lengths."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def auto_microbatch_tokens(model: nn.Module, device: torch.device) -> int:
    """Tokens that fit into one forward and backward pass, estimated from the model's shape. A rough upper estimate."""
    config = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    itemsize = next(model.parameters()).element_size()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    per_layer = (18 * width + 5 * inner) * itemsize  # what autograd keeps, measured on Llama's block with sdpa
    per_token = config.num_hidden_layers * per_layer + 3 * 4 * config.vocab_size  # and the float32 logits
    if device.type == "cuda":
        budget = GPU_ACTIVATION_SHARE * torch.cuda.get_device_properties(device).total_memory
    else:
        budget = CPU_ACTIVATION_BYTES
    largest = LARGEST.get(device.type, LARGEST["cpu"])
    return max(ROUND_TO, min(largest, int(budget / per_token) // ROUND_TO * ROUND_TO))
