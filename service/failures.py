"""The registry of all failures of a job or an attempt. docs/failures.md contains its table.

`python -m service.failures` prints the table. A failure whose code is not registered here cannot be raised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Category = Literal["user", "infra", "internal"]


@dataclass(frozen=True)
class Code:
    """The meaning of a failure code. `remedy` is the hint if the failure has no hint of its own."""

    category: Category  # who can fix it: the job's owner, the operator, or Ratchet's developers
    means: str
    remedy: str
    retryable: bool = False  # the job is retried after a pause, up to limits.max_attempts times
    pauses: bool = False  # the job pauses instead of failing; after a fix it can be resumed


CODES: Mapping[str, Code] = MappingProxyType(
    {
        "invalid_request": Code(
            "user",
            "the worker cannot open what the spec names, though the API could",
            "see `pointer`; fork the job with that part changed",
        ),
        "missing_extra": Code(
            "user",
            "the worker lacks an optional package that the spec needs",
            "let the operator install it on the workers, then fork the job",
        ),
        "model_not_found": Code("user", "the model cannot be loaded", "fork the job with another model.source"),
        "model_pickled": Code(
            "user",
            "the model's weights are pickles, or named outside of its folder: they are never read",
            "save them as safetensors in one folder, and name that",
        ),
        "model_unsupported": Code("user", "the model cannot be trained here", "fork the job with another model.source"),
        "lora_target_modules": Code(
            "user",
            "the adapter cannot be put on these layers or weights",
            "fork the job with other model.adapter.target_modules or target_parameters",
        ),
        "no_chat_template": Code(
            "user", "data.chat was given, and the tokenizer has no chat template", "use data.prompt, or another model"
        ),
        "chat_refused": Code(
            "user",
            "the model's chat template refuses a message, or leaves a part of it out",
            "change the messages, data.tools or data.chat_template_kwargs, or use a model whose template takes what is given",
        ),
        "no_eos_token": Code("user", "the tokenizer cannot close an answer", "use another model, or give its tokenizer one"),
        "checkpoint_not_found": Code(
            "user", "the checkpoint to start from is gone", "fork the job with another model.from_checkpoint"
        ),
        "checkpoint_broken": Code(
            "infra",
            "the checkpoint to start from was torn or altered on the disk",
            "look at the disk; fork the job with another model.from_checkpoint",
        ),
        "checkpoint_mismatch": Code(
            "user", "the checkpoint does not fit the model or the adapter", "fork the job with a model section that fits"
        ),
        "dataset_broken": Code(
            "infra",
            "a dataset's file is not there, or not as it was uploaded",
            "restore the file from a backup and look at the disk, then resume the job",
            pauses=True,
        ),
        "prompt_too_long": Code(
            "user", "a row's prompt leaves no room for an answer", "shorten the row or the template, or take the row out"
        ),
        "all_rows_overlong": Code(
            "user",
            "data.overlong is skip, and every row of a split is too long",
            "shorten the template, or lower max_completion_tokens",
        ),
        "row_not_made": Code(
            "user",
            "a reasoning-gym task cannot make a row with this config",
            "change the source's config, or take another task",
        ),
        "prompt_empty": Code("user", "a row's prompt has no tokens", "mend the row or the template, or take the row out"),
        "sequence_too_long": Code(
            "user", "a row's prompt and answer do not fit the context", "shorten the row, or take it out of the data"
        ),
        "grader_unhealthy": Code(
            "user",
            "too many samples could not be graded, or the reward service cannot be used",
            "mend the grader, then resume the job",
            pauses=True,
        ),
        "no_signal": Code(
            "user",
            "nothing was learnt for limits.no_signal_steps steps, and limits.on_no_signal is fail",
            "mend what the detail names, then fork the job",
        ),
        "no_signal_paused": Code(
            "user",
            "nothing was learnt for limits.no_signal_steps steps, and limits.on_no_signal is pause",
            "read its rollouts; resume it to go on as it is, or fork it with what the hint names changed",
            pauses=True,
        ),
        "grader_address_refused": Code(
            "user",
            "the reward service's name is not found, or it has an address that this service does not reach",
            "give the service another address, or let the operator allow its network in RATCHET_GRADER_NETWORKS; then resume",
            pauses=True,
        ),
        "gpus_missing": Code(
            "infra",
            "the worker has fewer GPUs than it said when it took the job",
            "set RATCHET_GPUS_PER_JOB on the worker to the number of its GPUs; then fork the job",
        ),
        "rank_lost": Code(
            "infra",
            "a process of a job on several GPUs died or did not answer",
            "see the worker's log, and whether memory was short; the job is tried again by itself",
            retryable=True,
        ),
        "ranks_disagree": Code(
            "infra",
            "two GPUs of a job hold different weights where they must be equal to the bit",
            "check the GPUs and their memory; the job is tried again by itself, from the checkpoint before",
            retryable=True,
        ),
        "rollout_unavailable": Code(
            "infra",
            "the vLLM server did not answer, or answered with errors, for rollout.engine.wait_s",
            "see that it runs and that the worker reaches it; the job is tried again by itself",
            retryable=True,
        ),
        "rollout_refused": Code(
            "user",
            "the vLLM server refuses a request, its key or the adapter",
            "start it with what the message asks for (docs/rollout-engines.md), then resume the job",
            pauses=True,
        ),
        "rollout_mismatch": Code(
            "user",
            "the vLLM server does not sample what the trainer trains: another model, tokenizer, length or kind of log-probs",
            "start it as docs/rollout-engines.md says, with the same base; then resume the job",
            pauses=True,
        ),
        "rollout_address_refused": Code(
            "user",
            "the vLLM server's name is not found, or it has an address that this service does not reach",
            "give it another address, or let the operator allow its network in RATCHET_ROLLOUT_NETWORKS; then resume",
            pauses=True,
        ),
        "sample_not_graded": Code(
            "user",
            "a sample could not be graded, and reward.on_error is fail",
            "mend the grader, then fork the job; on_error: mask leaves such samples out",
        ),
        "grader_unavailable": Code(
            "infra", "a grader's process does not start on the worker", "look at the worker's installation, then fork the job"
        ),
        "non_finite_logits": Code(
            "user",
            "the model gave logits that are not finite while sampling",
            "lower optimizer.learning_rate or weight_decay if training made them so; or use float32, or a sound model",
        ),
        "non_finite_loss": Code(
            "user",
            "too many optimizer steps in a row had a loss or gradient that is not finite",
            "lower optimizer.learning_rate or use model.dtype: float32; the last good checkpoint is kept",
        ),
        "out_of_memory": Code(
            "user",
            "the worker's memory did not suffice",
            "lower update.microbatch_tokens, rollout.prompts_per_step or max_completion_tokens",
        ),
        "max_runtime": Code(
            "user",
            "the job ran longer than limits.max_runtime_s, over all attempts",
            "fork the job from its last checkpoint with a larger limit",
        ),
        "deadline": Code(
            "user",
            "the job was not done limits.deadline_s after it was submitted",
            "fork the job from its last checkpoint with a later deadline",
        ),
        "stalled": Code(
            "infra",
            "the attempt made no progress for limits.stall_timeout_s",
            "see `phase`: a grader that hangs, a batch that is too large for the machine, or a limit that is too short",
            retryable=True,
        ),
        "unresponsive": Code(
            "infra",
            "the training process did not obey a pause or cancel within its grace, and was killed",
            "nothing is left to do: the job went where it was sent, at its last checkpoint",
        ),
        "worker_lost": Code(
            "infra",
            "the training process died: killed, out of memory, or a crash in native code",
            "see the worker's log; memory is the usual cause",
            retryable=True,
        ),
        "lease_lost": Code(
            "infra",
            "the worker was not heard of for longer than its lease: it died, was frozen, or lost the database",
            "see that the worker runs and reaches the database",
            retryable=True,
        ),
        "crash_loop": Code(
            "infra",
            "the worker was lost limits.max_attempts times without a new checkpoint",
            "see the worker's log: memory is the usual cause; try smaller batches, or checkpoints.every_steps: 1",
        ),
        "store_unavailable": Code(
            "infra", "the database did not answer", "see that it runs and that the worker reaches it", retryable=True
        ),
        "bucket_unavailable": Code(
            "infra",
            "the bucket with the files of checkpoints and datasets did not answer",
            "see that it runs and that the worker reaches it; the job is tried again by itself",
            retryable=True,
        ),
        "bucket_refused": Code(
            "infra",
            "the bucket with the files of checkpoints and datasets is not there, or does not let the worker in",
            "mend RATCHET_BLOB_URL or the credentials in the worker's environment (ratchet doctor looks), then resume the job",
            pauses=True,
        ),
        "io_error": Code(
            "infra", "reading or writing a file failed", "look at the worker's disk: is it full, is it there?", retryable=True
        ),
        "internal_error": Code(
            "internal",
            "a fault of Ratchet; the worker's log has the trace",
            "report it; fork the job to go on from its last checkpoint",
        ),
    }
)


def table() -> str:
    """The registry as Markdown."""
    lines = ["| code | who can mend it | what follows | what it means | what to do |", "|---|---|---|---|---|"]
    for name, code in sorted(CODES.items()):
        follows = "pauses" if code.pauses else "tried again" if code.retryable else "fails"
        lines.append(f"| `{name}` | {code.category} | {follows} | {code.means} | {code.remedy} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
