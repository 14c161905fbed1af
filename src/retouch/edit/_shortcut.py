"""The shortcut index: whether an answer comes from the subject alone, whatever is asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..model import Model
from ..progress import track
from ..tokens import Bos
from ._causal import Asked, Part, ask, blur, effects, site, spread_of, window_of
from .facts import Fact

__all__ = ["FactShortcut", "Shortcut", "shortcut"]


@dataclass(frozen=True)
class FactShortcut:
    """How much of one answer the subject and the relation bring back.

    Attributes:
        prompt: The filled prompt.
        answer: What the model says.
        subject: With the subject blurred, the most that its last token brings back, at least 0.
        relation: With all other words blurred, the most that the prompt's last token brings back, at least 0.
        index: subject / (subject + relation); None when neither brings anything back.
    """

    prompt: str
    answer: str
    subject: float
    relation: float
    index: float | None


@dataclass(frozen=True)
class Shortcut:
    """The shortcut index of facts.

    Attributes:
        facts: One entry for each fact that the model answers.
        left_out: Why the others have none.
    """

    facts: tuple[FactShortcut, ...]
    left_out: tuple[str, ...]

    @property
    def index(self) -> float | None:
        """Mean over the facts that have one."""
        known = [f.index for f in self.facts if f.index is not None]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        return {"index": self.index, "facts": [dict(vars(f)) for f in self.facts], "left_out": list(self.left_out)}


def shortcut(
    model: Model,
    facts: Sequence[Fact],
    *,
    part: Part = "mlp",
    window: int | None = None,
    n_samples: int = 10,
    noise: float = 3.0,
    seed: int = 0,
    bos: Bos = "tokenizer",
) -> Shortcut:
    """Measure by causal tracing whether answers hang on the subject alone.

    The index is 1 when only the subject's last token brings the answer back, and 0 when only the prompt's end does.

    Source:
        Tracing: Meng et al. 2022 (arXiv 2202.05262). The index is ours, for what arXiv 2506.04042 calls the shortcut.

    Args:
        model: A decoder, edited or not.
        facts: Facts with a subject; the answer is the truth or the target, whichever the model says.
        part: See `retouch.edit.locate.causal_trace`, as the rest.
        window: Blocks put back together.
        n_samples: Draws of the noise.
        noise: Size of the noise in standard deviations.
        seed: Of the noise.
        bos: Beginning-of-text rule.

    Raises:
        FactError: There are no facts, or one has no subject.
    """
    site(part, 0)
    size = window_of(model, part, window)
    asked, left_out = ask(model, facts, bos)
    spread = noise * spread_of(model, asked) if asked else 0.0
    found = [_one(model, one, spread, n_samples, seed, part, size) for one in track(asked, "Shortcut index")]
    return Shortcut(tuple(found), tuple(left_out))


def _one(model: Model, one: Asked, spread: float, n_samples: int, seed: int, part: Part, window: int) -> FactShortcut:
    sizes = []
    for corrupt, place in ((tuple(one.subject), one.subject[-1]), (one.others, len(one.ids) - 1)):
        drawn = blur(model, len(corrupt), n_samples, spread, seed)
        back = effects(model, one, [place], corrupt, drawn, part, window).effect
        sizes.append(max(0.0, float(back.max())))
    subject, relation = sizes
    index = subject / (subject + relation) if subject + relation > 0 else None
    return FactShortcut(one.fact.filled, one.answer, subject, relation, index)
