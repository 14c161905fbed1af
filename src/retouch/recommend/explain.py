"""Reasons for a recommendation: what this model would have said had something been otherwise, and nothing more.

What if an item were missing from the history; if nothing were known; if one part of what is known were not heard. The
model is asked each of these again. Attention is not shown: it is no reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .beam import Found, search
from .filters import Living
from .groups import Group
from .metrics import paired
from .new_items import code_log_probs, stepper

if TYPE_CHECKING:
    from .bundle import Bundle
    from .fusion import Fusion
    from .generator import Generator, Memory

__all__ = ["Part", "Reason", "Sanity", "Standing", "Without", "parts", "sanity", "why", "with_parts"]

_NAMED = 3
Groups = Mapping[tuple[int, int], Group]


@dataclass(frozen=True)
class Without:
    """What would be without one item of the history.

    Attributes:
        id: The item's raw id.
        title: Its name.
        drop: By how many nats the recommended item's score would fall; negative where it would rise.
        place: Where the recommended item would stand; None: not among those that the search keeps.
    """

    id: str
    title: str
    drop: float
    place: int | None


@dataclass(frozen=True)
class Part:
    """What would be if one instruction's knowledge were not heard.

    Attributes:
        book: Which instruction, from 0.
        word: Which word of its book the user holds.
        drop: By how many nats the item's score would fall.
    """

    book: int
    word: int
    drop: float


@dataclass(frozen=True)
class Standing:
    """How one recommender sees an item.

    Attributes:
        score: Its log-likelihood, in nats.
        place: Where it stands among the items that may be shown; None: not among those that the search keeps.
    """

    score: float
    place: int | None


@dataclass(frozen=True)
class Reason:
    """The counterfactuals of one recommended item.

    Attributes:
        id: Its raw id.
        title: Its name.
        served: How the answer sees it, before any rule of the shop.
        history: The items of the history that it owes most to, most first.
        without_knowledge: How the same network sees it with nothing known of the user.
        reference: How the recommender that was trained without knowledge sees it.
        with_knowledge: Whether the answer used knowledge.
        beams: How many places the search knows.
        parts: The instructions, most important first; empty unless the language model was at hand.
    """

    id: str
    title: str
    served: Standing
    history: tuple[Without, ...]
    without_knowledge: Standing
    reference: Standing
    with_knowledge: bool
    beams: int = 50
    parts: tuple[Part, ...] = ()

    def sentence(self, groups: Groups | None = None) -> str:
        """Say it in one sentence.

        Args:
            groups: The names of the groups of users, from `name_groups`.
        """
        told = [f"{self.title}: place {self._at(self.served.place)}"]
        if self.history and self.history[0].drop > 0:
            first = self.history[0]
            told.append(f"without {first.title} in the history it would be at {self._at(first.place)}")
        if self.with_knowledge:
            told.append(f"without the language model's knowledge at {self._at(self.without_knowledge.place)}")
        if self.parts and self.parts[0].drop > 0:
            told.append(f"the knowledge that mattered most is that of {_group(self.parts[0], groups)}")
        return "; ".join(told) + "."

    def _at(self, place: int | None) -> str:
        return str(place) if place else f"{self.beams + 1} or later"

    def to_dict(self, groups: Groups | None = None) -> dict[str, Any]:
        """Return plain values that JSON can hold, with the sentence and the names of the parts' groups."""
        told = [{**asdict(part), "group": str(_group(part, groups))} for part in self.parts]
        return {**asdict(self), "parts": told, "sentence": self.sentence(groups)}


def _group(part: Part, groups: Groups | None) -> Group:
    return (groups or {}).get((part.book, part.word), Group(part.book, part.word, 0, (), ()))


# ---------------------------------------------------------------- history and knowledge


