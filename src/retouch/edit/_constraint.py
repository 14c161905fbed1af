"""One constraint, and the user's own prompts from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import FactError
from ._formats import read_text

__all__ = ["Constraint", "read_prompts"]


@dataclass(frozen=True)
class Constraint:
    """A prompt whose answer must stay.

    Attributes:
        prompt: The text, ending where the answer starts.
        kind: ``relation``: a fact's own template with another subject; ``subject``: another relation of a fact's
            subject; ``general``: a factual prompt on something else, or one of the user's own.
        subject: Whom or what it is about, without an article; ``""`` where that is not known.
    """

    prompt: str
    kind: Literal["relation", "subject", "general"]
    subject: str


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a text file, one a line, or from JSON Lines with a field ``prompt``.

    The first line that is not empty tells which. A record may have a ``{}`` in its prompt and a field ``subject``.

    Raises:
        FactError: With file and line.
    """
    path = Path(path)
    lines = [(i, line.strip()) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise FactError(f"{path.name} is empty. Give one prompt a line.")
    if lines[0][1].startswith("["):
        raise FactError(
            f"{path.name} line {lines[0][0]}: begins with '['. Give JSON Lines: one object a line, not a list."
        )
    records = lines[0][1].startswith("{") and not lines[0][1].startswith("{}")
    return [_prompt(f"{path.name} line {i}", line, records) for i, line in lines]


def _prompt(where: str, line: str, is_record: bool) -> str:
    prompt, subject = _fields(where, line) if is_record else (line, "")
    if subject and prompt.count("{}") == 1:
        prompt = subject.join(prompt.split("{}"))
    if "{}" in prompt:
        raise FactError(f"{where}: the prompt {prompt!r} holds {{}}. Give it filled, or with one {{}} and a 'subject'.")
    return prompt


def _fields(where: str, line: str) -> tuple[str, str]:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FactError(f"{where}: broken JSON: {error}.") from error
    if not isinstance(record, dict):
        raise FactError(f"{where}: an object with the field 'prompt' is needed; got {line!r:.80}.")
    prompt, subject = record.get("prompt"), record.get("subject") or ""
    if not isinstance(prompt, str) or not prompt.strip():
        found = ", ".join(record) or "nothing"
        raise FactError(f"{where}: field 'prompt' must be text; got {prompt!r}. Fields found: {found}.")
    if not isinstance(subject, str):
        raise FactError(f"{where}: field 'subject' must be text; got {subject!r}.")
    return prompt.strip(), subject
