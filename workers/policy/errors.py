"""Failures of a policy. Each says what it is about; the caller knows the place in the spec that asked for it."""

from enum import StrEnum

from service.errors import JobFailed


class Subject(StrEnum):
    """What a failure is about."""

    SOURCE = "source"  # the model and its tokenizer
    ADAPTER = "adapter"  # its kind and its shape
    TARGET_MODULES = "target_modules"  # the layers that get the adapter
    TARGET_PARAMETERS = "target_parameters"  # the weights outside of linear layers that get it
    OPTIMIZER = "optimizer"  # the state that a learner continues from
    CHAT = "chat"  # a prompt made of messages


class PolicyFailed(JobFailed):
    """A failure with a subject."""

    def __init__(self, code: str, detail: str, *, hint: str | None, subject: Subject) -> None:
        super().__init__(code, detail, hint=hint)
        self.subject = subject
