"""Checks in the sandbox that the model's chat template takes the chats of a job's rows.

Only what the template itself refuses, with `raise_exception`, is an error here. Everything else that may go wrong is left to
the worker, which renders with the model's own tokenizer.
"""

from time import monotonic

from service.errors import FieldError, JobFailed
from service.jobs.chats import Chats
from service.rewards.samples import NotGraded
from service.rewards.sandbox import Sandbox

RENDER_WITHIN_S = 5.0  # for all rows of a spec
ONE_WITHIN_S = 1.0
MEMORY_BYTES = 2**30
REFUSED = "ChatRefused: "


def refused_chats(chats: Chats) -> list[FieldError]:
    """An error for the first row that the template refuses. Renders as many rows as time allows."""
    sandbox = Sandbox("chat", {"folder": str(chats.folder)}, "/data/chat", within_s=ONE_WITHIN_S, memory_bytes=MEMORY_BYTES)
    until: float | None = None
    try:
        for one in chats.renderings():
            [outcome] = sandbox.ask_all([(one.messages, one.opened, one.options)])
            until = until or monotonic() + RENDER_WITHIN_S  # from the first answer: the child must start before
            if isinstance(outcome, NotGraded) and outcome.detail.startswith(REFUSED):
                roles = ", ".join(message["role"] for message in one.messages)
                words = outcome.detail.removeprefix(REFUSED) or "it gives no reason"
                detail = f"{one.where}: the model's chat template refuses the messages ({roles}): {words}"
                return [FieldError("/data/chat", detail, "chat_refused")]
            if isinstance(outcome, NotGraded) or monotonic() > until:
                break
    except JobFailed:  # there is no template, or none that this sandbox can read
        pass
    finally:
        sandbox.close()
    return []
