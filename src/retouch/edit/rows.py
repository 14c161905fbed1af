"""A fact as rows of tokens: one row a left context, and where its edited token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import FactError
from ..model import Model
from ..tokens import Bos, Row, Text, encode
from .contexts import Context
from .facts import Fact

__all__ = ["Position", "Problem", "grouped", "problems", "require_subjects"]

Position = Literal["subject", "prompt"]


@dataclass(frozen=True)
class Problem:
    """One fact as rows.

    Attributes:
        fact: What is to become true.
        rows: One row a context, all targets included; the first is the bare prompt where it may be used.
        weights: Each row's weight in the mean key; they sum to 1.
        position: Where the value is added.
        kl: The row ``{subject} is a``, or None without a subject.
        kl_at: That row's edited token: the subject's last, or the row's last for a value at the prompt's end.
        notes: What a person should know: a merged token, a bare prompt that is not covered.
    """

    fact: Fact
    rows: tuple[Row, ...]
    weights: tuple[float, ...]
    position: Position
    kl: Row | None
    kl_at: int = 0
    notes: tuple[str, ...] = ()

    def anchor(self, row: Row) -> int:
        """Return the index of the row's edited token."""
        index = row.subject if self.position == "subject" else row.prompt
        assert index is not None  # problems() has refused facts without a subject
        return index

    @property
    def anchors(self) -> list[int]:
        """The edited token of every row."""
        return [self.anchor(row) for row in self.rows]


def problems(
    model: Model, facts: Sequence[Fact], contexts: Sequence[Context], position: Position, bos: Bos = "tokenizer"
) -> list[Problem]:
    """Turn facts into rows.

    A row whose edited token is the very first token of the text is left out while another row exists: its key is the
    attention sink's and has nothing to do with the subject.

    Raises:
        FactError: The position is the subject's and a fact has none.
    """
    if position == "subject":
        require_subjects(facts)
    texts = [Text(f.before, f.subject, f.after, f.target, c.text) for f in facts for c in contexts]
    rows = encode(model.tokenizer, texts, bos)
    n = len(contexts)
    return [_problem(model, f, rows[i * n : (i + 1) * n], contexts, position, bos) for i, f in enumerate(facts)]


def require_subjects(facts: Sequence[Fact]) -> None:
    """Refuse facts without a subject.

    Raises:
        FactError: With the first of them.
    """
    for fact in facts:
        if not fact.subject:
            raise FactError(
                f"The fact {fact.prompt!r} has no subject; this method writes at the subject's last token. "
                "Name the subject, or use rets or ft_m."
            )


def _problem(
    model: Model, fact: Fact, rows: list[Row], contexts: Sequence[Context], position: Position, bos: Bos
) -> Problem:
    notes = []
    at = [r.subject if position == "subject" else r.prompt for r in rows]
    kept = [i for i, a in enumerate(at) if a != 0]
    if len(kept) < len(rows):
        left_out = (
            "that row is not covered" if kept else "the write reaches every text without a beginning-of-text token"
        )
        notes.append(
            f"The edited token opens the bare prompt, where its key is the attention sink's: {left_out}. "
            "Put a word before the subject, or use bos='always'."
        )
    kept = kept or list(range(len(rows)))
    if any(rows[i].merged for i in kept):
        notes.append("A token straddles the subject's or the prompt's end (merged_token).")
    total = sum(contexts[i].weight for i in kept)
    kl, kl_at = None, 0
    if fact.subject:
        opens = _opens(model, fact, bos)
        lead = next((c.text for c in contexts if c.text), "") if opens else ""
        alone = opens and not lead and bos == "tokenizer" and model.tokenizer.bos_token_id is not None
        kl = encode(model.tokenizer, [Text("", fact.subject, " is a", context=lead)], "always" if alone else bos)[0]
        kl_at = kl.prompt if position == "prompt" else kl.subject or 0
    return Problem(
        fact,
        tuple(rows[i] for i in kept),
        tuple(contexts[i].weight / total for i in kept),
        position,
        kl,
        kl_at,
        tuple(notes),
    )


def _opens(model: Model, fact: Fact, bos: Bos) -> bool:
    """Whether the subject is one token that opens the row ``{subject} is a``, where it would be the attention sink."""
    return encode(model.tokenizer, [Text("", fact.subject, " is a")], bos)[0].subject == 0


def grouped(facts: Sequence[Fact]) -> list[list[int]]:
    """Put facts of one subject together, in order of first appearance; a fact without a subject stands alone."""
    groups: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        groups.setdefault(fact.subject.strip() or f"\n{i}", []).append(i)
    return list(groups.values())
