"""How questions become one prompt: the templates are data (``data/templates.json``), and what a prompt is made of.

A rendered prompt is its text up to the first answer, and before every answer the text that is given and not asked for.
So each way of scoring, and training, reads the same characters.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from ..errors import UserError, unknown
from .base import Question

__all__ = ["LETTERS", "Rendered", "Template", "render", "template", "templates"]

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Template:
    """The wording of a prompt. Fields in braces: ``k``, ``i`` (from 1), ``subject``, ``stem``, ``options``.

    Attributes:
        name: Its name.
        about: What sets it apart, for lists.
        opening: What stands before several questions.
        part: One question of several.
        closing: What asks for the answers of several.
        single_opening: As `opening`, before one question alone.
        single_part: As `part`, for one question alone.
        single_closing: As `closing`, for one question alone.
        first: What stands right before the first answer.
        next: What stands right before every other one.
        asks: Whether answers stand together at the end or each behind its question.
        labels: Whether an answer is the letter of an option or the option itself.
        n_shots: Answered examples in front.
    """

    name: str
    about: str
    opening: str
    part: str
    closing: str
    single_opening: str
    single_part: str
    single_closing: str
    first: str
    next: str
    asks: Literal["end", "each"] = "end"
    labels: Literal["letters", "options"] = "letters"
    n_shots: int = 0


@dataclass(frozen=True)
class Rendered:
    """A prompt and what may stand in it.

    Attributes:
        prompt: The text up to where answering begins; no white space at its end.
        gaps: The text right before each answer, behind the prompt or the answer before.
        labels: What each answer may be.
    """

    prompt: str
    gaps: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]

    def target(self, chosen: Sequence[int]) -> str:
        """Return what follows the prompt if these options are chosen."""
        return "".join(gap + labels[i] for gap, labels, i in zip(self.gaps, self.labels, chosen))


@functools.cache
def templates() -> dict[str, Template]:
    """Return all templates by name."""
    text = (files(__package__) / "data" / "templates.json").read_text("utf-8")
    return {name: Template(name, **fields) for name, fields in json.loads(text).items()}


def template(name: str | Template) -> Template:
    """Return the template of a name.

    Raises:
        UnknownName: There is none.
    """
    if isinstance(name, Template):
        return name
    known = templates()
    if name not in known:
        raise unknown("template", name, known)
    return known[name]


def render(questions: Sequence[Question], how: str | Template, shots: Sequence[Sequence[Question]] = ()) -> Rendered:
    """Lay questions into one prompt.

    Args:
        questions: The questions, in order.
        how: The template or its name.
        shots: Groups of questions that stand in front with their answers.

    Raises:
        UserError: There is no question, a question has more options than there are letters, or the template wants
            examples and there are too few.

    Example:
        >>> one = Question("d", "film", "Good?", ("no", "yes"), 1, "k")
        >>> render([one], "plain").target([1])
        ' B'
    """
    wording = template(how)
    if not questions:
        raise UserError("A prompt needs at least one question.")
    if len(shots) < wording.n_shots:
        raise UserError(
            f"The template {wording.name} wants {wording.n_shots} answered examples in front; {len(shots)} are given."
        )
    front = "".join(_answered(shot, wording) + "\n\n" for shot in shots[: wording.n_shots])
    plain = _rendered(questions, wording)
    return Rendered(front + plain.prompt, plain.gaps, plain.labels)


def _answered(questions: Sequence[Question], wording: Template) -> str:
    shown = _rendered(questions, wording)
    return shown.prompt + shown.target([q.answer for q in questions])


def _rendered(questions: Sequence[Question], wording: Template) -> Rendered:
    k = len(questions)
    opening, part, closing = (
        (wording.single_opening, wording.single_part, wording.single_closing)
        if k == 1
        else (wording.opening, wording.part, wording.closing)
    )
    labels = tuple(_labels(q, wording) for q in questions)
    parts = [
        part.format(i=i, k=k, subject=q.subject, stem=q.stem, options=_listed(q, wording))
        for i, q in enumerate(questions, 1)
    ]
    before = [(wording.next if i else wording.first).format(i=i + 1) for i in range(k)]
    if wording.asks == "end":
        prompt = opening.format(k=k) + "".join(parts) + closing
        return Rendered(prompt, tuple(before), labels)
    gaps = [before[0], *(f"\n\n{text}{gap}" for text, gap in zip(parts[1:], before[1:]))]
    return Rendered(opening.format(k=k) + parts[0], tuple(gaps), labels)


def _labels(question: Question, wording: Template) -> tuple[str, ...]:
    if wording.labels == "options":
        return question.options
    if len(question.options) > len(LETTERS):
        raise UserError(
            f"A question of {question.domain} has {len(question.options)} options; there are {len(LETTERS)} letters."
        )
    return tuple(LETTERS[: len(question.options)])


def _listed(question: Question, wording: Template) -> str:
    if wording.labels == "options":
        return ", ".join(question.options)
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.options))
