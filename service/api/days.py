"""A day (UTC) in requests and responses: only YYYY-MM-DD. Pydantic's own date also accepts seconds since 1970."""

import re
from datetime import date
from typing import Annotated, Any

from pydantic import BeforeValidator


def _full_date(sent: Any) -> Any:
    if isinstance(sent, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", sent):
        try:
            return date.fromisoformat(sent)
        except ValueError as error:
            raise ValueError(f"must be a day that there is, written YYYY-MM-DD: {error}") from None
    raise ValueError("must be a day (UTC), written YYYY-MM-DD")


Day = Annotated[date, BeforeValidator(_full_date)]
