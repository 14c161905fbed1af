"""Which rows are held back from training, so that no held-back text is also trained on.

Rows of one text: a row may be a contiguous run of words of another row (the training rows of SST-2 are phrases of some
6,900 sentences). Held back are *roots*, rows that are a run of no other row, and whatever is a run of one leaves the
training rows. Rows of two texts share sentences; rows that are connected through shared sentences stay together.

Words are what white space separates, and case is ignored.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ._reading import Example

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

__all__ = ["Held", "Spans", "carve", "folded", "groups"]

MIN_WORDS = 10
"""Fewest words of a held-back root where most rows are phrases; a whole sentence is rarely shorter."""


def folded(text: str) -> str:
    r"""Write a text as it is compared: case and the amount of white space do not count.

    Example:
        >>> folded("Hide  new\tSecretions ")
        'hide new secretions'
    """
    return " ".join(text.casefold().split())


class Spans:
    """An index of texts that says how often each occurs, as a run of whole words, inside others.

    A sorted list of all suffixes, by prefix doubling. Each text stands in it twice, once closed by a mark below all
    words and once by a mark above them, and its occurrences are what sorts in between. With N words in all texts and
    M in the longest the cost is log2(M) sorts of 2N numbers and about 150 bytes a word: less than two seconds on one
    core for the 67,349 rows of SST-2 (633,000 words).

    Args:
        texts: Already `folded`; equal ones are one text.

    Example:
        >>> spans = Spans(["a b c", "b c", "c a"])
        >>> spans.inside(["a b c"]).tolist()
        [1, 1, 0]
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        vocabulary: dict[str, int] = {}
        number = vocabulary.setdefault
        words = [[number(word, len(vocabulary) + 1) for word in text.split()] for text in self.rows]
        self.lengths = np.array([len(row) for row in words], np.int64)
        flat = np.fromiter((word for row in words for word in row), np.int64, int(self.lengths.sum()))
        self._of_word = np.repeat(np.arange(len(words)), self.lengths)
        self._word_at = np.arange(len(flat)) + self._of_word  # one closing mark stands after each text
        n = len(flat) + len(words)
        self._starts = np.cumsum(self.lengths + 1) - self.lengths - 1
        symbols = np.zeros(2 * n, np.int64)
        symbols[self._word_at] = symbols[n + self._word_at] = flat
        symbols[n + self._starts + self.lengths] = len(vocabulary) + 1
        ends = np.repeat(self._starts + self.lengths, self.lengths + 1)
        self._rank = _ranks(symbols, np.concatenate([ends, ends + n]), int(self.lengths.max(initial=0)) + 1)
        self._n = n

    def inside(self, texts: Iterable[str] | None = None) -> Ints:
        """Count for each text of the index how often it occurs in `texts`, itself included; None means all.

        Args:
            texts: Folded texts of the index.

        Returns:
            One count a text, in the order of the index.
        """
        weights = np.ones(len(self.rows), np.int64)
        if texts is not None:
            weights[:] = 0
            weights[[self.rows[text] for text in texts]] = 1
        counts = np.bincount(self._rank[self._word_at] + 1, weights[self._of_word], int(self._rank.max(initial=0)) + 2)
        below = np.cumsum(counts.astype(np.int64))  # below[r]: weighted suffixes with a rank under r
        found: Ints = below[self._rank[self._n + self._starts]] - below[self._rank[self._starts]]
        return found

    def roots(self) -> list[str]:
        """List the texts that occur in no other one, in the order of the index."""
        alone = self.inside() == 1
        return [text for text, root in zip(self.rows, alone) if root]


def _ranks(symbols: Ints, ends: Ints, longest: int) -> Ints:
    """Rank every suffix up to the end of its own text; equal suffixes share a rank, from 0."""
    rank = symbols
    width = 1
    while width < longest:
        ahead = np.arange(len(rank)) + width
        within = ahead <= ends
        tail = np.where(within, rank[np.where(within, ahead, 0)] + 1, 0)
        rank = _dense(rank * (int(tail.max(initial=0)) + 1) + tail)
        width *= 2
    return rank


def _dense(keys: Ints) -> Ints:
    order = np.argsort(keys)
    steps = np.zeros(len(keys), np.int64)
    in_order = keys[order]
    np.cumsum(in_order[1:] != in_order[:-1], out=steps[1:])
    dense = np.empty_like(steps)
    dense[order] = steps
    return dense


# Which rows overlap, and which are drawn together


class _Singles:
    """Rows of one text: near is a row that is a run of another; a unit is a root."""

    unit = "roots"

    def __init__(self, train: Sequence[Example], others: Sequence[Example]) -> None:
        self._texts = [folded(example.text) for example in train]
        self._spans = Spans([*self._texts, *(folded(example.text) for example in others)])
        self._row = {text: row for row, text in reversed([*enumerate(self._texts)])}

    def near(self, held: Iterable[Example]) -> list[bool]:
        """Say of each training row whether it is a run of words of a held text."""
        found = self._spans.inside({folded(example.text) for example in held}) > 0
        return [bool(found[self._spans.rows[text]]) for text in self._texts]

    def units(self, pool: Sequence[int], needed: int) -> tuple[list[list[int]], dict[str, int]]:
        """List the rows that may be drawn; where most texts are phrases, only those of ten words and more."""
        distinct = dict.fromkeys(self._texts[row] for row in pool)
        counts = self._spans.inside(distinct)
        roots = [text for text in distinct if counts[self._spans.rows[text]] == 1]
        long = [text for text in roots if len(text.split()) >= MIN_WORDS]
        phrases = len(roots) < len(distinct) / 2 and len(long) >= needed
        facts = {"distinct": len(distinct), "roots": len(roots), "min_words": MIN_WORDS if phrases else 1}
        return [[self._row[text]] for text in (long if phrases else roots)], facts


