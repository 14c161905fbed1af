"""What a recommendation is asked with and answered with: plain values, the same for library, command line and service.

Nothing here loads torch. A request is checked when it is made, so whoever answers it can rely on every field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .._gate import shown
from ..errors import UserError
from ..tokens import broken

__all__ = [
    "MOST_HISTORY",
    "MOST_K",
    "MOST_LISTED",
    "RUNGS",
    "Answer",
    "Filters",
    "Place",
    "Request",
    "Rung",
    "check_id",
]

Rung = Literal["fresh", "stale", "prototype", "reference", "popular"]
RUNGS: tuple[Rung, ...] = ("fresh", "stale", "prototype", "reference", "popular")

MOST_K, MOST_HISTORY, MOST_LISTED, MOST_ID = 100, 1000, 1000, 256


@dataclass(frozen=True)
class Filters:
    """Which items one request allows.

    Attributes:
        categories: An item needs one of these; empty: any.
        allow: Only these raw ids; None: all.
        deny: Not these raw ids.
        in_stock: Leave out what the server knows to be out of stock.
    """

    categories: tuple[str, ...] = ()
    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    in_stock: bool = True

    def __post_init__(self) -> None:
        for name in ("categories", "allow", "deny"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _texts(f"filters.{name}", value, MOST_LISTED))
        _boolean("filters.in_stock", self.in_stock)


@dataclass(frozen=True)
class Request:
    """One question for recommendations.

    Attributes:
        user: Raw id; None for somebody who is known by a history alone.
        history: Raw ids of what the user took, oldest first; None: what the store knows of the user.
        k: How many items are wanted.
        filters: Which items may be named.
        explain: Whether reasons are wanted.

    Raises:
        UserError: A field is of the wrong type, empty, too long or no text at all; the message names it.

    Example:
        >>> Request(history=["i1", "i2"], k=3).history
        ('i1', 'i2')
    """

    user: str | None = None
    history: tuple[str, ...] | None = None
    k: int = 10
    filters: Filters = field(default_factory=Filters)
    explain: bool = False

    def __post_init__(self) -> None:
        if self.user is not None:
            check_id("user", self.user)
        if self.history is not None:
            object.__setattr__(self, "history", _texts("history", self.history, MOST_HISTORY))
        if not isinstance(self.k, int) or isinstance(self.k, bool) or not 1 <= self.k <= MOST_K:
            raise UserError(f"k must be a whole number from 1 to {MOST_K}; got {shown(self.k)}.")
        if not isinstance(self.filters, Filters):
            raise UserError(f"filters must be Filters; got {shown(self.filters)}.")
        _boolean("explain", self.explain)


@dataclass(frozen=True)
class Place:
    """One recommended item.

    Attributes:
        id: Its raw id.
        title: Its name for people.
        score: Log-likelihood in nats; of the rung ``popular``, how often the item was taken in training.
        sid: Its codes.
        moved: Whether a rule of the shop put it here and not the search.
    """

    id: str
    title: str
    score: float
    sid: tuple[int, ...]
    moved: bool = False


@dataclass(frozen=True)
class Answer:
    """What one request gets.

    Attributes:
        items: Best first; fewer than were asked for where fewer may be named.
        rung: How it was made; see `retouch.recommend.ladder`.
        exact: Whether these are proved to be the best of all items that may be named, in the model's own order.
        knowledge_age_s: Age of the user's knowledge; None where none was used.
        lag: How many items the knowledge does not know yet; None where none was used.
        bundle: Fingerprint of what answered.
        unknown_items: How many different ids of the history and the filters are not in the catalogue.
        note: A sentence about what is unusual; mostly empty.
        reasons: One for each item, where reasons were asked for; see `retouch.recommend.explain`.
    """

    items: tuple[Place, ...]
    rung: Rung
    exact: bool
    knowledge_age_s: float | None
    lag: int | None
    bundle: str
    unknown_items: int = 0
    note: str = ""
    reasons: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold; codes as lists."""
        told = asdict(self)
        told["items"] = [{**place, "sid": list(place["sid"])} for place in told["items"]]
        return {**told, "reasons": [dict(reason) for reason in self.reasons]}


def _boolean(where: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{where} must be true or false; got {shown(value)}.")


def _texts(where: str, values: object, most: int) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UserError(f"{where} must be a list of texts; got {shown(values)}.")
    if len(values) > most:
        raise UserError(f"{where} may hold at most {most} ids; got {len(values)}. Send the latest ones.")
    for i, value in enumerate(values):
        check_id(f"{where}[{i}]", value)
    return tuple(values)


def check_id(where: str, value: object) -> None:
    """Refuse what cannot be a raw id.

    Raises:
        UserError: It is no text, empty, too long, or no valid Unicode; the message begins with `where`.
    """
    if not isinstance(value, str):
        raise UserError(f"{where} must be text; got {shown(value)}. Ids are written in quotation marks.")
    if not 1 <= len(value) <= MOST_ID:
        raise UserError(f"{where} must have 1 to {MOST_ID} characters; got {len(value)}.")
    if broken(value):  # no store can keep it
        raise UserError(f"{where} is no valid Unicode text: {value!r}.")
