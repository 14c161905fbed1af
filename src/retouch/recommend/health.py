"""Whether a catalogue's codes are fit to train on, said before any training: collapse and collisions are errors here.

A generator cannot be better than its codes. Few used codes, or many items with the same ones, show up much later as bad
recommendations that no training repairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..report import Table
from .tokenise import Catalogue, digit_size, sharing
from .trie import Trie

__all__ = ["Health", "Level", "examine", "examine_catalogue", "require"]

LEAST_USED, LEAST_PERPLEXITY, GOOD_PERPLEXITY = 0.5, 0.2, 0.4
MOST_SHARING, GOOD_SHARING = 0.6, 0.25
GOOD_PURITY = 1.5


@dataclass(frozen=True)
class Level:
    """One level of codes.

    Args:
        size: How many codes it has.
        used: How many of them some item has.
        perplexity: How many equally frequent codes would be as hard to guess.
        largest_share: Share of the items with the most frequent code.
        residual_share: Share of the vectors' length that the code leaves over; None: not known.
    """

    size: int
    used: int
    perplexity: float
    largest_share: float
    residual_share: float | None = None


@dataclass(frozen=True)
class Health:
    """Hold what was found about a catalogue's codes.

    Args:
        n_items: How many items there are.
        levels: The levels, without the digit.
        unique_share: Different codes, by items.
        sharing_share: Share of the items that share all their codes with another.
        group_sizes: How many groups there are of 1, 2, ... items with equal codes.
        digit: How many items of one group the last digit tells apart.
        nodes: Prefixes of 0, 1, ... codes.
        equal_text_share: Share of the items whose text another item has too; None: texts were not given.
        purity: How much likelier two items with the same first code are of one category; None: not known.
        problems: Why these codes should not be trained on.
        warnings: What may cost quality.
    """

    n_items: int
    levels: tuple[Level, ...]
    unique_share: float
    sharing_share: float
    group_sizes: dict[int, int]
    digit: int
    nodes: tuple[int, ...]
    equal_text_share: float | None
    purity: float | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        found = asdict(self)
        found["group_sizes"] = {str(size): count for size, count in self.group_sizes.items()}
        return {name: [*value] if isinstance(value, tuple) else value for name, value in found.items()}

    def tables(self) -> tuple[Table, Table]:
        """Return the levels, and what concerns all of them, as tables."""
        rows = tuple(
            (i, v.size, v.used, round(v.perplexity, 1), round(v.largest_share, 4), _rounded(v.residual_share))
            for i, v in enumerate(self.levels)
        )
        columns = ("level", "codes", "used", "perplexity", "largest share", "left over")
        largest = max(self.group_sizes)
        whole = (
            ("items", self.n_items),
            ("different codes, share", round(self.unique_share, 4)),
            ("items that share codes, share", round(self.sharing_share, 4)),
            ("largest group", largest),
            ("items that the digit tells apart", self.digit),
            ("items with equal text, share", _rounded(self.equal_text_share)),
            ("purity of the first code", _rounded(self.purity)),
            *((f"prefixes of {i} codes", n) for i, n in enumerate(self.nodes) if i),
        )
        caption = " ".join((*self.problems, *self.warnings)) or "Nothing stands out."
        return Table("Codes by level", columns, rows), Table("Codes of all items", ("", "value"), whole, caption)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def examine(
    codes: NDArray[np.integer],
    sizes: Sequence[int],
    *,
    digit: int | None = None,
    residual_shares: Sequence[float] | None = None,
    texts: Sequence[str] | None = None,
    categories: Sequence[Sequence[str]] | None = None,
) -> Health:
    """Measure codes before anything is trained on them.

    Args:
        codes: A tokeniser's codes, without the digit; [items, levels].
        sizes: How many codes each level has.
        digit: How many items of one group the digit tells apart; None: as many as `tokenise.digit_size` says.
        residual_shares: What each level leaves over, from the tokeniser.
        texts: The items' texts: equal ones cannot get different codes.
        categories: The items' categories, of which the first counts; an item may have none.

    Raises:
        UserError: There are no items.

    Example:
        >>> examine(np.zeros((40, 2), int), (8, 8)).problems[0]
        'Level 0 uses 1 of 8 codes (at least 50% are needed): the tokeniser collapsed.'
    """
    if codes.ndim != 2 or not codes.size:
        raise UserError(f"There are no codes to examine; got an array of shape {codes.shape}.")
    groups = sharing(codes)
    counts = np.bincount(groups)
    group_sizes = {size: int(count) // size for size, count in enumerate(counts) if count}
    shares = residual_shares if residual_shares is not None else [None] * len(sizes)
    levels = tuple(_level(column, size, share) for column, size, share in zip(codes.T, sizes, shares))
    digit = digit_size(len(counts) - 1) if digit is None else digit
    shared = float((groups > 1).mean())
    purity = None if categories is None else _purity(codes[:, 0], categories)
    return Health(
        n_items=len(codes),
        levels=levels,
        unique_share=sum(group_sizes.values()) / len(codes),
        sharing_share=shared,
        group_sizes=group_sizes,
        digit=digit,
        nodes=Trie.of(np.unique(codes, axis=0)).n_nodes,
        equal_text_share=None if texts is None else _equal_share(texts),
        purity=purity,
        problems=tuple(_problems(levels, shared, len(counts) - 1, digit)),
        warnings=tuple(_warnings(levels, shared, purity)),
    )


def examine_catalogue(catalogue: Catalogue, **known: Any) -> Health:
    """Measure a catalogue's codes; the named arguments are those of `examine`."""
    return examine(catalogue.codes[:, :-1], catalogue.sizes[:-1], digit=catalogue.sizes[-1], **known)


