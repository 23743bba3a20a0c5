"""The settings as the environment gives them. What is wrong with them is said by the variable's name."""

from pydantic import ValidationError

from service.settings import Settings, get_settings
from service.validation import field_errors


def settings_or_exit() -> Settings:
    """The settings of this process. Ends it with a message if they cannot be used."""
    try:
        return get_settings()
    except ValidationError as error:
        raise SystemExit(f"error: {why_refused(error)}") from None


def why_refused(error: ValidationError) -> str:
    wrong = [
        (f"RATCHET_{fault.pointer[1:].replace('/', '_').upper()}: " if fault.pointer else "") + fault.detail
        for fault in field_errors(Settings, error.errors())
    ]
    return f"the settings cannot be used: {'; '.join(wrong)}"
