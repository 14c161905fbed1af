"""What a model writes about a fact: after its prompt, when asked in a conversation, and at length."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..change import Change, side_by_side
from ..lanes import Owners
from ..measure import continuations, ngram_entropy
from ..model import Model
from ..progress import report
from ._fact import joined
from .facts import Fact
from .instructions import conversations, end_of_turn

__all__ = ["Generated", "generate", "hit", "owned"]

EDIT_FORM_TOKENS = 16
INSTRUCTION_TOKENS = 32
FLUENCY_TOKENS = 100


@dataclass(frozen=True)
class Generated:
    """What a model writes about a fact.

    Attributes:
        said: Greedy continuation of the prompt, 16 tokens; empty where it was not asked for.
        bits: Mean n-gram entropy of its continued generation prompts; None when it has none.
        instructed: The greedy answer to each form of `instructions.FORMS`, 32 tokens; empty where none was asked for.
    """

    said: str
    bits: float | None
    instructed: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def owned(model: Model, changes: Sequence[Change] | None, each: Sequence[int]) -> Iterator[Owners | None]:
    """Put changes side by side and let text i carry change ``each[i]``; without changes nothing is done."""
    if not changes:
        yield None
        return
    with side_by_side(model, changes) as lanes:
        yield Owners(lanes, each)


def generate(
    model: Model,
    facts: Sequence[Fact],
    changes: Sequence[Change] | None = None,
    *,
    n_generations: int = 2,
    edit_form: bool = True,
    instructions: bool = False,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Generated]:
    """Let a model continue each fact's prompt and generation prompts, and answer when it is asked.

    Args:
        model: The model; with `changes`, the unedited one.
        facts: The facts.
        changes: A change for each fact: each is asked with its own change in force, many at once.
        n_generations: Generation prompts of each fact, continued to 100 tokens in all by seeded top-k 5; 0 leaves
            fluency out.
        edit_form: Continue the prompts.
        instructions: Ask in the five forms of `instructions.FORMS`.
        seed: Of the sampling.
        batch_size: Facts of one batch. Sampling draws for a whole batch, so the same batches give the same texts.
    """
    found: list[Generated] = []
    for start in range(0, len(facts), batch_size):
        part = facts[start : start + batch_size]
        own = changes[start : start + batch_size] if changes else None
        said, instructed = _asked(model, part, own, edit_form, instructions)
        bits = _fluency(model, part, own, n_generations, seed) if n_generations else [None] * len(part)
        found += [Generated(*each) for each in zip(said, bits, instructed)]
        report("Texts written", len(found), len(facts))
    return found


def _asked(
    model: Model, facts: Sequence[Fact], changes: Sequence[Change] | None, edit_form: bool, instructions: bool
) -> tuple[list[str], list[dict[str, str]]]:
    """Let every prompt and every conversation of all facts go on in one call."""
    prompts: list[str | tuple[int, ...]] = []
    place: list[tuple[int, str]] = []
    for i, fact in enumerate(facts):
        forms = conversations(model.tokenizer, fact) if instructions else {}
        prompts += [*([fact.filled] if edit_form else []), *forms.values()]
        place += [(i, name) for name in (*([""] if edit_form else []), *forms)]
    n_tokens = [INSTRUCTION_TOKENS if name else EDIT_FORM_TOKENS for _, name in place]
    stop = end_of_turn(model.tokenizer) if instructions else []
    with owned(model, changes, [i for i, _ in place]) as owners:
        new = continuations(model, prompts, n_tokens, stop=stop, owners=owners)
    said, instructed = [""] * len(facts), [dict[str, str]() for _ in facts]
    for (i, name), text in zip(place, new):
        if name:
            instructed[i][name] = text
        else:
            said[i] = text
    return said, instructed


def _fluency(
    model: Model, facts: Sequence[Fact], changes: Sequence[Change] | None, n: int, seed: int
) -> list[float | None]:
    prompts = [_some(f, n) for f in facts]
    flat = [p for own in prompts for p in own]
    with owned(model, changes, [i for i, own in enumerate(prompts) for _ in own]) as owners:
        new = continuations(model, flat, FLUENCY_TOKENS, total=True, top_k=5, seed=seed, owners=owners)
    entropies = [ngram_entropy(f"{p} {t}") for p, t in zip(flat, new)]
    return [sum(entropies[i * n : (i + 1) * n]) / n if f.generation else None for i, f in enumerate(facts)]


def _some(fact: Fact, n: int) -> list[str]:
    """Exactly `n` generation prompts, repeated where there are fewer, so that sampling draws for equal batches."""
    prompts = list(dict.fromkeys(fact.generation)) or [fact.filled]
    return [prompts[i % len(prompts)] for i in range(n)]


def hit(said: str, wanted: Sequence[str], old: str) -> bool:
    """Tell whether a text gives the new answer, at word boundaries, and not the old one before it.

    Example:
        >>> hit("It is in Rome, Italy.", ["Rome"], "Paris"), hit("Not Paris but Rome", ["Rome"], "Paris")
        (True, False)
    """
    text = _normal(said)
    places = [at for w in wanted if (at := _place(text, _normal(w))) >= 0]
    before = _place(text, _normal(old))
    return bool(places) and not 0 <= before < min(places)


def _place(text: str, name: str) -> int:
    """Find where a name first stands as words of its own; -1 where it does not."""
    found = re.finditer(re.escape(name), text) if name else ()
    return next((m.start() for m in found if not (joined(text, m.start()) or joined(text, m.end()))), -1)


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]", " ", text).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))