@torch.no_grad()
def why(
    bundle: Bundle,
    window: NDArray[np.int32],
    items: Sequence[int],
    residual: Tensor | None = None,
    *,
    allowed: NDArray[np.bool_] | None = None,
    hidden: NDArray[np.int32] | None = None,
    beams: int = 50,
) -> list[Reason]:
    """Explain why some items were recommended for one history.

    Use when: an answer of the ladder is to be explained; give it the residual that answered, None where the reference
        did.

    Known problems: knowledge is kept as it is when an item is taken out of the history, so an item that spoke through
        the knowledge alone is not found. Places beyond the beams are not known.

    Args:
        bundle: What recommended.
        window: Item numbers, 0 = padding on the left; [history].
        items: The numbers of the items to explain.
        residual: What knowledge added to the first decoder input; [d_model].
        allowed: Items that may be shown, by number; [items + 1]. None: all.
        hidden: Items that this user must not be shown.
        beams: Places that are known.

    Returns:
        One reason for each item.

    Raises:
        UserError: The history is empty.
    """
    taken = np.flatnonzero(window)
    if not len(taken):
        raise UserError("An empty history explains nothing; its items are the most popular ones.")
    if not len(items):
        return []
    room = _Room(bundle, allowed, hidden, beams)
    served = bundle.reference if residual is None else bundle.policy
    answered = room.ask(
        served, np.stack([window, *(_without(window, place) for place in taken.tolist())]), items, residual
    )
    silent = answered if residual is None else room.ask(served, window[None], items, None)
    reference = answered if residual is None else room.ask(bundle.reference, window[None], items, None)
    reasons = []
    for j, number in enumerate(items):
        item, column = bundle.items[number - 1], [row[j] for row in answered]
        named = _history(bundle, window[taken], column)
        standings = (silent[0][j], reference[0][j])
        reasons.append(Reason(item.id, item.title, column[0], named, *standings, residual is not None, beams))
    return reasons


def _history(bundle: Bundle, taken: NDArray[np.int32], column: Sequence[Standing]) -> tuple[Without, ...]:
    """Return the items whose absence costs one item most, of how it stands with all and without each."""
    drops = np.array([column[0].score - other.score for other in column[1:]])
    gone = [(bundle.items[taken[i] - 1], i) for i in np.argsort(-drops, kind="stable")[:_NAMED]]
    return tuple(Without(item.id, item.title, float(drops[i]), column[i + 1].place) for item, i in gone)


def _without(window: NDArray[np.int32], place: int) -> NDArray[np.int32]:
    """Take one item out; what stands before it moves up, so that the latest items stay last."""
    found = window.copy()
    found[1 : place + 1] = window[:place]
    found[0] = 0
    return found


class _Room:
    """The items that one user may be shown, and questions about them."""

    def __init__(
        self, bundle: Bundle, allowed: NDArray[np.bool_] | None, hidden: NDArray[np.int32] | None, beams: int
    ) -> None:
        self.bundle, self.allowed, self.hidden, self.beams = bundle, allowed, hidden, beams

    def ask(
        self, network: Generator, windows: NDArray[np.int32], items: Sequence[int], residual: Tensor | None
    ) -> list[list[Standing]]:
        """Return for each window how each item stands."""
        n = len(windows)
        residuals = None if residual is None else residual.expand(n, -1)
        memory = network.eval().encode(torch.from_numpy(windows))
        asked = torch.tensor(items).expand(n, -1)
        scores = code_log_probs(network, memory, asked, residuals, self.bundle.catalogue).sum(-1).double().tolist()
        found = self._search(network, memory, residuals)
        return [[Standing(scores[i][j], _place(found, i, item)) for j, item in enumerate(items)] for i in range(n)]

    def first(self, window: NDArray[np.int32]) -> int:
        """Return the item that the policy without knowledge recommends first."""
        network = self.bundle.policy.eval()
        return int(self._search(network, network.encode(torch.from_numpy(window[None])), None).items[0, 0])

    def _search(self, network: Generator, memory: Memory, residuals: Tensor | None) -> Found:
        steps = stepper(network, memory, residuals, self.bundle.catalogue)
        n = len(memory)
        return search(
            steps, self.bundle.catalogue.trie, n, beams=self.beams, living=self._living(n), device=memory.mask.device
        )

    def _living(self, n: int) -> Living:
        seen = None if self.hidden is None else np.repeat(self.hidden[None], n, 0)
        return Living.of(self.bundle.catalogue.trie, self.allowed, seen)


def _place(found: Found, row: int, item: int) -> int | None:
    at = (found.items[row] == item).nonzero()
    return int(at[0]) + 1 if len(at) else None


# ---------------------------------------------------------------- which knowledge


