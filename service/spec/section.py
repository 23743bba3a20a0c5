"""What every part of a spec, and every other document that is sent, is made of."""

from pydantic import BaseModel, ConfigDict

# Where a number has no bound of its own: far beyond any use, and near enough that what is computed of it stays a number.
MOST = 1e12  # of what is multiplied or compared; its square, and its product with another one, fit float32
MOST_COUNTED = 2**53  # of what is counted: any reader of JSON takes such an integer as it is
MOST_S = 100 * 366 * 86_400.0  # a century: clocks and calendars can be asked for the day after it


class Section(BaseModel):
    """Frozen; refuses unknown keys, numbers that JSON cannot hold, and one type for another: no "3" or true for 3."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
