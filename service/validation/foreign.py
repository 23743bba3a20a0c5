"""Names of TRL, OpenAI and verl: what they are called here, or that they are not offered. Only for hints; never accepted."""

# key -> its place here
KEYS = {
    "num_generations": "rollout.group_size",
    "n": "rollout.group_size",
    "rollout_n": "rollout.group_size",
    "num_samples": "rollout.group_size",
    "generations_per_prompt": "rollout.group_size",
    "temperature": "rollout.temperature",  # of samples that are learnt from; without this line: of evaluations
    "do_sample": "rollout.temperature",
    "max_completion_length": "rollout.max_completion_tokens",
    "max_new_tokens": "rollout.max_completion_tokens",
    "max_tokens": "rollout.max_completion_tokens",
    "max_response_length": "rollout.max_completion_tokens",
    "response_length": "rollout.max_completion_tokens",
    "max_prompt_length": "rollout.max_prompt_tokens",
    "stop_sequences": "rollout.stop",
    "use_vllm": "rollout.engine",
    "vllm_mode": "rollout.engine",
    "vllm_server_base_url": "rollout.engine.url",
    "mask_truncated_completions": "rollout.mask_truncated",
    "overlong_filtering": "rollout.mask_truncated",
    "train_batch_size": "rollout.prompts_per_step (prompts, not answers)",
    "generation_batch_size": "rollout.prompts_per_step (prompts, not answers)",
    "beta": "objective.kl.coef (with kl.place: loss)",
    "kl_loss_coef": "objective.kl.coef (with kl.place: loss)",
    "kl_coef": "objective.kl.coef",
    "kl_penalty": "objective.kl.estimator",
    "kl_loss_type": "objective.kl.estimator",
    "use_kl_loss": "objective.kl with place: loss",
    "use_kl_in_reward": "objective.kl with place: reward",
    "use_bias_correction_kl": "objective.kl with gradient: ratio_weighted",
    "ref_model": "objective.kl.reference",
    "epsilon": "objective.surrogate.clip_low and clip_high",
    "epsilon_low": "objective.surrogate.clip_low",
    "epsilon_high": "objective.surrogate.clip_high",
    "clip_range": "objective.surrogate.clip_low and clip_high",
    "clip_range_low": "objective.surrogate.clip_low",
    "clip_range_high": "objective.surrogate.clip_high",
    "cliprange": "objective.surrogate.clip_low and clip_high",
    "cliprange_low": "objective.surrogate.clip_low",
    "cliprange_high": "objective.surrogate.clip_high",
    "clip_ratio": "objective.surrogate.clip_low and clip_high",
    "clip_ratio_low": "objective.surrogate.clip_low",
    "clip_ratio_high": "objective.surrogate.clip_high",
    "clip_ratio_c": "objective.surrogate.dual_clip",
    "delta": "objective.surrogate.delta (with surrogate.kind: two_sided)",
    "loss_type": "objective.preset, or objective.aggregate",
    "loss_agg_mode": "objective.aggregate",
    "adv_estimator": "objective.preset, or objective.advantage",
    "scale_rewards": "objective.advantage.scale",
    "norm_adv_by_std_in_grpo": "objective.advantage.scale (group_std or none)",
    "multi_objective_aggregation": "objective.advantage.several",
    "top_entropy_quantile": "objective.select.top_entropy (in loss requests, not in jobs)",
    "vllm_importance_sampling_correction": "objective.correct",
    "vllm_importance_sampling_mode": "objective.correct.level",
    "vllm_importance_sampling_cap": "objective.correct.cap",
    "tis_imp_ratio_cap": "objective.correct.cap",
    "importance_sampling_level": "objective.ratio (token or sequence)",
    "lr": "optimizer.learning_rate",
    "learning_rate_multiplier": "optimizer.learning_rate (the rate itself)",
    "optim": "optimizer",
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
    "steps_per_generation": "update.minibatches (optimizer steps on one rollout)",
    "ppo_epochs": "update.epochs",
    "n_epochs": "update.epochs (passes over a rollout), or limits.max_steps",
    "num_train_epochs": "limits.max_steps (steps, not passes over the rows)",
    "total_epochs": "limits.max_steps (steps, not passes over the rows)",
    "ppo_mini_batch_size": "update.minibatches (how many of them, not how large)",
    "gradient_accumulation_steps": "update.microbatch_tokens (memory only; the step's size is rollout and minibatches)",
    "micro_batch_size": "update.microbatch_tokens",
    "ppo_micro_batch_size": "update.microbatch_tokens",
    "ppo_micro_batch_size_per_gpu": "update.microbatch_tokens",
    "per_device_train_batch_size": "update.microbatch_tokens, or update.batch_size of a supervised job",
    "batch_size": "update.batch_size of a supervised job, or rollout.prompts_per_step",
    "steps": "limits.max_steps",
    "total_training_steps": "limits.max_steps",
    "save_steps": "checkpoints.every_steps",
    "save_freq": "checkpoints.every_steps",
    "save_strategy": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep_last",
    "load_best_model_at_end": "checkpoints.keep_best",
    "metric_for_best_model": "checkpoints.keep_best.metric",
    "greater_is_better": "checkpoints.keep_best.mode (max or min)",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_threshold": "early_stopping.min_delta",
    "eval_steps": "eval.every_steps",
    "test_freq": "eval.every_steps",
    "eval_strategy": "eval.every_steps",
    "eval_interval": "eval.every_steps",
    "logging_steps": "log_rollouts.every_steps",
    "lora_r": "model.adapter.rank",
    "r": "model.adapter.rank",
    "lora_rank": "model.adapter.rank",
    "lora_alpha": "model.adapter.alpha",
    "lora_dropout": "model.adapter.dropout",
    "lora_target_modules": "model.adapter.target_modules",
    "peft_config": "model.adapter",
    "base_model": "model.source",
    "model_name": "model.source",
    "model_name_or_path": "model.source",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype (float32 or bfloat16)",
    "reward_funcs": "reward.graders",
    "reward_fn": "reward.graders",
    "reward_model": "reward.graders (kind: http asks your own service)",
    "reward_weights": "the weight of each of reward.graders",
    "grader": "reward.graders",
    "dataset": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "training_file": "data.train",
    "validation_file": "data.eval",
    "train_files": "data.train",
    "val_files": "data.eval",
    "system_prompt": "a message of data.chat",
    "prompt_template": "data.prompt",
    "assistant_only_loss": "data.learn (all or last; nothing but answers is learnt)",
    "completion_only_loss": "data.answer, or data.learn (nothing but answers is learnt)",
    "train_on_inputs": "data.learn (nothing but answers is learnt)",
    "max_length": "data.overlong (rows that do not fit the model's context)",
    "max_seq_length": "data.overlong (rows that do not fit the model's context)",
    "rloo_k": "rollout.group_size",
    "rollout_batch_size": "rollout.prompts_per_step (prompts, not answers)",
    "stop_token_ids": "rollout.stop (texts; special tokens, too)",
    "kl_estimator": "objective.kl.estimator",
    "kl_ctrl": "objective.kl",
    "whiten_rewards": "objective.advantage.scale: whiten",
    "off_policy_mask_threshold": "objective.correct.sequence_delta",
    "hyperparameters": "optimizer, update and limits",
    "method": "kind, and objective.preset",
    "num_ppo_epochs": "update.epochs",
    "data_seed": "seed",
    "resume_from_checkpoint": "model.from_checkpoint, or `ratchet resume JOB`",
    "report_to": "`ratchet export metrics JOB --to tensorboard:runs`",
    "output_dir": "`ratchet checkpoints download CHECKPOINT --to FOLDER`",
    "push_to_hub": "`ratchet export checkpoint CHECKPOINT --to FOLDER`",
    "hub_model_id": "`ratchet export checkpoint CHECKPOINT --to FOLDER`",
    "log_completions": "log_rollouts",
    "use_peft": "model.adapter",
    "num_gpus": "resources.gpus",
    "n_gpus_per_node": "resources.gpus",
    "world_size": "resources.gpus",
    "deepspeed": "resources.sharding",
    "fsdp": "resources.sharding",
    "dataset_name": "data.train",
    "shuffle_dataset": "data.train.shuffle",
    "eval_samples": "data.eval: {source: split, rows: N}",
    "dataset_text_field": "data.prompt and data.answer",
    "completion": "data.answer",
    "messages": "data.chat (the name of the column)",
    "suffix": "name",
    "run_name": "name",
    "experiment_name": "name",
}

