"""Tasks of reasoning-gym: their configuration as JSON, checked before anything runs."""

import datetime
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from service.errors import FieldError, InvalidRequest
from service.spec.data import ReasoningGymSource
from service.validation import did_you_mean, escape

NAMES_A_FILE = re.compile(r"file|path|dir|url|folder")  # a setting of a reasoning-gym task, by its name
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def open_task(task: str, config: dict[str, Any], **settings: int) -> Any:
    """The task's dataset; `settings` are seed and size. The config has been checked."""
    from reasoning_gym.factory import DATASETS, create_dataset

    return create_dataset(task, **converted(DATASETS[task][1], config), **settings)


def converted(config_class: type, config: dict[str, Any]) -> dict[str, Any]:
    """JSON values converted to the types of the config's fields: enums, dates, tuples, nested dataclasses.

    Raises ValueError, TypeError or KeyError for a value that does not fit its type."""
    types = get_type_hints(config_class)
    return {name: _as(types.get(name), value) for name, value in config.items()}


def _as(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        made = {"weight": 1.0, "config": {}} if kind.__name__ == "DatasetSpec" else {}
        return kind(**{**made, **converted(kind, value)})
    if kind in (datetime.date, datetime.time, datetime.datetime) and isinstance(value, str):
        return kind.fromisoformat(value)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        inner = arguments[0] if arguments else Any
        return tuple(_as(inner, item) for item in value)
    if origin is list and isinstance(value, list):
        return [_as(arguments[0], item) for item in value]
    return value


def check_task(source: ReasoningGymSource, pointer: str) -> None:
    """Check the task's name and config without making a row. Raises InvalidRequest, with the code that fits."""
    try:
        from reasoning_gym.factory import DATASETS  # slow to import, and an extra
    except ImportError:
        raise InvalidRequest(
            "the source reasoning_gym needs the package reasoning-gym, which is not installed here",
            [FieldError(f"{pointer}/source", "reasoning-gym is not installed", "missing_extra", got="reasoning_gym")],
            code="missing_extra",
            hint="the operator can install it: pip install 'ratchet-rl[reasoning-gym]', for the API and for the workers",
        ) from None
    if source.task not in DATASETS:
        _unknown_task(source.task, list(DATASETS), f"{pointer}/task")
    _check_config(DATASETS, source.task, source.config, f"{pointer}/config", {"seed": source.seed, "size": source.size})


def _unknown_task(task: Any, tasks: list[str], pointer: str) -> None:
    detail = f"reasoning-gym has no task {task!r}{did_you_mean(str(task), tasks)}"
    raise InvalidRequest(detail, [FieldError(pointer, detail, "unknown_task", task, sorted(tasks))])


def _check_config(tasks: dict[str, Any], task: str, config: dict[str, Any], pointer: str, settings: dict[str, int]) -> None:
    _, config_class = tasks[task]
    legal = sorted(field.name for field in fields(config_class) if field.name not in ("seed", "size"))
    if unknown := [name for name in config if name not in legal]:
        details = [f"{task} has no setting {name!r}{did_you_mean(name, legal)}; legal: {', '.join(legal)}" for name in unknown]
        raise InvalidRequest(
            details[0],
            [
                FieldError(f"{pointer}/{escape(name)}", detail, "unknown_key", allowed=legal)
                for name, detail in zip(unknown, details, strict=True)
            ],
        )
    for name, value in config.items():  # for example, spell_backward shows the words of any file that data_file names
        if NAMES_A_FILE.search(name) and isinstance(value, str) and not PLAIN_NAME.fullmatch(value):
            detail = f"{name} names a file that comes with reasoning-gym; a path is not taken"
            where = f"{pointer}/{escape(name)}"
            raise InvalidRequest(f"{where}: {detail}", [FieldError(where, detail, "path_refused", got=value)])
    if task == "composite":
        _check_parts(tasks, config.get("datasets"), f"{pointer}/datasets")
    try:
        made = config_class(**converted(config_class, config), **settings)
        if hasattr(made, "validate"):
            made.validate()
    except Exception as error:  # each task raises other types for a bad config
        detail = f"reasoning-gym refuses this config of {task}: {str(error) or type(error).__name__}"
        raise InvalidRequest(detail, [FieldError(pointer, detail, "task_config")]) from None


def _check_parts(tasks: dict[str, Any], parts: Any, pointer: str) -> None:
    """Check the tasks of a composite, each of which has its own config."""
    if not isinstance(parts, list) or not parts:
        detail = 'composite takes datasets: [{"name": task, "weight": number, "config": {...}}, ...]'
        raise InvalidRequest(detail, [FieldError(pointer, detail, "task_config", got=str(parts)[:200])])
    for number, part in enumerate(parts):
        where = f"{pointer}/{number}"
        config = part.get("config", {}) if isinstance(part, dict) else None
        if not isinstance(config, dict) or not set(part) <= {"name", "weight", "config"}:
            detail = "a part of a composite has `name`, and may have `weight` and `config`"
            raise InvalidRequest(detail, [FieldError(where, detail, "task_config", got=str(part)[:200])])
        if part.get("name") not in tasks:
            _unknown_task(part.get("name"), list(tasks), f"{where}/name")
        if part["name"] == "composite":
            detail = "a composite of composites is not taken"
            raise InvalidRequest(detail, [FieldError(f"{where}/name", detail, "task_config", got="composite")])
        if named := [name for name in ("seed", "size") if name in config]:
            detail = f"`{named[0]}` is the composite's, not a part's"
            raise InvalidRequest(detail, [FieldError(f"{where}/config/{named[0]}", detail, "task_config")])
        _check_config(tasks, part["name"], config, f"{where}/config", {"seed": 0, "size": 1})
