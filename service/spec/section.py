"""What every part of a spec, and every other document that is sent, is made of."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; refuses unknown keys, numbers that JSON cannot hold, and one type for another: no "3" or true for 3."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
