"""One constraint, the user's own prompts from a file, and what prompts feed into a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import FactError
from ..model import Model
from ..tokens import Bos, Text, encode
from ..trace import Trace

__all__ = ["Constraint", "constraint_keys", "read_prompts"]

Position = Literal["prompt", "subject"]


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
    lines = [(i, line.strip()) for i, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise FactError(f"{path.name} is empty. Give one prompt a line.")
    if lines[0][1].startswith("["):
        raise FactError(
            f"{path.name} line {lines[0][0]}: begins with '['. Give JSON Lines: one object a line, not a list."
        )
    records = lines[0][1].startswith("{") and not lines[0][1].startswith("{}")
    return [_prompt(f"{path.name} line {i}", line, records) for i, line in lines]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FactError(f"{path.name} is not UTF-8 text: byte {error.start}: {error.reason}.") from error
    except OSError as error:
        raise FactError(f"{str(path)!r} cannot be read: {error.strerror}.") from error


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


@torch.no_grad()
def constraint_keys(
    model: Model,
    prompts: Sequence[str | Constraint],
    names: Sequence[str],
    position: Position = "prompt",
    bos: Bos = "tokenizer",
    *,
    budget_mib: int = 256,
) -> dict[str, Tensor]:
    """Read what prompts feed into weights at one token each, in one pass for all weights.

    Rows are sorted by length and batched by tokens, so that little is padding and memory is bounded; nothing above
    the last weight's block runs.

    Args:
        model: The model.
        prompts: The prompts.
        names: Weights, e.g. ``["blocks.4.mlp.down"]``.
        position: ``prompt``: the last token. ``subject``: the last token of the subject, for a `Constraint` that has
            one.
        bos: Beginning-of-text rule.
        budget_mib: Memory for a batch's activations, in MiB.

    Shapes:
        Per weight (d_ff, prompts), float64 on the CPU, in the order of the prompts.

    Raises:
        FactError: A subject is asked for where there is none.
    """
    rows = encode(model.tokenizer, [_pieces(p, position) for p in prompts], bos)
    at = [row.prompt if position == "prompt" or row.subject is None else row.subject for row in rows]
    keys = {n: torch.zeros(model.matrix(n).shape[1], len(rows), dtype=torch.float64) for n in names}
    if not rows or not names:
        return keys
    lengths = [index + 1 for index in at]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    n_tokens = (budget_mib << 20) // _per_token(model, max(lengths))
    last = max(map(model.anatomy.block_of, names))
    with Trace(model) as trace:
        batch_rows: list[int] = []

        def see(name: str, seen: Tensor) -> None:
            columns = torch.tensor([at[i] for i in batch_rows], device=seen.device)  # padded right: no offset
            picked = seen[torch.arange(len(batch_rows), device=seen.device), columns]
            keys[name][:, batch_rows] = picked.double().cpu().T

        for name in names:
            trace.watch(name, partial(see, name), "input")
        for batch_rows in _batches(order, lengths, n_tokens):
            # what stands behind the token cannot change its key, so it is not read
            trace.run(model.batch([rows[i].ids[: lengths[i]] for i in batch_rows]), stop_after=f"blocks.{last}")
    return keys


def _pieces(prompt: str | Constraint, position: Position) -> Text:
    """Cut a prompt at its subject's last place; only where that is asked for."""
    text = prompt if isinstance(prompt, str) else prompt.prompt
    if position == "prompt":
        return Text(text)
    subject = "" if isinstance(prompt, str) else prompt.subject
    places = list(re.finditer(re.escape(subject), text, re.IGNORECASE)) if subject else []
    if not places:
        raise FactError(f"position='subject' needs a constraint whose subject is in its prompt; got {text!r}.")
    return Text(text[: places[-1].start()], places[-1].group(), text[places[-1].end() :])


def _per_token(model: Model, longest: int) -> int:
    """Bytes that a token of a batch costs: its widest activation a few times over, one row of attention a head."""
    a = model.anatomy
    return 4 * (6 * a.d_ff + 8 * a.d_model + a.heads * longest)


def _batches(order: Sequence[int], lengths: Sequence[int], n_tokens: int) -> Iterator[list[int]]:
    """Cut rows in order of length into batches of at most `n_tokens`, padding included; one row always fits."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > n_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
