"""Pages of lists: newest first, with a cursor."""

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")


class PageQuery(BaseModel):
    """What every list takes; unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid")

    after: Annotated[str | None, Field(max_length=128, description="last_id of the page before")] = None
    limit: Annotated[int, Field(ge=1, le=100, description="how many at most")] = 20


class EitherWay(BaseModel):
    """What lists take that are read from either end. What belongs to one way is refused with the other."""

    model_config = ConfigDict(extra="forbid")

    order: Literal["oldest_first", "newest_first"] = "oldest_first"

    @model_validator(mode="after")
    def goes_one_way(self) -> Self:
        other, names = ("newest_first", ("before", "without")) if self.order == "oldest_first" else ("oldest_first", ("after",))
        if wrong := [name for name in names if getattr(self, name, None)]:
            raise ValueError(f"{' and '.join(wrong)} go with order={other}, and the order is {self.order}")
        return self


class Page(BaseModel, Generic[T]):
    object: Literal["list"] = "list"
    data: list[T]
    has_more: Annotated[bool, Field(description="there are more behind last_id")]
    first_id: str | None
    last_id: Annotated[str | None, Field(description="pass it as `after` to get the next page")]

    @classmethod
    def of(cls, data: list[T], ids: Sequence[str], has_more: bool = False) -> Self:
        return cls(data=data, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
