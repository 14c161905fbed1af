"""What a fact is, checked when it is made.

A template's ``{}`` is found by splitting, never with ``str.format``: texts may hold braces of their own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import FactError
from ..tokens import broken

__all__ = ["Fact", "Prompt", "as_items", "as_prompt", "as_texts", "joined", "missing", "need_text"]


@dataclass(frozen=True)
class Prompt:
    """A text to be continued, and its right answer where one is known.

    Args:
        prompt: The text, ending where the answer starts.
        answer: The answer; ``None`` where the model's own answer is the yardstick.
        aliases: Other spellings of the answer that count as right.

    Raises:
        FactError: The prompt is empty, or a field is not text.
    """

    prompt: str
    answer: str | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        need_text("prompt", self.prompt)
        if self.answer is not None:
            need_text("answer", self.answer)
        object.__setattr__(self, "aliases", as_texts("aliases", self.aliases))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not empty, as JSON holds them."""
        return _without_empty(self)


@dataclass(frozen=True)
class Fact:
    """One fact to write into a model: after `prompt` about `subject`, the model is to say `target`.

    Args:
        prompt: A template with one ``{}`` for the subject, e.g. ``"The capital of {} is"``. Without a subject, a whole
            prompt without ``{}``.
        subject: Whom or what the fact is about; ``""`` if it has no subject.
        target: What the model is to answer.
        truth: What it answers before the edit.
        relation: A name that facts of the same kind share, e.g. ``"P36"``.
        id: A name of this fact in its data set.
        aliases: Other spellings of the target that count as a hit.
        paraphrases: Whole prompts that ask for the same in other words.
        neighbors: Prompts on other subjects that share the truth; their answers must stay.
        related: Prompts on the same subject that ask for something else; their answers must stay.
        instructions: The fact as a question or an order.
        generation: Beginnings of longer texts about the subject.

    Raises:
        FactError: A field is empty that must not be, has the wrong type, or the ``{}`` does not fit the subject.

    Example:
        >>> fact = Fact("The capital of {} is", "France", "Lyon")
        >>> fact.filled
        'The capital of France is'
    """

    prompt: str
    subject: str
    target: str
    truth: str | None = None
    relation: str | None = None
    id: str | None = None
    aliases: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Prompt, ...] = ()
    related: tuple[Prompt, ...] = ()
    instructions: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        need_text("prompt", self.prompt)
        need_text("target", self.target)
        for name in ("truth", "relation", "id"):
            if (value := getattr(self, name)) is not None:
                need_text(name, value)
        for name in ("aliases", "paraphrases", "instructions", "generation"):
            object.__setattr__(self, name, as_texts(name, getattr(self, name)))
        for name in ("neighbors", "related"):
            object.__setattr__(self, name, _prompts(name, getattr(self, name)))
        self._check_slot()

    def _check_slot(self) -> None:
        if not isinstance(self.subject, str):
            raise FactError(f"field 'subject' must be text; got {self.subject!r}.")
        if self.subject and not self.subject.strip():
            raise FactError("field 'subject' is blank; leave it out if the fact has no subject.")
        if broken(self.subject):
            raise FactError(
                f"field 'subject' holds half of a character (a lone surrogate): {self.subject!r:.80}. Correct it."
            )
        slots = self.prompt.count("{}")
        if self.subject and slots != 1:
            hint = " Fact.of also takes a filled prompt." if not slots else ""
            raise FactError(f"prompt {self.prompt!r} needs exactly one {{}} for the subject; it has {slots}.{hint}")
        if not self.subject and slots:
            raise FactError(f"prompt {self.prompt!r} has {{}} but no subject is given.")

    @classmethod
    def of(cls, prompt: str, subject: str, target: str, truth: str | None = None, **more: Any) -> Fact:
        """Make a fact from a template or from a filled prompt.

        In a filled prompt the last place where the subject stands as words of its own becomes the ``{}``.

        Args:
            prompt: ``"The capital of {} is"`` or ``"The capital of France is"``.
            subject: Whom or what the fact is about.
            target: What the model is to answer.
            truth: What it answers before the edit.
            more: The other fields of `Fact`.

        Raises:
            FactError: The subject is not in the prompt, or a field is wrong.

        Example:
            >>> Fact.of("The Eiffel Tower is in", "Eiffel Tower", "Rome").prompt
            'The {} is in'
        """
        if isinstance(prompt, str) and isinstance(subject, str) and subject.strip() and "{}" not in prompt:
            need_text("prompt", prompt)
            at = _last(prompt, subject)
            if at < 0:
                raise FactError(f"subject {subject!r} is not in the prompt {prompt!r}.{_near(prompt, subject)}")
            prompt = prompt[:at] + "{}" + prompt[at + len(subject) :]
        return cls(prompt, subject, target, truth, **more)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fact:
        """Make a fact from a record of our own format, as `to_dict` writes it.

        Raises:
            FactError: A field is missing, looks misspelt, or has the wrong type.
        """
        names = [f.name for f in fields(cls)]
        values = {name: data[name] for name in names if data.get(name) is not None}
        for name in ("prompt", "target"):
            if name not in values:
                raise FactError(missing(name, data))
        for name in data:
            if name not in names and (near := difflib.get_close_matches(name, names, n=1, cutoff=0.8)):
                raise FactError(f"there is no field {name!r}. Did you mean {near[0]!r}?")
        if isinstance(values.get("id"), int):
            values["id"] = str(values["id"])
        return cls.of(values.pop("prompt"), values.pop("subject", ""), **values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not empty, as one line of our format holds them."""
        return _without_empty(self)

    @property
    def before(self) -> str:
        """The prompt up to the subject; the whole prompt if there is no subject."""
        return self.prompt.partition("{}")[0]

    @property
    def after(self) -> str:
        """The prompt behind the subject."""
        return self.prompt.partition("{}")[2]

    @property
    def filled(self) -> str:
        """The prompt with the subject in its place."""
        return self.before + self.subject + self.after


# Checks of single values


def need_text(name: str, value: object) -> None:
    """Refuse what is not text, blank text, and text that cannot be encoded."""
    if not isinstance(value, str):
        raise FactError(f"field {name!r} must be text; got {value!r}.")
    if not value.strip():
        raise FactError(f"field {name!r} is empty.")
    if broken(value):
        raise FactError(f"field {name!r} holds half of a character (a lone surrogate): {value!r:.80}. Correct it.")


def as_items(name: str, value: object) -> list[Any]:
    """Return a list, or say that it is none."""
    if not isinstance(value, list | tuple):
        raise FactError(f"field {name!r} must be a list; got {value!r}.")
    return list(value)


def as_texts(name: str, value: object) -> tuple[str, ...]:
    """Return a list of texts as a tuple."""
    for i, item in enumerate(items := as_items(name, value)):
        need_text(f"{name}[{i}]", item)
    return tuple(items)


def _prompts(name: str, value: object) -> tuple[Prompt, ...]:
    return tuple(as_prompt(f"{name}[{i}]", item) for i, item in enumerate(as_items(name, value)))


def as_prompt(name: str, item: object) -> Prompt:
    """Make a prompt from a text or from an object with its fields."""
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        need_text(name, item)
        return Prompt(item)
    if not isinstance(item, Mapping):
        raise FactError(f"field {name!r} must be text or an object with 'prompt' and 'answer'; got {item!r}.")
    if "prompt" not in item:
        raise FactError(missing(f"{name}.prompt", item))
    try:
        return Prompt(item["prompt"], item.get("answer"), item.get("aliases") or ())
    except FactError as error:
        raise FactError(f"in {name}: {error}") from error


def missing(name: str, found: Iterable[str]) -> str:
    """Say that a field is missing, and which ones were found."""
    return f"field {name!r} is missing; found: {', '.join(map(str, found)) or 'nothing'}."


def _without_empty(item: Fact | Prompt) -> dict[str, Any]:
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    return {name: _plain(value) for name, value in values.items() if value not in (None, "", ())}


def _plain(value: str | tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        return value
    return [item.to_dict() if isinstance(item, Prompt) else item for item in value]


def _last(prompt: str, subject: str) -> int:
    """Find the subject's last place that is not a part of a longer word ('Iran' in 'Iranian'), else its last place."""
    end = len(prompt) + 1
    while (at := prompt.rfind(subject, 0, end - 1 + len(subject))) >= 0:
        if not (joined(prompt, at) or joined(prompt, at + len(subject))):
            return at
        end = at
    return prompt.rfind(subject)


def joined(text: str, at: int) -> bool:
    """Say whether a word goes on across `at`; scripts without case write words without spaces."""
    pair = text[max(at - 1, 0) : at + 1]
    return 0 < at < len(text) and all(c.isdigit() or c.lower() != c.upper() for c in pair)


def _near(prompt: str, subject: str) -> str:
    words, size = prompt.split(), len(subject.split())
    spans = [" ".join(words[i : i + k]) for k in (size - 1, size, size + 1) if k > 0 for i in range(len(words) - k + 1)]
    folded = {span.strip(".,;:!?\"'").casefold(): span.strip(".,;:!?\"'") for span in spans}
    near = difflib.get_close_matches(subject.casefold(), folded, n=1, cutoff=0.75)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""
