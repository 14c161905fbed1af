"""The facts that a command is given: one by its parts, or a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..edit.facts import Fact

__all__ = ["asked_facts"]


def asked_facts(
    prompt: str | None,
    subject: str,
    target: str | None,
    truth: str | None,
    path: Path | None,
    n: int | None = None,
    *,
    needs_subject: bool = False,
) -> list[Fact]:
    """Make the facts of ``--prompt``, ``--subject``, ``--target`` and ``--truth``, or read those of ``--facts``.

    Raises:
        UserError: Both are given, or too little of either.
        FactError: A fact cannot be used.
    """
    from ..edit.facts import Fact, load
    from ..errors import UserError

    if path is not None and any(part is not None for part in (prompt, subject or None, target, truth)):
        raise UserError("Give either --facts, or --prompt with --subject and --target.")
    if path is not None:
        return load(path, n)
    if prompt is None or target is None or (needs_subject and not subject):
        raise UserError("Name a fact: --prompt, --subject and --target; or a file of them: --facts.")
    if n is not None:
        raise UserError("--n counts the facts of a file: it goes with --facts.")
    return [Fact.of(prompt, subject, target, truth)]