# name -> the rest of a sentence that says that nothing here is its counterpart
NOT_OFFERED = {
    **dict.fromkeys(
        (
            *("gradient_checkpointing", "gradient_checkpointing_kwargs", "enable_gradient_checkpointing", "use_liger_kernel"),
            *("use_remove_padding", "packing", "padding_free", "use_dynamic_bsz", "use_torch_compile", "attn_implementation"),
            *("tf32", "ddp_timeout", "dataset_num_proc", "dataloader_num_workers", "remove_unused_columns"),
        ),
        "is not offered: Ratchet chooses how it computes, and update.microbatch_tokens bounds the memory; leave it out",
    ),
    **dict.fromkeys(
        ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "gpu_memory_utilization", "tensor_model_parallel_size"),
        "is not offered: a vLLM server (rollout.engine) is started with settings of its own; leave it out",
    ),
    **dict.fromkeys(
        ("critic", "use_critic", "value_model", "vf_coef", "value_lr", "cliprange_value", "gae_lambda"),
        "is not offered: there is no critic here, advantages come from the rewards of a prompt's group; leave it out",
    ),
    **dict.fromkeys(
        ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
        "is not offered: answers are drawn by rollout.temperature, top_p and top_k only",
    ),
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"),
        "is not offered: the reference is the starting weights or the policy that sampled (objective.kl.reference)",
    ),
    **dict.fromkeys(
        ("chosen", "rejected", "dpo"),
        "is not offered: Ratchet learns from rewards (kind: rl) or given answers (kind: supervised), not from preferences",
    ),
    **dict.fromkeys(
        ("compute_metrics", "callbacks", "formatting_func", "rollout_func"),
        "is not offered: code of yours is not run here; a grader of kind http asks your service, a session is your own loop",
    ),
    **dict.fromkeys(
        ("entropy_coeff", "entropy_coef", "neftune_noise_alpha", "label_smoothing_factor"), "is not offered; leave it out"
    ),
}

