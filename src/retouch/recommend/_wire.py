"""What the service reads, as its OpenAPI page shows it. All checks beyond types are those of `answers.Request`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from .answers import Filters, Request

__all__ = ["Batch", "Event", "Events", "Filter", "Question"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Filter(_Body):
    """Which items may be named."""

    categories: Annotated[list[StrictStr], Field(description="An item needs one of these; empty: any.")] = []
    allow: Annotated[list[StrictStr] | None, Field(description="Only these ids.")] = None
    deny: Annotated[list[StrictStr], Field(description="Not these ids.")] = []
    in_stock: Annotated[StrictBool, Field(description="Leave out what is out of stock.")] = True


class Question(_Body):
    """One question: a user, a history, or both."""

    user: Annotated[StrictStr | None, Field(description="The user's id; the store knows the rest.")] = None
    history: Annotated[list[StrictStr] | None, Field(description="Ids of items taken, oldest first.")] = None
    k: Annotated[StrictInt, Field(description="How many items are wanted.")] = 10
    filters: Filter = Filter()
    explain: Annotated[StrictBool, Field(description="Whether reasons are wanted.")] = False

    def request(self) -> Request:
        """Return it as the library asks it.

        Raises:
            UserError: A value is not allowed.
        """
        f = self.filters
        allow = None if f.allow is None else tuple(f.allow)
        filters = Filters(tuple(f.categories), allow, tuple(f.deny), f.in_stock)
        history = None if self.history is None else tuple(self.history)
        return Request(self.user, history, self.k, filters, self.explain)


class Batch(_Body):
    """Several questions, answered in their order."""

    requests: list[Question]


class Event(_Body):
    """One item that a user took."""

    user: StrictStr
    item: StrictStr


class Events(_Body):
    """What users took, oldest first."""

    events: list[Event]
    key: Annotated[
        StrictStr, Field(max_length=256, description="Names these events: sent again under it, they are added once.")
    ] = ""
