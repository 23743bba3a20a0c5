"""Checks of rollout.engine: what an external vLLM server can serve (docs/rollout-engines.md), and where it may stand."""

from collections.abc import Iterator

from service.errors import FieldError
from service.settings import Settings
from service.spec.addresses import refusal
from service.spec.job import RLSpec, SupervisedSpec
from service.spec.model import Lora
from service.spec.training import VllmEngine

# Of vLLM 0.33: SamplingParams takes temperatures up to 2 and raises those below 0.01 to it; LoRAConfig's largest max_lora_rank.
COLDEST, HOTTEST, LARGEST_RANK = 0.01, 2.0, 512
NETWORKS = "RATCHET_ROLLOUT_NETWORKS"


def check_rollout(spec: RLSpec | SupervisedSpec, settings: Settings) -> list[FieldError]:
    """Errors for a rollout.engine that this service, or any vLLM server, cannot offer to this job."""
    if not isinstance(spec, RLSpec):
        return []
    if not isinstance(engine := spec.rollout.engine, VllmEngine):
        return list(_of_taking_turns(spec))
    return [*_of_the_server(engine, settings), *_of_the_adapter(spec), *_of_temperatures(spec)]


def _of_taking_turns(spec: RLSpec) -> Iterator[FieldError]:
    if spec.rollout.max_staleness:
        detail = (
            "rollout.max_staleness needs an external engine, which samples while the worker learns: {kind: vllm, ...}; with "
            f"the engine local it is 0, got {spec.rollout.max_staleness}"
        )
        yield FieldError("/rollout/max_staleness", detail, "not_served", spec.rollout.max_staleness, [0])


def _of_the_server(engine: VllmEngine, settings: Settings) -> Iterator[FieldError]:
    if why := refusal(engine.url, settings.rollout_networks, NETWORKS):
        yield FieldError("/rollout/engine/url", why, "address_refused")
    if settings.rollout_adapters_dir is None:
        detail = (
            "the operator has set no folder that workers and vLLM servers share (RATCHET_ROLLOUT_ADAPTERS_DIR), "
            "so only the engine local is offered here"
        )
        yield FieldError("/rollout/engine", detail, "no_adapters_dir")


def _of_the_adapter(spec: RLSpec) -> Iterator[FieldError]:
    pointer, adapter = "/model/adapter", spec.model.adapter
    if adapter is None:  # the model was refused already
        return
    if not isinstance(adapter, Lora):
        detail = "rollout.engine vllm needs a LoRA adapter, which the server loads anew at each step: {kind: lora}, got full"
        yield FieldError(f"{pointer}/kind", detail, "not_served", adapter.kind, ["lora"])
        return
    if adapter.rank > LARGEST_RANK:
        detail = f"vLLM serves ranks of at most {LARGEST_RANK}, got {adapter.rank}"
        yield FieldError(f"{pointer}/rank", detail, "not_served", adapter.rank)
    if adapter.target_parameters is not None:
        detail = "rollout.engine vllm takes adapters on linear layers alone (target_modules); leave target_parameters out"
        yield FieldError(f"{pointer}/target_parameters", detail, "not_served")


def _of_temperatures(spec: RLSpec) -> Iterator[FieldError]:
    asked = {"/rollout/temperature": spec.rollout.temperature}
    if spec.data.eval is not None and spec.eval.temperature > 0:
        asked["/eval/temperature"] = spec.eval.temperature
    for pointer, temperature in asked.items():
        if not COLDEST <= temperature <= HOTTEST:
            greedy = "0 (greedy), or " if pointer.startswith("/eval") else ""
            detail = f"vLLM samples at temperatures of {greedy}{COLDEST:g} to {HOTTEST:g}, got {temperature:g}"
            yield FieldError(pointer, detail, "not_served", temperature)


def rollout_warnings(spec: RLSpec) -> list[str]:
    """What is advised where another program samples than the one that trains."""
    corrected = spec.objective.correct.weighs or spec.objective.anchor == "rollout"
    if not isinstance(spec.rollout.engine, VllmEngine) or corrected:
        return []
    if spec.rollout.max_staleness:
        return [
            (
                "rollout.max_staleness is 1 and the objective takes no notice of it: answers are sampled by weights that are "
                "a step older, which biases the gradient; advised is objective.anchor rollout (ratios against the policy that "
                "sampled), or objective.correct {level: token, action: truncate, cap: 2}"
            )
        ]
    return [
        (
            "rollout.engine is vllm and objective.correct is none: sampler and trainer differ by rounding about each token, "
            "which biases the gradient; advised is objective.correct {level: token, action: truncate, cap: 2}; "
            "rollout/approx_kl_k3 and rollout/effective_samples show how far they differ"
        )
    ]