# what another library calls the kind of a job -> what to write
KINDS = {
    "sft": "kind: supervised",
    "fine_tuning": "kind: supervised",
    "reinforcement": "kind: rl",
    "reinforce": "kind: rl with objective {preset: reinforce_pp}, or {preset: rloo}",
    **{
        name: f"kind: rl with objective {{preset: {name}}}"
        for name in ("ppo", "grpo", "gspo", "dapo", "dr_grpo", "rloo", "cispo")
    },
}


# field -> what another library writes there -> what to write
VALUES = {
    "preset": {
        "sft": KINDS["sft"],
        "bnpo": "the objective without a preset: a mean over the tokens of the whole step",
        "drgrpo": "dr_grpo",
        "reinforce": "reinforce_pp, or rloo",
        "reinforce++": "reinforce_pp",
    },
    "aggregate": {
        **dict.fromkeys(("token_mean", "dapo", "bnpo"), "token"),
        **dict.fromkeys(("seq_mean_token_mean", "grpo"), "seq"),
        "seq_mean_token_sum": "seq_sum",
        **dict.fromkeys(("seq_mean_token_sum_norm", "dr_grpo"), "constant"),
    },
    "ratio": {"seq": "sequence"},
    "estimator": {"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
    "scale": {"group": "group_std", "batch": "batch_std", "true": "group_std", "false": "none"},
    "centre": {"grpo": "group_mean", "rloo": "leave_one_out", "reinforce_plus_plus": "group_mean, with scale: whiten"},
    "graders": {
        "math": "number",
        "math_verify": "number",
        "string_check": "exact, or contains",
        "text_similarity": "similarity",
        **dict.fromkeys(("python", "function", "score_model", "label_model", "endpoint"), "http, which asks your own service"),
    },
}


def hint_for_key(key: str) -> str | None:
    """The place here of what another library calls `key`."""
    return KEYS.get(_ours(key))


def not_offered(name: str) -> str | None:
    """Why nothing here is the counterpart of a key, a kind or a preset of another library, as the rest of a sentence."""
    return NOT_OFFERED.get(_ours(name))


def hint_for_value(pointer: str, value: object) -> str | None:
    """What to write at this place instead of another library's value."""
    names = [name for name in pointer.split("/") if name and not name.isdigit()]
    field = names[-2] if names[-1:] == ["kind"] and len(names) > 1 else names[-1] if names else ""
    return VALUES.get(field, {}).get(_ours(str(value)))


def hint_for_kind(kind: str) -> str | None:
    return KINDS.get(_ours(kind))


def _ours(name: str) -> str:
    return name.lower().replace("-", "_")
