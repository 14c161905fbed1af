"""Texts that go into a slim model and answers that come out, served by torch or exported. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from .errors import UserError

__all__ = ["Prediction", "Text", "check_texts", "refuse_bare"]

Text: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True)
class Prediction:
    """The answer to one text.

    Attributes:
        label: The class's name; None for a regression.
        score: Its probability, by the exit's temperature; for a regression the value.
        exit_block: The block that it left after.
    """

    label: str | None
    score: float
    exit_block: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return asdict(self)


def refuse_bare(texts: Iterable[Text]) -> None:
    """Refuse one text where several are expected: its letters would be answered one by one.

    Raises:
        UserError: It is one text.
    """
    if isinstance(texts, str):
        raise UserError("predict takes a list of texts, and got one text. Put it into a list.")


def check_texts(texts: Sequence[Text], first: int = 0) -> None:
    """Refuse texts that cannot be answered.

    Args:
        texts: Texts, or pairs of texts.
        first: How many came before them.

    Raises:
        UserError: One is empty, or texts and pairs are mixed.
    """
    for number, text in enumerate(texts, first + 1):
        if not (text if isinstance(text, str) else text[0]).strip():
            raise UserError(f"Text {number} is empty.")
    if len({isinstance(text, str) for text in texts}) > 1:
        raise UserError("Texts and pairs of texts are mixed. Give all of one kind.")
