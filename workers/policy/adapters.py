"""The LoRA adapters in one model. Each has a name in memory; on the disk it is a plain peft adapter without a name.

At most one adapter is active at any time; the others then have no effect.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import orjson
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from service.spec.model import Lora
from service.validation import did_you_mean
from workers.policy.errors import PolicyFailed, Subject
from workers.policy.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, mismatch, saved_adapter
from workers.rollout.local import LEAST_ROWS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Peft puts the adapter's name into the names of its weights. An optimizer's tensors on the disk use this name instead.
SAVED_AS = "default"
EXPERTS = "experts"  # the module of a layer that holds the weights of all its routed experts, stacked: [experts, in, out]
PLAIN = "__base__"  # peft's name for a row without an adapter
BUSY = "the base is at work for one of its policies; another has to wait"


class Adapters:
    """The adapters of `model`. The model is changed in place: its linear layers get the adapters beside their weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tied = _tied_layers(model)
        self._layer_names = {part for name, _ in model.named_modules() for part in name.split(".")}
        self._order = {module: list(module._parameters) for module in model.modules()}
        self._peft: PeftModel | None = None  # set while there is any adapter
        self._frozen: dict[str, bool] = {}  # by the adapter's name
        self._at_work: str | None = None  # the adapter that the model is known to be switched to
        self.mixes = True  # whether rows of one batch may use different adapters; those of stacked experts act on all rows
        self._in_use = False
        self._closed = False
        self._mixed: list[Any] = []  # the layers with adapters

    def close(self) -> None:
        """Allow no adapter from now on: the model's own weights are trained. Raises ValueError if there is a learner."""
        if self._closed or self._frozen:
            raise ValueError("this base has a learner already; one that trains all weights needs a base of its own")
        self._closed = True

    def add(self, name: str, adapter: Lora, *, revision: str | None, seed: int, weights: Path | None = None) -> None:
        """Add an adapter to train, with weights drawn from `seed` or loaded from a saved adapter's folder.

        `revision` is the source's commit, which is saved with the adapter. Raises PolicyFailed lora_target_modules or
        checkpoint_mismatch and then leaves the model unchanged.
        """
        self._check_new(name)
        modules, parameters = adapter.target_modules, self._targeted(adapter.target_parameters)
        if not isinstance(modules, str):
            self._check_targets(modules)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter.rank,
            lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType] - peft multiplies by it, and takes any number
            lora_dropout=adapter.dropout,
            target_modules=modules if isinstance(modules, str) else list(modules),
            target_parameters=parameters,
            revision=revision,
        )
        try:
            self._add(name, config, seed, frozen=False)
        except ValueError as error:
            detail = f"the adapter cannot be put on {modules}{f' and {parameters}' if parameters else ''}: {error}"
            no_dropout = "routed experts take none: set model.adapter.dropout to 0, or name other target_modules"
            raise self._no_target(detail, no_dropout if "lora_dropout" in str(error) else None) from error
        if not isinstance(modules, str) and (moved := sorted({*modules}.difference(config.target_modules or ()))):
            self.remove(name)
            raise self._no_target(
                f"the adapter cannot be put on {', '.join(moved)}: in this family peft takes these names for weights of the "
                "routed experts; name the weights in target_parameters, for example mlp.down_proj.weight of a linear layer"
            )
        if weights is not None:
            self._fill(name, weights)

    def add_saved(self, name: str, folder: Path) -> None:
        """Add a saved adapter, frozen."""
        self._check_new(name)
        self._add(name, saved_adapter(folder), 0, frozen=True)
        try:
            self._fill(name, folder)
        except BaseException:
            self.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Remove an adapter. After the last one the model's layers are the original ones."""
        peft = self._peft_of(name)
        del self._frozen[name]
        self._at_work = None
        if not self._frozen:
            peft.unload()
            self._peft, self._mixed = None, []
            return
        peft.set_adapter(next(iter(self._frozen)), inference_mode=True)  # peft warns if the active one is deleted
        peft.delete_adapter(name)

    def clear(self) -> None:
        """Remove all adapters."""
        for name in list(self._frozen):
            self.remove(name)

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Inside the `with` block the model uses only this adapter, or none. Its weights get gradients unless frozen.

        Raises RuntimeError if nested, because the outer block would continue with the inner block's adapter.
        """
        if self._in_use:
            raise RuntimeError(BUSY)
        with self._without_any() if name is None else nullcontext(self._switch_to(name)):
            self._in_use = True
            try:
                yield
            finally:
                self._in_use = False

    def has(self, name: str) -> bool:
        return name in self._frozen

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside the `with` block, row i of the model's input uses the adapter names[i], or none; without gradients.

        Rows beyond the names use none. The result for a row is the same as by `only`, to the bit where matrix products of
        LEAST_ROWS rows and more are. Raises RuntimeError if nested.
        """
        if len(kinds := set(names)) == 1 and (None not in kinds or not self.mixes):
            with self.only(names[0]):
                yield
            return
        if not self.mixes:
            raise ValueError("adapters of routed experts' weights cannot be mixed in one batch")
        if self._in_use:
            raise RuntimeError(BUSY)
        mixture = _Mixture(names, self._model.device)
        mixed = self._mixed if self._peft is not None else []
        self._in_use = True
        try:
            for layer in mixed:
                layer.forward = mixture.of(layer)
            yield
        finally:
            self._in_use = False
            for layer in mixed:
                vars(layer).pop("forward", None)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's weights in the order of the model's layers, by their names on the disk."""
        self._peft_of(name)
        weights = ((path.split("."), weight) for path, weight in self._model.named_parameters())
        return {_saved_as(parts, name): weight for parts, weight in weights if name in parts}

    def dropouts(self, name: str) -> list[nn.Dropout]:
        """The dropout modules before the adapter's layers; none if its rate is 0."""
        modules = self._model.named_modules()
        return [m for path, m in modules if path.endswith(f"lora_dropout.{name}") and isinstance(m, nn.Dropout)]

    def save(self, name: str, folder: Path) -> None:
        """Write a plain peft adapter into the folder."""
        peft = self._peft_of(name)
        # Peft's card has only blanks to fill in, and takes longer than the weights of a small adapter.
        peft.create_or_update_model_card = lambda output_dir: None
        # save_embedding_layers: "auto" would ask the hub about the base.
        peft.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        if (own := folder / name).is_dir():  # peft's own default name has no folder of its own
            for path in own.iterdir():
                path.rename(folder / path.name)
            own.rmdir()
        _sort_sets(folder / ADAPTER_CONFIG, peft.peft_config[name].to_dict())

    def warnings(self, name: str, adapter: Lora) -> list[str]:
        """Warnings for an adapter's owner: which weights it leaves out, and where it cannot be merged."""
        self._peft_of(name)
        warnings: list[str] = []
        if adapter.target_modules == "all-linear" and (left := self._without_adapter()):
            share = sum(left.values()) / sum(p.numel() for path, p in self._model.named_parameters() if ".lora_" not in path)
            experts = any(path.endswith(f".{end}") for path in left for end in self._stacked())
            warnings.append(
                f"all-linear puts no adapter on {', '.join(left)} ({share:.0%} of the weights): they stay as they are; "
                f"model.adapter.target_parameters takes their names{', or experts for all routed experts' * experts}"
            )
        tied = [path for path in self._tied if isinstance(self._model.get_submodule(path), BaseTunerLayer)]
        if tied:
            warnings.append(f"the adapter on {', '.join(tied)} cannot be merged: head and embedding share their weights")
        return warnings

    def on_modules(self, name: str) -> dict[str, int]:
        """The layers that have the adapter, by their paths with layer numbers written as *, and how many each of these are."""
        layers = [(path, module) for path, module in self._model.named_modules() if isinstance(module, LoraLayer)]
        mine = [path for path, layer in layers if not isinstance(layer, ParamWrapper) and name in layer.r]
        return dict(Counter(_pattern(path) for path in mine))

    def on_parameters(self, name: str) -> list[str]:
        """The weights outside of linear layers that the adapter changes; layer numbers are written as *. In some families
        all-linear includes the routed experts."""
        wrappers = [(path, wrapper.parameter_name) for path, wrapper in self._wrappers() if name in wrapper.lora_A]
        return list(dict.fromkeys(_pattern(f"{path}.{own}") for path, own in wrappers))

    def _wrappers(self) -> list[tuple[str, ParamWrapper]]:
        return [(path, module) for path, module in self._model.named_modules() if isinstance(module, ParamWrapper)]

    def _without_adapter(self) -> dict[str, int]:
        """The sizes of the weights that got no adapter, for example routed experts, by name; layer numbers are written as *."""
        left: dict[str, int] = {}
        ours = {id(self._model.get_output_embeddings())}
        wrapped = {(wrapper.get_base_layer(), wrapper.parameter_name) for _, wrapper in self._wrappers()}
        holders = {module for module, _ in wrapped}  # each of their weights may have an adapter or none
        for path, module in self._model.named_modules():
            if isinstance(module, nn.Embedding) or id(module) in ours or (_is_of_peft(path) and module not in holders):
                continue
            for own, weight in module.named_parameters(recurse=False):
                if weight.ndim > 1 and (module, own) not in wrapped:
                    pattern = _pattern(f"{path}.{own}")
                    left[pattern] = left.get(pattern, 0) + weight.numel()
        return left

    def _targeted(self, parameters: list[str] | str | None) -> list[str] | None:
        """The ends of the paths of the weights to adapt. Raises PolicyFailed for a name that no weight has."""
        if parameters is None:
            return None
        ends = self._stacked()
        if isinstance(parameters, list):
            for name in parameters:
                if not any(path == name or path.endswith(f".{name}") for path in self._matrices()):
                    near = did_you_mean(name, [*ends, *(end.rsplit(".", 1)[-1] for end in ends)])
                    raise self._no_parameter(
                        f"the adapter cannot be put on {name!r}: no weight of this model is called so{near}", ends
                    )
            return sorted(parameters)
        if not ends:
            raise self._no_parameter("target_parameters is experts, and no routed experts of this model share one weight", ends)
        return ends

    def _matrices(self) -> dict[str, nn.Parameter]:
        """The model's own weights with two dimensions or more, by their paths in the model without adapters."""
        named = self._model.named_parameters()
        return {_bare_path(path): weight for path, weight in named if weight.ndim > 1 and ".lora_" not in path}

    def _stacked(self) -> list[str]:
        """The ends of the paths of weights that hold all routed experts of a layer, for example experts.down_proj."""
        places = [path.split(".")[-2:] for path, weight in self._matrices().items() if weight.ndim == 3]
        return sorted({f"{EXPERTS}.{own}" for holder, own in places if holder == EXPERTS})

    def _no_parameter(self, detail: str, ends: list[str]) -> PolicyFailed:
        hint = f"stacked weights of routed experts here are: {', '.join(ends)}" if ends else "leave target_parameters out"
        return PolicyFailed("lora_target_modules", detail, hint=hint, subject=Subject.TARGET_PARAMETERS)

    def _check_targets(self, modules: list[str]) -> None:
        """Raises PolicyFailed for a name that no layer has, which peft would ignore if another name fits, and for a name of
        something that only holds layers."""
        layers = [(path, _bare(module)) for path, module in self._model.named_modules() if not _is_of_peft(path)]
        for name in modules:
            fitting = [module for path, module in layers if path == name or path.endswith(f".{name}")]
            if not fitting:
                near = did_you_mean(name.removesuffix(".weight").rsplit(".", 1)[-1], self._linear())
                if name in ("all-linear", "all_linear"):
                    near = "; write target_modules: all-linear, which is no list"
                elif set(name) & set("*[]()|^$+?\\"):
                    near += "; names are no patterns: the end of a path fits in every layer that has it"
                raise self._no_target(f"the adapter cannot be put on {name!r}: no layer of this model is called so{near}")
            for module in fitting:
                if any(module.children()):
                    inside = ", ".join(_linear_in(module))
                    raise self._no_target(
                        f"the adapter cannot be put on {name!r}, a {type(module).__name__}: it is no linear layer"
                        + (f"; those in it are: {inside}" if inside else "")
                    )

    def _linear(self) -> list[str]:
        """The last parts of the names of the linear layers."""
        return _linear_in(self._model)

    def _no_target(self, detail: str, hint: str | None = None) -> PolicyFailed:
        linear = f"linear layers of this model are: {', '.join(self._linear())}; all-linear takes all but the head"
        if self._stacked():
            linear += "; routed experts have target_parameters: experts"
        return PolicyFailed("lora_target_modules", detail, hint=hint or linear, subject=Subject.TARGET_MODULES)

    def _switch_to(self, name: str) -> None:
        if self._at_work != name:  # only if needed: switching visits every layer
            self._peft_of(name).set_adapter(name, inference_mode=self._frozen[name])
            self._at_work = name

    def _without_any(self) -> AbstractContextManager[None]:
        if self._peft is None:
            return nullcontext()
        self._at_work = None  # peft will switch gradients on for the adapter that was active, even a frozen one
        return self._peft.disable_adapter()

    def _peft_of(self, name: str) -> PeftModel:
        if self._peft is None or name not in self._frozen:
            raise ValueError(f"there is no adapter {name!r} on this base")
        return self._peft

    def _check_new(self, name: str) -> None:
        if self._closed:
            raise ValueError("all weights of this base are trained by one learner; an adapter needs another base")
        # Peft finds an adapter's weights by a part of their names.
        if not NAME.fullmatch(name) or name in self._frozen or name in self._layer_names or name.startswith(("lora", "base_")):
            raise ValueError(f"{name!r} cannot be the name of a new adapter: it is taken, or not a plain name")

    def _add(self, name: str, config: LoraConfig, seed: int, *, frozen: bool) -> None:
        self._at_work = None
        self._restore_order()
        config.base_model_name_or_path = self._model.name_or_path or None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:  # both create float32 adapters, even on a bfloat16 base
                if self._peft is None:
                    self._peft = get_peft_model(self._model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except BaseException:
                self._undo(name)
                raise
        self._frozen[name] = frozen
        self._mixed = [layer for layer in self._model.modules() if isinstance(layer, LoraLayer)]
        self.mixes = not any(isinstance(layer, ParamWrapper) for layer in self._mixed)
        self._model.eval()  # the new dropouts

    def _restore_order(self) -> None:
        """Put the weights of each module back into their first order. A forward pass with an adapter on one of them moves it to
        the end, and peft nests adapters in this order, which their names on the disk depend on."""
        for module, names in self._order.items():
            if list(module._parameters) != names and module._parameters.keys() == set(names):
                for name in names:
                    module._parameters[name] = module._parameters.pop(name)

    def _fill(self, name: str, folder: Path) -> None:
        """Load a saved adapter's weights into this one, which must have the same shape; otherwise remove it."""
        try:
            self._copy(name, folder)
        except BaseException:
            self.remove(name)
            raise

    def _copy(self, name: str, folder: Path) -> None:
        peft, saved = self._peft_of(name), saved_adapter(folder)
        ours = peft.peft_config[name]
        assert isinstance(ours, LoraConfig)
        if (saved.r, saved.lora_alpha) != (ours.r, ours.lora_alpha):
            raise mismatch(
                f"its adapter has rank {saved.r} and alpha {saved.lora_alpha}; asked for are {ours.r} and {ours.lora_alpha}",
                "leave model.adapter out, or give it the checkpoint's values",
            )
        loaded = set_peft_model_state_dict(peft, load_file(folder / ADAPTER_WEIGHTS), adapter_name=name)
        missing = [key for key in loaded.missing_keys if ".lora_" in key and f".{name}." in key]
        if strangers := missing + loaded.unexpected_keys:
            example = _saved_as(strangers[0].split("."), name)
            raise mismatch(
                f"its adapter does not sit on the same layers as model.adapter.target_modules, for example {example}",
                "leave model.adapter out, or give it the checkpoint's values",
            )

    def _undo(self, name: str) -> None:
        """Remove an adapter that peft may have added to only some of the layers."""
        for path, layer in list(self._model.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                if self._peft is not None:
                    layer.delete_adapter(name)
                elif ".base_layer" not in path:  # else it is inside of another, which takes it along
                    self._model.set_submodule(path, layer.get_base_layer())


class _Mixture:
    """Which rows of the model's input use which adapter."""

    def __init__(self, names: Sequence[str | None], device: torch.device) -> None:
        self._names, self._device = names, device
        self._rows = {
            kind: [row for row, name in enumerate(names) if name == kind] for kind in sorted(filter(None, set(names)))
        }
        self._places = cache(self._places_of)

    def of(self, layer: Any) -> Callable[..., Tensor]:
        """What stands for the layer's `forward`."""
        if isinstance(layer, LoraLinear):
            return partial(self._linear, layer)
        return partial(layer._mixed_batch_forward, adapter_names=[name or PLAIN for name in self._names])

    def _linear(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What peft's layer computes; `x` is [rows, places, width], or [rows x places, width]."""
        result = layer.base_layer(x, *args, **kwargs)
        for name in self._rows:
            if name in layer.lora_A:
                mine, enough = self._places(name, x.shape[:-1])
                lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
                change = lora_b(lora_a(x[enough].to(lora_a.weight.dtype))) * layer.scaling[name]
                result[mine] = (result[mine] + change[: len(mine)]).to(result.dtype)
        return result

    def _places_of(self, name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The adapter's places in the first dimension, and the same with repetitions up to LEAST_ROWS products."""
        mine = torch.tensor(self._rows[name], device=self._device)
        if len(shape) == 1 and (each := shape[0] // len(self._names)) > 1:
            mine = (mine.unsqueeze(-1) * each + torch.arange(each, device=self._device)).flatten()
        lacking = LEAST_ROWS - len(mine) * shape[1:].numel()
        return mine, mine if lacking <= 0 else torch.cat([mine, mine[:1].expand(lacking)])


def _tied_layers(model: PreTrainedModel) -> list[str]:
    """The paths of the head and the embedding, if they share their weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = None if head is None or embedding is None else head.weight
    if shared is None or embedding.weight is not shared:
        return []
    return [path for path, module in model.named_modules() if getattr(module, "weight", None) is shared]


def _pattern(path: str) -> str:
    """The path of a weight in the model without adapters, with layer numbers written as *."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", _bare_path(path))


def _bare_path(path: str) -> str:
    return path.replace(".base_layer", "")


def _is_of_peft(path: str) -> bool:
    """Whether a path leads into a layer that has an adapter: its own weights, or the adapter's."""
    return any(part == "base_layer" or part.startswith("lora_") for part in path.split("."))


def _linear_in(model: nn.Module) -> list[str]:
    named = model.named_modules()
    return sorted({path.rsplit(".", 1)[-1] for path, module in named if isinstance(_bare(module), nn.Linear | Conv1D)} - {""})


def _bare(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _sort_sets(path: Path, config: dict[str, Any]) -> None:
    """Sort the sets in a saved config. Peft writes them in hash order, which differs between processes."""
    written = orjson.loads(path.read_bytes())
    written |= {name: sorted(value) for name, value in config.items() if isinstance(value, set)}
    path.write_bytes(orjson.dumps(written, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))


def _saved_as(parts: list[str], name: str) -> str:
    return ".".join(SAVED_AS if part == name else part for part in parts)
