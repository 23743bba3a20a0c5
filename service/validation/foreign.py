"""Names that TRL, OpenAI and verl use for things with another name here. They are only used in hints and never accepted."""

# key -> its place here
KEYS = {
    "num_generations": "rollout.group_size",
    "n": "rollout.group_size",
    "rollout_n": "rollout.group_size",
    "num_samples": "rollout.group_size",
    "max_completion_length": "rollout.max_completion_tokens",
    "max_new_tokens": "rollout.max_completion_tokens",
    "max_tokens": "rollout.max_completion_tokens",
    "max_response_length": "rollout.max_completion_tokens",
    "response_length": "rollout.max_completion_tokens",
    "max_prompt_length": "rollout.max_prompt_tokens",
    "mask_truncated_completions": "rollout.mask_truncated",
    "overlong_filtering": "rollout.mask_truncated",
    "train_batch_size": "rollout.prompts_per_step (prompts, not answers)",
    "generation_batch_size": "rollout.prompts_per_step (prompts, not answers)",
    "beta": "objective.kl.coef (with kl.place: loss)",
    "kl_loss_coef": "objective.kl.coef (with kl.place: loss)",
    "kl_coef": "objective.kl.coef",
    "kl_penalty": "objective.kl.estimator",
    "epsilon": "objective.surrogate.clip_low and clip_high",
    "epsilon_low": "objective.surrogate.clip_low",
    "epsilon_high": "objective.surrogate.clip_high",
    "clip_range": "objective.surrogate.clip_low and clip_high",
    "cliprange": "objective.surrogate.clip_low and clip_high",
    "clip_ratio": "objective.surrogate.clip_low and clip_high",
    "clip_ratio_low": "objective.surrogate.clip_low",
    "clip_ratio_high": "objective.surrogate.clip_high",
    "clip_ratio_c": "objective.surrogate.dual_clip",
    "delta": "objective.surrogate.delta (with surrogate.kind: two_sided)",
    "loss_type": "objective.preset, or objective.aggregate",
    "loss_agg_mode": "objective.aggregate",
    "adv_estimator": "objective.preset, or objective.advantage",
    "scale_rewards": "objective.advantage.scale",
    "importance_sampling_level": "objective.ratio (token or sequence)",
    "lr": "optimizer.learning_rate",
    "learning_rate_multiplier": "optimizer.learning_rate (the rate itself)",
    "lr_scheduler_type": "optimizer.schedule.kind",
    "lr_scheduler": "optimizer.schedule.kind",
    "warmup_steps": "optimizer.schedule.warmup_steps",
    "warmup_ratio": "optimizer.schedule.warmup_steps (a number of steps)",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "grad_clip": "optimizer.max_grad_norm",
    "clip_grad": "optimizer.max_grad_norm",
    "num_iterations": "update.epochs",
    "ppo_epochs": "update.epochs",
    "n_epochs": "update.epochs (passes over a rollout), or limits.max_steps",
    "num_train_epochs": "limits.max_steps (steps, not passes over the rows)",
    "ppo_mini_batch_size": "update.minibatches (how many of them, not how large)",
    "gradient_accumulation_steps": "update.microbatch_tokens (memory only; the step's size is rollout and minibatches)",
    "per_device_train_batch_size": "update.microbatch_tokens, or update.batch_size of a supervised job",
    "batch_size": "update.batch_size of a supervised job, or rollout.prompts_per_step",
    "steps": "limits.max_steps",
    "total_training_steps": "limits.max_steps",
    "save_steps": "checkpoints.every_steps",
    "save_freq": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep_last",
    "eval_steps": "eval.every_steps",
    "test_freq": "eval.every_steps",
    "logging_steps": "log_rollouts.every_steps",
    "lora_r": "model.adapter.rank",
    "r": "model.adapter.rank",
    "lora_rank": "model.adapter.rank",
    "lora_alpha": "model.adapter.alpha",
    "lora_dropout": "model.adapter.dropout",
    "peft_config": "model.adapter",
    "base_model": "model.source",
    "model_name": "model.source",
    "model_name_or_path": "model.source",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype (float32 or bfloat16)",
    "reward_funcs": "reward.graders",
    "reward_fn": "reward.graders",
    "reward_weights": "the weight of each of reward.graders",
    "grader": "reward.graders",
    "dataset": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "training_file": "data.train",
    "validation_file": "data.eval",
    "suffix": "name",
}

# what another library calls the kind of a job -> what to write
KINDS = {
    "sft": "kind: supervised",
    "fine_tuning": "kind: supervised",
    "reinforcement": "kind: rl",
    "reinforce": "kind: rl with objective {preset: reinforce_pp}, or rloo",
    **{
        name: f"kind: rl with objective {{preset: {name}}}"
        for name in ("ppo", "grpo", "gspo", "dapo", "dr_grpo", "rloo", "cispo")
    },
    "dpo": "preference pairs are not offered; with a reward: kind: rl",
}


def hint_for_key(key: str) -> str | None:
    """The place here of what another library calls `key`."""
    return KEYS.get(key.lower().replace("-", "_"))


def hint_for_kind(kind: str) -> str | None:
    return KINDS.get(kind.lower().replace("-", "_"))