@torch.no_grad()
def parts(
    bundle: Bundle,
    window: NDArray[np.int32],
    items: Sequence[int],
    states: Tensor,
    codes: Sequence[int],
) -> list[tuple[Part, ...]]:
    """Ask which instruction's knowledge an item owes most to, by not hearing one at a time.

    Use when: the language model is at hand; the states are those of `KnowledgeSource.states` for this user.

    Shapes:
        states: [books, d_llm]

    Args:
        bundle: Opened with its fusion.
        window: Item numbers; [history].
        items: The items to explain.
        states: What the language model says at each instruction.
        codes: The words that the user holds.

    Returns:
        For each item all parts, most important first.

    Raises:
        UserError: The bundle was opened without its fusion, or states and codes do not belong together.
    """
    if bundle.fusion is None:
        raise UserError("The bundle was opened without its fusion. Open it with the language model that it names.")
    if len(states) != len(codes):
        raise UserError(f"{len(states)} states were given for {len(codes)} instructions; each needs one.")
    fusion: Any = bundle.fusion
    residuals = _heard(fusion, bundle.policy.first, states)
    n = len(residuals)
    memory = bundle.policy.eval().encode(torch.from_numpy(np.repeat(window[None], n, 0)))
    targets = torch.tensor(items).expand(n, -1)
    scores = code_log_probs(bundle.policy, memory, targets, residuals, bundle.catalogue).sum(-1).double()
    drops = (scores[:1] - scores[1:]).cpu().numpy()  # [books, items]
    order = np.argsort(-drops, axis=0, kind="stable")
    return [tuple(Part(int(k), int(codes[k]), float(drops[k, j])) for k in order[:, j]) for j in range(len(items))]


def _heard(fusion: Fusion, first: Tensor, states: Tensor) -> Tensor:
    """Return the residual of all states, then that without each of them; without the only one it is zero."""
    books = len(states)
    mask = torch.cat([torch.ones(1, books), 1 - torch.eye(books)]).bool().to(states.device)
    found = fusion(first, states.expand(books + 1, -1, -1), mask)
    return torch.where(mask.any(1, keepdim=True), found, torch.zeros_like(found))


@torch.no_grad()
def with_parts(
    bundle: Bundle, window: NDArray[np.int32], items: Sequence[int], reasons: Sequence[Reason]
) -> list[Reason]:
    """Ask the language model about a history, and add to each reason which instruction's knowledge mattered.

    Nothing is added where its states are not those of the instructions but of the titles (``order="prefix"``).

    Args:
        bundle: Opened with its language model.
        window: Item numbers; [history].
        items: The items that the reasons explain.
        reasons: From `why`.
    """
    knowing: Any = bundle.knowing
    windows = torch.from_numpy(window[None]).to(bundle.policy.first.device)
    chosen = knowing.choose(windows)
    states, codes = knowing.source.states(chosen.tokens, windows).states[0], chosen.codes[0].tolist()
    if not codes or len(states) != len(codes):
        return list(reasons)
    found = parts(bundle, window, items, states, codes)
    return [replace(reason, parts=held) for reason, held in zip(reasons, found)]


# ---------------------------------------------------------------- are the reasons any good?


@dataclass(frozen=True)
class Sanity:
    """Whether the items that are named as reasons matter more than others.

    Attributes:
        mean: How many nats more the score falls without the item that is named first than without a random one.
        lower: Lower end of its 95 % interval over users.
        upper: Upper end.
        n: How many users with at least two items there were.
    """

    mean: float
    lower: float
    upper: float
    n: int

    @property
    def holds(self) -> bool:
        """Whether it is certain that the named items matter more."""
        return self.lower > 0


def sanity(bundle: Bundle, windows: NDArray[np.int32], *, seed: int = 0, beams: int = 50) -> Sanity:
    """Check that the items named as reasons matter: take them out, and random others, and compare.

    A recommender that does not read its history fails this.

    Args:
        bundle: What recommends; asked without knowledge, of its first item for each history.
        windows: Histories; [users, history]. Those with fewer than two items are left out.
        seed: Of the random items and the interval.
        beams: Of the search.

    Raises:
        UserError: No history has two items.
    """
    kept = [window for window in windows if np.count_nonzero(window) > 1]
    if not kept:
        raise UserError("No history has two items; reasons can be compared only where there are.")
    room, chance = _Room(bundle, None, None, beams), np.random.default_rng(seed)
    rows = np.array([_named_and_random(room, window, chance) for window in kept])
    mean, lower, upper = paired(rows[:, :1], rows[:, 1:], seed=seed)[0].tolist()
    return Sanity(mean, lower, upper, len(rows))


@torch.no_grad()
def _named_and_random(room: _Room, window: NDArray[np.int32], chance: np.random.Generator) -> tuple[float, float]:
    """Return how far the score of the first item falls without the item named first, and without a random other."""
    best = room.first(window)
    others = np.stack([window, *(_without(window, place) for place in np.flatnonzero(window).tolist())])
    scores = np.array([row[0].score for row in room.ask(room.bundle.policy, others, [best], None)])
    drops = np.sort(scores[0] - scores[1:])
    return float(drops[-1]), float(chance.choice(drops[:-1]))