def require(health: Health, force: bool = False) -> None:
    """Refuse codes that are not fit to train on.

    Args:
        health: What was measured.
        force: Go on all the same.

    Raises:
        UserError: There are problems, and `force` does not allow them.
    """
    if health.problems and not force:
        raise UserError(
            f"These codes are not fit to train on. {' '.join(health.problems)} "
            "Look at the items' texts and vectors, change the tokeniser's settings, or go on all the same with force."
        )


def _level(column: NDArray[np.integer], size: int, share: float | None) -> Level:
    counts = np.bincount(column)
    p = counts[counts > 0] / len(column)
    return Level(int(size), len(p), float(np.exp(-(p * np.log(p)).sum())), float(p.max()), share)


def _problems(levels: Sequence[Level], shared: float, largest: int, digit: int) -> list[str]:
    found = []
    for i, level in enumerate(levels):
        if level.used < LEAST_USED * level.size:
            found.append(
                f"Level {i} uses {level.used} of {level.size} codes (at least {LEAST_USED:.0%} are needed): "
                "the tokeniser collapsed."
            )
        elif level.perplexity < LEAST_PERPLEXITY * level.size:
            found.append(
                f"Level {i} has {level.size} codes and a perplexity of {level.perplexity:.1f} (at least "
                f"{LEAST_PERPLEXITY:.0%} of them are needed): few codes hold nearly all items."
            )
    if shared > MOST_SHARING:
        found.append(f"{shared:.0%} of the items share all codes with another (at most {MOST_SHARING:.0%} may).")
    if largest > digit:
        found.append(f"{largest} items share all codes, and the last digit tells only {digit} apart.")
    return found


def _warnings(levels: Sequence[Level], shared: float, purity: float | None) -> list[str]:
    found = [
        f"Level {i} has a perplexity of {level.perplexity:.1f}, below {GOOD_PERPLEXITY:.0%} of its {level.size} codes."
        for i, level in enumerate(levels)
        if level.perplexity < GOOD_PERPLEXITY * level.size
    ]
    if shared > GOOD_SHARING:
        found.append(f"{shared:.0%} of the items share all codes with another.")
    if purity is not None and purity < GOOD_PURITY:
        found.append(
            f"Items with the same first code are only {purity:.2f} times likelier to be of one category than any two: "
            "the vectors say little about what the items are."
        )
    return found


def _equal_share(texts: Sequence[str]) -> float:
    _, places, counts = np.unique(np.array(texts, dtype=np.str_), return_inverse=True, return_counts=True)
    return float((counts[places] > 1).mean())


def _purity(first: NDArray[np.integer], categories: Sequence[Sequence[str]]) -> float | None:
    """Divide P(same category, given the same first code) by P(same category), over pairs of different items."""
    named = np.array([bool(names) for names in categories])
    if named.sum() < 2:
        return None
    names = np.array([names[0] for names in categories if names], dtype=np.str_)
    label = np.unique(names, return_inverse=True)[1]
    code = first[named].astype(np.int64)
    both = code * (int(label.max()) + 1) + label
    alike, together = _pairs(label) / _pairs(np.zeros_like(label)), _pairs(code)
    return _pairs(both) / together / alike if together and alike else None


def _pairs(labels: NDArray[np.integer]) -> float:
    counts = np.unique(labels, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum())
