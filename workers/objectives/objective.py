"""An objective: the seven axes put together.

    objective = Objective(axes)                                  # axes: what the job spec's objective resolved to

    # once a rollout, over all its samples [B]
    rewards = objective.with_kl(rewards, old_log_probs=..., ref_log_probs=..., response_mask=...)      # kl in the reward
    advantages = objective.advantages(rewards, group_ids, lengths=..., valid=...)
    mask = objective.select(response_mask, rewards=rewards, group_ids=group_ids, truncated=..., valid=...)

    # once an optimizer step, over all rows of its minibatch
    step = objective.prepare(response_mask=mask, advantages=advantages, old_log_probs=..., group_ids=..., longest=...)

    # once a micro-batch, for the rows in it; the losses and gradients of all micro-batches add up to the step's
    loss, outputs = objective.loss(log_probs, **step.rows(rows))
    loss.backward()
    metrics = metrics + outputs.metrics                          # begin with step.metrics; metrics.finish() at the end

`prepare` is where everything is computed that looks at more than one row: aggregation weights, correction weights and
their normalisation, tokens picked by covariance. `loss` looks at each row alone. Tensors that the axes do not need may be
None; those that are given are measured all the same.

Shapes: B sequences, T tokens; masks may be of any type; what stands behind a mask may be anything, NaN too. Computed in
float32 or better. Inside, a quantity that is constant over a sequence stays [B, 1] and is broadcast.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.objectives import advantage, aggregate, correct, kl, select
from workers.objectives.metrics import Metrics, Reductions
from workers.objectives.moved import Moved, needed
from workers.objectives.outputs import LossOutputs
from workers.objectives.ratio import RATIOS, Answers, chunks
from workers.objectives.surrogate import PICKS, SURROGATES, Terms
from workers.objectives.tensors import bounded_exp, by_column, cleared, neutral, ones_of, tokens_of


@dataclass(frozen=True)
class Step:
    """Everything of one optimizer step that does not depend on the policy being trained; tensors [B, ...] or None."""

    tensors: dict[str, Tensor | None]
    metrics: Metrics

    def rows(self, rows_b: Tensor | slice | None = None) -> dict[str, Any]:
        """The keyword arguments of `Objective.loss` for some rows, or for all of them."""
        if rows_b is None:
            return dict(self.tensors)
        return {name: None if tensor is None else tensor[rows_b] for name, tensor in self.tensors.items()}


class Objective:
    """One choice on each axis. Stateless; the mathematics is in the axis modules."""

    def __init__(self, axes: Mapping[str, Any]) -> None:
        self.ratio = RATIOS[axes["ratio"]["kind"]]
        self.chunk: int | None = axes["ratio"].get("chunk")
        self.anchor: str = f"{axes['anchor']}_log_probs"
        self.surrogate_kind: str = axes["surrogate"]["kind"]
        self.surrogate = SURROGATES[self.surrogate_kind]
        self.surrogate_parameters = {name: value for name, value in axes["surrogate"].items() if name != "kind"}
        self.aggregate_axis = dict(axes["aggregate"])
        self.advantage_axis = dict(axes["advantage"])
        self.kl_axis = dict(axes["kl"])
        self.kl_reference = f"{axes['kl']['reference']}_log_probs"
        self.correct_axis = dict(axes["correct"])
        self.select_axis = dict(axes["select"])

    # ------------------------------------------------------------ once a rollout

    @torch.no_grad()
    def with_kl(
        self,
        rewards_B: Tensor,
        *,
        old_log_probs: Tensor,
        response_mask: Tensor,
        ref_log_probs: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
    ) -> Tensor:
        """The rewards [B] less coef times the answer's KL, where the KL is placed in the reward; else as they are."""
        if self.kl_axis["place"] != "reward" or not self.kl_axis["coef"]:
            return rewards_B
        reference = needed({"ref_log_probs": ref_log_probs, "rollout_log_probs": rollout_log_probs}, self.kl_reference)
        x = neutral(old_log_probs.double() - reference.double(), response_mask.bool())
        return rewards_B - kl.in_reward(x, estimator=self.kl_axis["estimator"], coef=self.kl_axis["coef"]).to(rewards_B.dtype)

    def advantages(
        self,
        rewards: Tensor,
        group_ids_B: Tensor,
        *,
        lengths: Tensor | None = None,
        valid: Tensor | None = None,
        reward_weights: Tensor | None = None,
    ) -> Tensor:
        """Advantages [B] from rewards [B], or [B, R] with weights [R]. Rows that are not valid enter no statistic and get 0."""
        return advantage.advantages(
            rewards, group_ids_B, lengths_B=lengths, valid_B=valid, reward_weights_R=reward_weights, **self.advantage_axis
        )

    def group_metrics(self, rewards: Tensor, group_ids_B: Tensor, valid: Tensor | None = None) -> Metrics:
        """How many groups there are, and how many of them teach nothing because all their rewards are equal.

        A group is counted at its first valid row, so the metrics can be split by items whose group ids differ.
        """
        metrics = Metrics()
        flat_B, groups_B = advantage.zero_variance_groups(rewards, group_ids_B, valid)
        metrics.add("sum", "batch/groups", groups_B)
        metrics.add("sum", "batch/zero_variance_groups", flat_B)
        return metrics

    def select(
        self,
        response_mask: Tensor,
        *,
        rewards: Tensor | None = None,
        group_ids: Tensor | None = None,
        truncated: Tensor | None = None,
        valid: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> Tensor:
        """The mask [B, T] of what is learned from: without invalid rows, and without what the select axis leaves out."""
        mask = response_mask.bool()
        if valid is not None:
            mask = mask & valid.bool().unsqueeze(1)
        without_spread = None
        if rewards is not None and group_ids is not None:
            mask = mask & by_column(rewards).isfinite().all(dim=1, keepdim=True)
            without_spread = advantage.without_spread(rewards, group_ids, valid)
        return select.select(mask, select.Facts(truncated, without_spread, entropy), **self.select_axis)

    # ------------------------------------------------------------ once an optimizer step

    @torch.no_grad()
    def prepare(
        self,
        *,
        response_mask: Tensor,
        advantages: Tensor,
        old_log_probs: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        segment_ids: Tensor | None = None,
        group_ids: Tensor | None = None,
        selected: Tensor | None = None,
        entropy: Tensor | None = None,
        longest: float | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> Step:
        """What `loss` needs beside the log-probs, computed over all rows of an optimizer step.

        `selected` [B, T] may take single tokens out of the loss that still belong to their sequence's ratio; default: none.
        `dtype` of weights: default that of the log-probs given here; float32 at least. With surrogate clip_cov or kl_cov tokens
        are picked here, by `seed` and by the old log-probs (those of the policy that is trained are not known yet; at the
        first update after a rollout they are the same).
        """
        mask, metrics = response_mask.bool(), Metrics()
        given = {"old_log_probs": old_log_probs, "rollout_log_probs": rollout_log_probs, "ref_log_probs": ref_log_probs}
        if dtype is None:
            dtype = next((values for values in given.values() if values is not None), advantages).dtype
        dtype = torch.promote_types(dtype, torch.float32)
        ones = ones_of(mask, dtype)
        counted = ones if selected is None else ones_of(mask & selected.bool(), dtype)
        lengths_B = tokens_of(ones).to(dtype)
        counts_B = lengths_B if selected is None else tokens_of(counted).to(dtype)
        weights = aggregate.weights(counted, group_ids_B=group_ids, longest=longest, dtype=dtype, **self.aggregate_axis)
        advantages = self._of_counted(advantages, dtype, counted, counts_B)
        metrics.add("sum", "batch/masked_rows", lengths_B == 0)
        tensors: dict[str, Tensor | None] = {
            **given,
            "advantages": advantages,
            "response_mask": mask,
            "ones": ones,
            "weights": weights,
            "lengths": lengths_B.clamp(min=1),
            "counts": counts_B,
            "row_weights": weights.sum(dim=1),
            "segment_ids": segment_ids,
            "entropy": entropy,
            "correction": self._correction(given, mask, segment_ids, weights, metrics),
            "picked": self._picked(old_log_probs, advantages, weights, seed),
        }
        return Step(tensors, metrics)

    def _of_counted(self, advantages: Tensor, dtype: torch.dtype, counted_B_T: Tensor, counts_B: Tensor) -> Tensor:
        """0 where nothing counts; in `dtype`, unless they are in float32 or better as they are."""
        advantages = advantages.to(
            torch.promote_types(advantages.dtype, torch.float32) if advantages.is_floating_point() else dtype
        )
        if advantages.shape == counted_B_T.shape:
            return cleared(advantages, counted_B_T)
        counts = counts_B > 0
        return torch.where(counts if advantages.dim() == 1 else counts.unsqueeze(1), advantages, 0.0)

    def _picked(self, old_log_probs: Tensor | None, advantages: Tensor, weights: Tensor, seed: int) -> Tensor | None:
        """Tokens picked by covariance over the whole step, where the surrogate wants that."""
        if self.surrogate_kind not in PICKS or old_log_probs is None:
            return None
        counted = weights != 0
        old = neutral(old_log_probs.to(weights.dtype), counted)
        spread = neutral(by_column(advantages).to(weights.dtype), counted)
        return PICKS[self.surrogate_kind](old, spread, counted, seed, **self.surrogate_parameters)

    def _correction(
        self, given: Mapping[str, Tensor | None], mask: Tensor, segment_ids: Tensor | None, weights: Tensor, metrics: Metrics
    ) -> Tensor | None:
        """The correction weights, or None; measures how far sampler and trainer are apart wherever both are known."""
        axis, wanted = self.correct_axis, self.correct_axis["action"] in correct.ACTIONS
        if not wanted and (given["old_log_probs"] is None or given["rollout_log_probs"] is None):
            return None
        old = needed(given, "old_log_probs").to(weights.dtype)
        difference = neutral(old - needed(given, "rollout_log_probs").to(weights.dtype), mask)
        measured = Reductions(weights != 0, weights.dtype, metrics)
        measured.kl("rollout/approx_kl", -difference)
        measured.effective("rollout/effective_samples", bounded_exp(difference))
        if not wanted:
            return None
        segments = segment_ids if axis["chunk"] is None else chunks(mask, axis["chunk"])
        options = {name: value for name, value in axis.items() if name not in ("chunk", "sequence_delta")}
        result = correct.correction(difference, mask, segments, **options)
        measured.mean("correction/weight_mean", result.raw)
        measured.extremes("correction/weight", result.raw)
        measured.fraction("correction/fraction_truncated", result.truncated)
        measured.fraction("correction/fraction_masked", result.masked)
        return result.weights

    # ------------------------------------------------------------ once a micro-batch

    def loss(
        self,
        log_probs: Tensor,
        *,
        response_mask: Tensor,
        ones: Tensor,
        lengths: Tensor,
        counts: Tensor,
        advantages: Tensor,
        weights: Tensor,
        row_weights: Tensor,
        old_log_probs: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        segment_ids: Tensor | None = None,
        correction: Tensor | None = None,
        picked: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> tuple[Tensor, LossOutputs]:
        """The rows' share of the step's loss (a scalar with a graph, to be minimised) and what it was made of.

        The keyword arguments are what `prepare` made: the mask [B, T] in booleans, and in integers of the log-probs' width;
        `lengths` [B], the tokens of each row under it (of none: 1), `counts` [B], those that count in the loss, `advantages`
        [B] or [B, T], 0 where nothing counts, `weights` [B, T] and `row_weights` [B], their sums. Raises ValueError when a
        tensor is missing that an axis needs. Of an empty or fully masked batch the loss is 0, with a graph. Where `weights` is
        0 a token only takes part in its sequence's ratio.
        """
        others = {"old_log_probs": old_log_probs, "rollout_log_probs": rollout_log_probs, "ref_log_probs": ref_log_probs}
        moved = Moved(log_probs, others, response_mask, ones)
        segments = segment_ids if self.chunk is None else chunks(moved.mask, self.chunk)
        answers = Answers(response_mask, lengths, segments)
        terms, log_ratio = self._terms(moved, answers, advantages, weights, picked)
        bounded = self.surrogate(terms, **self.surrogate_parameters)
        token_loss = self._token_loss(bounded.loss, correction, terms, moved, answers)
        # one loss a sequence is weighed by the sum of its tokens' weights: the same, without a [B, T] of products
        narrow = token_loss.shape != weights.shape
        loss_B = token_loss.squeeze(1) * row_weights if narrow else (token_loss * weights).sum(dim=1)
        outputs = LossOutputs(
            token_loss, bounded, terms, log_ratio, loss_B, moved=moved, lengths_B=lengths, counts_B=counts, entropy=entropy
        )
        return loss_B.sum(), outputs

    def _terms(
        self, moved: Moved, answers: Answers, advantages: Tensor, weights: Tensor, picked: Tensor | None
    ) -> tuple[Terms, Tensor]:
        """What the surrogate looks at, and the log importance ratio."""
        anchored = not self.ratio.constant or moved.knows(self.anchor)
        delta = moved.less(self.anchor) if anchored else weights.new_zeros(len(weights), 1)
        log_ratio = self.ratio.pool(delta, answers)
        terms = Terms(
            policy=lambda: moved.less(None),
            anchor=lambda: moved.other(self.anchor) if anchored else moved.less(None).detach(),
            weights=weights,
            delta=delta,
            ratio=bounded_exp(log_ratio),
            constant=self.ratio.constant,
            advantages=by_column(advantages).to(delta.dtype),
            pool=lambda values: self.ratio.pool(values, answers),
            picked=picked,
        )
        return terms, log_ratio.detach()

    def _corrected(self, token_loss: Tensor, correction: Tensor | None, terms: Terms, moved: Moved, answers: Answers) -> Tensor:
        """The surrogate under the correct axis: never the KL."""
        if correction is not None:
            token_loss = token_loss * correction
        if self.correct_axis["sequence_delta"] is None:
            return token_loss
        delta = moved.less("old_log_probs").detach()
        kept = correct.fresh(delta, terms.advantages, answers, sequence_delta=self.correct_axis["sequence_delta"])
        return torch.where(kept, token_loss, 0.0)

    def _token_loss(self, surrogate: Tensor, correction: Tensor | None, terms: Terms, moved: Moved, answers: Answers) -> Tensor:
        """The surrogate under the correct axis, and the KL where it is placed in the loss."""
        token_loss = self._corrected(surrogate, correction, terms, moved, answers)
        if self.kl_axis["place"] != "loss" or not self.kl_axis["coef"]:
            return token_loss
        x = moved.less(self.kl_reference)
        ratios = kl.Ratios(terms.ratio, lambda: bounded_exp(moved.less(self.anchor)))
        penalty = kl.penalty(x, ratios, estimator=self.kl_axis["estimator"], gradient=self.kl_axis["gradient"])
        return torch.add(token_loss, penalty, alpha=self.kl_axis["coef"])
