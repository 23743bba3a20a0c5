"""From an exception to the failure that a job ends with."""

from dataclasses import replace

from sqlalchemy.exc import InterfaceError, OperationalError

from service.errors import BucketRefused, BucketUnavailable, Failure, InvalidRequest, JobFailed
from service.failures import CODES
from workers.policy.errors import PolicyFailed, Subject

# The place in a job's spec for each subject of a policy's failure, as a JSON pointer.
POINTERS = {
    Subject.SOURCE: "/model/source",
    Subject.ADAPTER: "/model/adapter",
    Subject.TARGET_MODULES: "/model/adapter/target_modules",
    Subject.TARGET_PARAMETERS: "/model/adapter/target_parameters",
    Subject.OPTIMIZER: "/model/from_checkpoint/load",
    Subject.CHAT: "/data/chat",
}


def failure_of(error: Exception) -> Failure:
    """What went wrong: a code, whose fault it is, and whether to try again."""
    if isinstance(error, PolicyFailed):
        return replace(error.failure, pointer=POINTERS[error.subject])
    if isinstance(error, JobFailed):
        return error.failure
    name = type(error).__name__
    if isinstance(error, InvalidRequest):  # the API could open it, but this worker cannot: an extra is missing, for example
        code = error.code if error.code in CODES else "invalid_request"
        return Failure(code, error.detail, hint=error.hint, pointer=error.errors[0].pointer if error.errors else None)
    if isinstance(error, BucketUnavailable | BucketRefused):
        return Failure(error.code, error.detail, hint=error.hint)
    if isinstance(error, OperationalError | InterfaceError):
        return Failure("store_unavailable", "the database did not answer")
    if name == "OutOfMemoryError" or isinstance(error, MemoryError):
        return Failure("out_of_memory", str(error).split("\n", 1)[0])
    if isinstance(error, OSError):
        return Failure("io_error", f"{name}: {error.strerror or error}")
    return Failure("internal_error", f"{name} in the training process; its log has the trace")
