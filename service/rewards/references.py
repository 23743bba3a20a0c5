"""Checks in the sandbox that the formulas which rows give as references can be read."""

from time import monotonic

from service.errors import FieldError, JobFailed
from service.jobs.reference_checks import Formula
from service.jobs.resolve import Resolved, resolve
from service.rewards.chats import refused_chats
from service.rewards.samples import NotGraded
from service.rewards.sandbox import Sandbox
from service.rewards.texts import wrong_texts
from service.settings import Settings
from service.spec.job import RLSpec, SupervisedSpec
from service.store.session import Store
from service.validation import invalid

READ_WITHIN_S = 10.0


def resolve_and_read(store: Store, settings: Settings, project: str, spec: RLSpec | SupervisedSpec) -> Resolved:
    """`resolve`, which also refuses patterns and JSON Schemas that are none, references whose formula sympy cannot read, and
    chats that the model's template refuses. Raises InvalidRequest."""
    if errors := wrong_texts(spec.reward):
        raise invalid(errors)
    resolved = resolve(store, settings, project, spec)
    if errors := unreadable(resolved.formulas):
        raise invalid(errors)
    if resolved.chats is not None and (errors := refused_chats(resolved.chats)):
        raise invalid(errors)
    return resolved


def unreadable(formulas: list[Formula]) -> list[FieldError]:
    """One FieldError for the first unreadable formula of each grader. Checks as many formulas as time allows."""
    errors: dict[str, FieldError] = {}
    if not formulas:
        return []
    sandbox, until = Sandbox("reference", {}, "/reward"), monotonic() + READ_WITHIN_S
    try:
        for formula in formulas:
            if monotonic() > until:
                break
            [outcome] = sandbox.ask_all([(formula.text, formula.percent)])
            if isinstance(outcome, NotGraded):
                detail = f"{formula.where}: {outcome.detail.removeprefix('ValueError: ')}"
                error = FieldError(formula.pointer, detail, "reference_unreadable", formula.text[:200])
                errors.setdefault(formula.pointer, error)
    except JobFailed:
        return []  # the sandbox does not start here; the worker's own may
    finally:
        sandbox.close()
    return list(errors.values())
