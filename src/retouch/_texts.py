"""Texts that go into a slim model and answers that come out, served by torch or exported. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from .errors import UserError

__all__ = ["Prediction", "Text", "broken", "check_texts", "refuse_bare"]

Text: TypeAlias = str | tuple[str, str]
_HALF = re.compile("[\ud800-\udfff]")


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


def broken(text: str) -> bool:
    """Tell whether a text holds half of a character, as JSON and the command line may: no tokenizer reads it."""
    return _HALF.search(text) is not None


def check_texts(texts: Sequence[Text], first: int = 0, pairs: bool | None = None) -> None:
    """Refuse texts that cannot be answered.

    Args:
        texts: Texts, or pairs of texts.
        first: How many came before them.
        pairs: Whether the model was trained on pairs; None where that is not known.

    Raises:
        UserError: One is no text, empty, or holds half of a character; texts and pairs are mixed, or the model was
            trained on the other kind.
    """
    for number, text in enumerate(texts, first + 1):
        parts = (text,) if isinstance(text, str) else text
        if not isinstance(parts, tuple | list) or len(parts) > 2 or not all(isinstance(part, str) for part in parts):
            raise UserError(f"Text {number} is {text!r:.60}. Give a text, or a pair of texts.")
        if not parts or not parts[0].strip():
            raise UserError(f"Text {number} is empty.")
        if any(map(broken, parts)):
            raise UserError(f"Text {number} holds half of a character (a lone surrogate): {text!r:.60}. Correct it.")
    if len({isinstance(text, str) for text in texts}) > 1:
        raise UserError("Texts and pairs of texts are mixed. Give all of one kind.")
    if len(texts) and pairs is not None and pairs is isinstance(texts[0], str):
        got, wanted = ("a single text", "pairs of texts") if pairs else ("a pair", "single texts")
        raise UserError(
            f"Text {first + 1} is {got}, and this model was trained on {wanted}. In a line a tab makes a pair of two."
        )
