"""How answers are sampled, and how they become optimizer steps."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from service.spec.addresses import host_of, names_user
from service.spec.section import MOST, MOST_COUNTED, Section

COLDEST = 1e-6  # temperature: logits are divided by it


class VllmEngine(Section):
    """An external vLLM server samples the answers; the job's LoRA adapter is loaded there anew for each version of its weights
    (docs/rollout-engines.md)."""

    kind: Literal["vllm"]
    url: Annotated[
        str,
        Field(pattern=r"^https?://[^\s?#]+$", max_length=2048, description="the root of the server: scheme, host and port"),
    ]
    served_model: Annotated[
        str, Field(min_length=1, max_length=512, description="the base's name there (vLLM's --served-model-name)")
    ]
    timeout_s: Annotated[float, Field(gt=0, le=3600, description="time limit of one request in seconds, answer included")] = (
        600.0
    )
    wait_s: Annotated[
        float,
        Field(ge=0, le=86_400, description="how long a request that fails is tried again, while the server is away or busy"),
    ] = 300.0
    at_once: Annotated[int, Field(ge=1, le=1024, description="requests in flight")] = 64

    @field_validator("url")
    @classmethod
    def is_a_root(cls, value: str) -> str:
        host_of(value)
        if names_user(value):
            raise ValueError(
                "a URL with a user name or password would be shown with the spec; the operator sets the server's key "
                "(RATCHET_ROLLOUT_KEYS)"
            )
        return value.rstrip("/")


class RolloutSpec(Section):
    """How answers are sampled."""

    engine: Annotated[
        Literal["local"] | VllmEngine,
        Field(description="what samples: local, the worker itself; or an external vLLM server, for a LoRA adapter"),
    ] = "local"
    prompts_per_step: Annotated[int, Field(ge=1, le=4096, description="prompts in one step")] = 32
    group_size: Annotated[int, Field(ge=1, le=1024, description="answers to each prompt")] = 8
    max_prompt_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            le=MOST_COUNTED,
            description="the job fails if a prompt is longer, in tokens; default: what the context leaves beside the answer",
        ),
    ] = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=131_072, description="the longest answer in tokens")] = 64
    temperature: Annotated[
        float, Field(ge=COLDEST, le=10, description="sampling temperature; 1 samples from the policy itself")
    ] = 1.0
    top_p: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="nucleus sampling: the likeliest tokens with this total probability; 1: all",
        ),
    ] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MOST_COUNTED, description="sample from the k likeliest tokens; 0: from all")] = 0
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(max_length=16, description="texts that end an answer; the text stays in the answer"),
    ] = Field(default_factory=list)
    rescore: Annotated[
        Literal["auto", "always"],
        Field(
            description="old log_probs of the answers · auto: those of the sampler, while a sample of answers that is scored "
            "again at each step agrees to 1e-4 nats; only in float32, without top_p, top_k and objectives that compare sampler "
            "and trainer · always: all answers are scored again"
        ),
    ] = "auto"
    max_staleness: Annotated[
        int,
        Field(
            ge=0,
            le=1,
            description="steps by which the weights that sample may be older than those that are trained · 0: sampling and "
            "learning take turns · 1: an external engine samples the next step's answers while this one is learnt from",
        ),
    ] = 0
    mask_truncated: Annotated[
        bool,
        Field(description="ignore answers that max_completion_tokens cut off (the same as objective.select.truncated)"),
    ] = False


MicrobatchTokens = Annotated[
    Annotated[int, Field(ge=1, le=MOST_COUNTED)] | Literal["auto"],
    Field(description="the most tokens in one forward pass, padding included; it changes the memory needed, not the result"),
]


class UpdateSpec(Section):
    """How a rollout becomes optimizer steps."""

    minibatches: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="optimizer steps in one pass over a rollout; with 1 and one epoch the clip bounds have no effect",
        ),
    ] = 4
    epochs: Annotated[int, Field(ge=1, le=64, description="passes over a rollout")] = 1
    microbatch_tokens: MicrobatchTokens = "auto"


class SupervisedUpdateSpec(Section):
    """How rows become optimizer steps."""

    batch_size: Annotated[int, Field(ge=1, le=65_536, description="rows in one optimizer step")] = 32
    microbatch_tokens: MicrobatchTokens = "auto"


class Schedule(Section):
    """The learning rate over optimizer steps: a linear warm-up, then the kind's shape down to min_ratio."""

    kind: Annotated[Literal["constant", "linear", "cosine"], Field(description="how the rate changes after the warm-up")] = (
        "constant"
    )
    warmup_steps: Annotated[
        int, Field(ge=0, le=MOST_COUNTED, description="optimizer steps in which the rate grows from 0 to the full rate")
    ] = 0
    min_ratio: Annotated[float, Field(ge=0, le=1, description="the rate at the end, as a share of the full rate")] = 0.0


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Section):
    """AdamW."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=1, description="the full learning rate, after the warm-up")] = 1e-5
    betas: Annotated[tuple[Beta, Beta], Field(strict=False, description="decay rates of the two moment estimates")] = (
        0.9,
        0.95,
    )
    eps: Annotated[float, Field(gt=0, le=MOST, description="added to the square root of the second moment")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=MOST, description="decoupled weight decay (AdamW)")] = 0.0
    max_grad_norm: Annotated[
        float, Field(gt=0, le=MOST, description="a gradient with a larger norm is scaled down to this norm")
    ] = 1.0
    schedule: Annotated[Schedule, Field(description="how the learning rate changes over time")] = Schedule()
