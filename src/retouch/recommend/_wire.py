"""What the service reads, as its OpenAPI page shows it. All checks beyond types are those of `answers.Request`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from .answers import Filters, Request, shown

__all__ = ["Batch", "Event", "Events", "Filter", "Question", "sentence"]


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


def sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """Say the first thing that is wrong with a body, and how many others there are."""
    first = errors[0]
    where = _where([part for part in first["loc"] if part != "body"])
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where} is no field of this request; see /docs.{more}"
    if isinstance(first.get("input"), bytes):
        return "The body was not sent as JSON: add the header content-type: application/json."
    if first["type"] == "missing":
        return f"{where} is missing; see /docs.{more}"
    told = str(first["msg"]).removeprefix("Input ")
    return f"{where}: {told[:1].lower() + told[1:]}; got {shown(first.get('input'))}.{more}"


def _where(parts: Sequence[str | int]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "The body"
