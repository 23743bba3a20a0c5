"""What every part of a spec is made of."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; refuses unknown keys, and numbers that JSON cannot hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
