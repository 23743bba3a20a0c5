"""An objective: the seven axes put together.

    objective = Objective(axes)                                  # axes: what the job spec's objective resolved to

    # once a rollout, over all its samples [B]
    rewards = objective.with_kl(rewards, old_log_probs=..., ref_log_probs=..., response_mask=...)      # kl in the reward
    advantages = objective.advantages(rewards, group_ids, lengths=..., valid=...)
    mask = objective.select(response_mask, rewards=rewards, group_ids=group_ids, truncated=..., valid=...)

    # once an optimizer step, over all rows of its minibatch
    step = objective.prepare(response_mask=mask, advantages=advantages, old_log_probs=..., group_ids=..., longest=...)

    # once a micro-batch, for the rows in it; the losses and gradients of all micro-batches add up to the step's
    loss, outputs = objective.loss(log_probs, step.rows(rows))
    loss.backward()
    metrics = metrics + outputs.metrics                          # begin with step.metrics; metrics.finish() at the end

`prepare` computes everything that depends on more than one row: aggregation weights, correction weights and their
normalisation, tokens picked by covariance. `loss` depends on each row alone. Tensors that the axes do not need may be None; if
given, they are still used for metrics. A function that calls `loss` works with `torch.compile(..., fullgraph=True)`.

Shapes: B sequences, T tokens. Masks may have any dtype; masked values may be anything, even NaN. Computed in float32 or better.
Inside, a quantity that is constant over a sequence has the shape [B, 1] and is broadcast.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workers.objectives import advantage, aggregate, correct, kernels, kl, select
from workers.objectives.metrics import Metrics
from workers.objectives.outputs import LossOutputs
from workers.objectives.ratio import RATIOS, AnswerTokens, segments
from workers.objectives.reductions import Reductions
from workers.objectives.step import Moved, OptimizerStep, Rows, needed
from workers.objectives.surrogate import PICKS, SURROGATES, UNSCALED, Terms
from workers.objectives.tensors import by_column


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
        self.kl_in_loss = axes["kl"]["place"] == "loss" and bool(axes["kl"]["coef"])
        self.kl_kinds = {name: axes["kl"][name] for name in ("estimator", "gradient")}
        weighs_kl = self.kl_in_loss and axes["kl"]["gradient"] == "token_ratio_weighted"
        self.compares = not self.ratio.constant or weighs_kl  # whether the loss uses the anchor
        self.correct_axis = dict(axes["correct"])
        self.sequence_delta: float | None = axes["correct"]["sequence_delta"]
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
        """The rewards [B] minus coef times the answer's KL if the KL is placed in the reward; else unchanged."""
        if self.kl_axis["place"] != "reward" or not self.kl_axis["coef"]:
            return rewards_B
        known = {"ref_log_probs": ref_log_probs, "rollout_log_probs": rollout_log_probs}
        reference = needed(known.get(self.kl_reference), self.kl_reference)
        x = kernels.cleared(old_log_probs.double() - reference.double(), response_mask.bool())
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
        """Advantages [B] from rewards [B], or [B, R] with weights [R]. Invalid rows enter no statistic and get 0."""
        return advantage.advantages(
            rewards, group_ids_B, lengths_B=lengths, valid_B=valid, reward_weights_R=reward_weights, **self.advantage_axis
        )

    def group_metrics(self, rewards: Tensor, group_ids_B: Tensor, valid: Tensor | None = None) -> Metrics:
        """How many groups there are, and in how many of them all rewards are equal, so that they teach nothing.

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
        """The mask [B, T] of the tokens to learn from: without invalid rows, and without what `select` leaves out."""
        mask = response_mask.bool()
        if valid is not None:
            mask = mask & valid.bool().unsqueeze(1)
        without_spread = None
        if rewards is not None and group_ids is not None:
            mask = mask & by_column(rewards).isfinite().all(dim=1, keepdim=True)
            without_spread = advantage.without_spread(rewards, group_ids, valid)
        return select.select(mask, select.Facts(truncated, without_spread, entropy), **self.select_axis)

    def pooled(self, delta_B_T: Tensor, response_mask: Tensor) -> Tensor:
        """The log ratios [B, T] of tokens whose log-probs moved by `delta_B_T` (0 where masked), pooled by the ratio axis."""
        mask = response_mask.bool()
        answers = AnswerTokens.of(mask.to(delta_B_T.dtype), segments(mask, None, self.chunk))
        return self.ratio.pool(delta_B_T, answers).expand_as(delta_B_T)

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
    ) -> OptimizerStep:
        """What `loss` needs besides the log-probs, computed over all rows of an optimizer step.

        `selected` [B, T] can exclude single tokens from the loss; they still belong to their sequence's ratio. Default: none is
        excluded. `dtype` is that of the weights; default: that of the log-probs given here, at least float32. For surrogates
        clip_cov and kl_cov, tokens are picked here, with `seed` and the old log-probs. (The log-probs of the policy being
        trained are not known yet; at the first update after a rollout they are the same.)
        """
        mask, metrics = response_mask.bool(), Metrics()
        known = {"old_log_probs": old_log_probs, "rollout_log_probs": rollout_log_probs, "ref_log_probs": ref_log_probs}
        if dtype is None:
            dtype = next((values for values in known.values() if values is not None), advantages).dtype
        dtype = torch.promote_types(dtype, torch.float32)
        answers = kernels.as_mask(mask, dtype)
        counted = answers if selected is None else kernels.as_mask(mask & selected.bool(), dtype)
        lengths_B = kernels.tokens_of(answers).to(dtype)
        counts_B = lengths_B if selected is None else kernels.tokens_of(counted).to(dtype)
        weights = aggregate.weights(
            counted, group_ids_B=group_ids, longest=longest, tokens_B=counts_B, dtype=dtype, **self.aggregate_axis
        )
        advantages = self._of_counted(advantages, dtype, counted, counts_B)
        metrics.add("sum", "batch/masked_rows", lengths_B == 0)
        metrics.add("sum", "batch/tokens", counts_B)
        metrics.add("sum", "batch/sequences", counts_B > 0)
        rows = Rows(
            mask=answers,
            lengths=lengths_B.clamp(min=1),
            weights=weights,
            row_weights=weights.sum(dim=1),
            counts=counts_B,
            advantages=advantages,
            **known,
            segments=segments(mask, segment_ids, self.chunk),
            correction=self._correction(old_log_probs, rollout_log_probs, mask, segment_ids, weights, metrics),
            picked=self._picked(old_log_probs, advantages, weights, seed),
            entropy=entropy,
        )
        return OptimizerStep(rows, metrics)

    def _of_counted(self, advantages: Tensor, dtype: torch.dtype, counted_B_T: Tensor, counts_B: Tensor) -> Tensor:
        """The advantages, 0 where nothing counts; in `dtype`, unless they are already in float32 or better."""
        advantages = advantages.to(
            torch.promote_types(advantages.dtype, torch.float32) if advantages.is_floating_point() else dtype
        )
        if advantages.shape == counted_B_T.shape:
            return kernels.cleared(advantages, counted_B_T)
        counts = counts_B > 0
        return torch.where(counts if advantages.dim() == 1 else counts.unsqueeze(1), advantages, 0.0)

    def _picked(self, old_log_probs: Tensor | None, advantages: Tensor, weights: Tensor, seed: int) -> Tensor | None:
        """Tokens picked by covariance over the whole step, if the surrogate needs them."""
        if self.surrogate_kind not in PICKS or old_log_probs is None:
            return None
        counted = weights != 0
        old = kernels.cleared(old_log_probs.to(weights.dtype), counted)
        spread = kernels.cleared(by_column(advantages).to(weights.dtype), counted)
        return PICKS[self.surrogate_kind](old, spread, counted, seed, **self.surrogate_parameters)

    def _correction(
        self,
        old_log_probs: Tensor | None,
        rollout_log_probs: Tensor | None,
        mask: Tensor,
        segment_ids: Tensor | None,
        weights: Tensor,
        metrics: Metrics,
    ) -> Tensor | None:
        """The correction weights, or None. Also measures how much sampler and trainer differ, if both are known."""
        axis, wanted = self.correct_axis, self.correct_axis["action"] in correct.ACTIONS
        if not wanted and (old_log_probs is None or rollout_log_probs is None):
            return None
        old = needed(old_log_probs, "old_log_probs").to(weights.dtype)
        difference = kernels.cleared(old - needed(rollout_log_probs, "rollout_log_probs").to(weights.dtype), mask)
        measured = Reductions(weights, weights.dtype, metrics)
        measured.kl("rollout/approx_kl", -difference)
        measured.effective("rollout/effective_samples", kernels.bounded_exp(difference))
        if not wanted:
            return None
        options = {name: value for name, value in axis.items() if name not in ("chunk", "sequence_delta")}
        result = correct.correction(difference, mask, segments(mask, segment_ids, axis["chunk"]), **options)
        measured.mean("correction/weight_mean", result.raw)
        measured.extremes("correction/weight", result.raw)
        measured.fraction("correction/fraction_truncated", result.truncated)
        measured.fraction("correction/fraction_masked", result.masked)
        return result.weights

    @torch.no_grad()
    def teaching(self, rows: Rows) -> Tensor:
        """[B] bool: the rows whose loss depends on the policy. That of the others is 0, and its gradient too, whatever the
        policy says: no token of them counts, or all terms are multiples of advantages that are 0."""
        if self.kl_in_loss or self.surrogate_kind in UNSCALED:
            return rows.counts > 0
        return (by_column(rows.advantages) != 0).any(dim=1)

    # ------------------------------------------------------------ once a micro-batch

    def loss(self, log_probs: Tensor, rows: Rows) -> tuple[Tensor, LossOutputs]:
        """The rows' share of the step's loss (a scalar with a graph, to be minimised) and the outputs behind it.

        Raises ValueError if a tensor that an axis needs is missing. For an empty or fully masked batch the loss is 0, with a
        graph.
        """
        moved, answers = Moved(log_probs, rows), AnswerTokens(rows.mask, rows.lengths, rows.segments)
        anchored = self.compares or moved.knows(self.anchor)
        # d = log p - log p_anchor of each token, and r = exp(pool(d))
        delta = moved.less(self.anchor) if anchored else rows.weights.new_zeros(len(log_probs), 1)
        log_ratio = self.ratio.pool(delta, answers)
        terms = Terms(
            ratio=kernels.bounded_exp(log_ratio),
            advantages=by_column(rows.advantages).to(delta.dtype),
            delta=delta,
            weights=rows.weights,
            constant=self.ratio.constant,
            pool=lambda values: self.ratio.pool(values, answers),
            picked=rows.picked,
            moved=moved,
            anchor=self.anchor,
        )
        bounded = self.surrogate(terms, **self.surrogate_parameters)

        token_loss = bounded.loss
        if rows.correction is not None:  # it multiplies the surrogate, never the KL
            token_loss = token_loss * rows.correction
        if self.sequence_delta is not None:
            since_old = moved.less("old_log_probs").detach()
            fresh = correct.fresh(since_old, terms.advantages, answers, sequence_delta=self.sequence_delta)
            token_loss = torch.where(fresh, token_loss, 0.0)
        if self.kl_in_loss:
            x, ratios = moved.less(self.kl_reference), kl.Ratios(terms.ratio, delta)
            token_loss = torch.add(token_loss, kl.penalty(x, ratios, **self.kl_kinds), alpha=self.kl_axis["coef"])
        loss_B = aggregate.rows(token_loss, rows.weights, rows.row_weights)
        return loss_B.sum(), LossOutputs(rows, terms, log_ratio, bounded, token_loss, loss_B)