class _Pairs:
    """Rows of two texts: near is a row that shares a text; a unit is a group connected by shared texts."""

    unit = "groups"

    def __init__(self, train: Sequence[Example], others: Sequence[Example]) -> None:
        del others
        self._texts = [_sentences(example) for example in train]

    def near(self, held: Iterable[Example]) -> list[bool]:
        """Say of each training row whether it shares a text with a held row."""
        texts = {text for example in held for text in _sentences(example)}
        return [not texts.isdisjoint(own) for own in self._texts]

    def units(self, pool: Sequence[int], needed: int) -> tuple[list[list[int]], dict[str, int]]:
        """List the groups of rows that are drawn together."""
        del needed
        found = [[pool[i] for i in group] for group in groups([self._texts[row] for row in pool])]
        return found, {"groups": len(found), "largest": max(map(len, found))}


def _sentences(example: Example) -> tuple[str, ...]:
    return tuple(folded(text) for text in (example.text, example.pair) if text)


def groups(rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Group rows that are connected through shared texts, directly or through other rows.

    Returns:
        The rows' numbers, group by group, in the order of their first rows.

    Example:
        >>> groups([("a", "b"), ("c", "d"), ("b", "e")])
        [[0, 2], [1]]
    """
    above = list(range(len(rows)))

    def top(row: int) -> int:
        while above[row] != row:
            above[row] = above[above[row]]
            row = above[row]
        return row

    first: dict[str, int] = {}
    for row, texts in enumerate(rows):
        for text in texts:
            one, other = sorted((top(first.setdefault(text, row)), top(row)))
            above[other] = one
    found: dict[int, list[int]] = {}
    for row in range(len(rows)):
        found.setdefault(top(row), []).append(row)
    return list(found.values())


# Drawing


@dataclass(frozen=True)
class Held:
    """Numbers of the training file's rows by what they are for, and how they were drawn.

    Attributes:
        train: What is left to train on, in the file's order.
        valid, calib: The rows drawn.
        facts: How, as plain values.
    """

    train: list[int]
    valid: list[int]
    calib: list[int]
    facts: dict[str, Any]


def carve(
    train: Sequence[Example],
    *,
    n_calib: int,
    n_valid: int,
    seed: int = 0,
    given: Sequence[Example] = (),
    test: Sequence[Example] = (),
    keep_overlap: bool = False,
) -> Held:
    """Draw `calib` and `valid` from training rows, and drop from these whatever overlaps with them.

    Args:
        train: All rows of the training file.
        n_calib: Rows to draw for `calib`. Of pairs, whole groups are drawn as long as they fit.
        n_valid: Rows to draw for `valid`.
        seed: Decides the draw.
        given: Rows of `valid` or `calib` files: what overlaps with them is dropped first.
        test: Rows of the test file: overlaps with it are counted and stay.
        keep_overlap: Keep training rows that overlap with `given`.

    Raises:
        UserError: There are too few rows for that, or none is left to train on.
    """
    kind = _Singles if all(example.pair is None for example in train) else _Pairs
    rows: _Singles | _Pairs = kind(train, [*given, *test])
    near = rows.near(given) if given and not keep_overlap else [False] * len(train)
    pool = [row for row, gone in enumerate(near) if not gone]
    if not pool:
        raise UserError("Every training row overlaps with the rows given for valid or calib. Give other files.")
    facts: dict[str, Any] = {"unit": rows.unit, "rows": len(train), "overlap_given": len(train) - len(pool)}
    calib, valid = [], []
    if n_calib + n_valid:
        units, counts = rows.units(pool, n_calib + n_valid)
        facts |= counts
        calib, valid = _draw(units, (n_calib, n_valid), random.Random(f"{seed} held"), rows.unit)
        near = rows.near([train[row] for row in (*calib, *valid)])
        left = [row for row in pool if not near[row]]
        facts["dropped"] = len(pool) - len(left) - len(calib) - len(valid)
        pool = left
    if not pool:
        raise UserError("No row is left to train on: all others overlap with those held back. Lower n_calib, n_valid.")
    if test:
        overlap = rows.near(test)
        facts["overlap_test"] = sum(overlap[row] for row in pool)
    return Held(pool, valid, calib, facts)


def _draw(units: list[list[int]], sizes: Sequence[int], chance: random.Random, unit: str) -> list[list[int]]:
    """Fill each size with whole units in a random order; a unit that no longer fits is passed over."""
    order = chance.sample(units, len(units))
    drawn = []
    for size in sizes:
        rows: list[int] = []
        passed = []
        for group in order:
            if len(rows) + len(group) <= size:
                rows.extend(group)
            else:
                passed.append(group)
        if len(rows) < min(size, 1) or (len(rows) < size and not passed):
            raise UserError(
                f"{sum(sizes)} rows are to be held back, and the training rows have only {len(units)} {unit} to draw "
                "from. Lower n_calib and n_valid, or give files for them."
            )
        drawn.append(rows)
        order = passed
    return drawn
