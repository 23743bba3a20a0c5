"""What a policy refuses. It says what the failure is about; where that was asked for is known to whoever asked."""

from enum import StrEnum

from service.errors import JobFailed


class Subject(StrEnum):
    """What a failure is about."""

    SOURCE = "source"  # the model and its tokenizer
    ADAPTER = "adapter"  # its kind and its shape
    TARGET_MODULES = "target_modules"  # the layers that the adapter is put on
    OPTIMIZER = "optimizer"  # the state that a learner goes on from
    CHAT = "chat"  # a prompt made of messages


class PolicyFailed(JobFailed):
    """A failure that has a subject."""

    def __init__(self, code: str, detail: str, *, hint: str | None, subject: Subject) -> None:
        super().__init__(code, detail, hint=hint)
        self.subject = subject
