"""The formats of published sets of facts: from a file to records, and from records to facts.

A format is told by its field names, never by the file's name. To add one: a function that reads a record, and its
row in `FORMATS`.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FactError
from ._fact import Fact, Prompt, as_items, as_prompt, as_texts, missing, need_text

__all__ = ["FORMATS", "read", "read_text"]

_log = logging.getLogger(__name__)
_JSON = "Facts are JSON Lines, an object a line, or one JSON array."


# From a file to records


def read(path: Path, skip: bool) -> Iterator[Fact]:
    """Yield the facts of a file; with `skip`, records that cannot be used are left out and logged.

    Raises:
        FactError: With file, line or record, and field.
    """
    records = _records(path)
    form = _detect(path, records)
    left_out = []
    for where, record in records:
        try:
            yield from _one(form, record)
        except FactError as error:
            if not skip:
                raise FactError(f"{where}: {error}") from error
            left_out.append(f"{where}: {error}")
    if left_out:
        _tell(path, left_out, len(records))


def _one(form: str, record: Any) -> list[Fact]:
    if isinstance(record, FactError):
        raise record
    return FORMATS[form].read(_Fields(record))


def _tell(path: Path, left_out: list[str], n_records: int) -> None:
    examples = " ".join(left_out[:3]) + (" ..." if len(left_out) > 3 else "")
    if len(left_out) == n_records:
        raise FactError(f"{path.name}: none of the {n_records} records can be used. {examples}")
    _log.warning("%s: left out %d of %d records. %s", path.name, len(left_out), n_records, examples)


def _records(path: Path) -> list[tuple[str, Any]]:
    """Read each record, or the error in its place, together with where it stands."""
    text = read_text(path)
    if not text.strip():
        raise FactError(f"{path.name} is empty. {_JSON}")
    whole = _json(text)
    if text.lstrip()[0] == "[":
        if isinstance(whole, FactError):
            raise FactError(f"{path.name}: {whole}") from whole
        if not whole:
            raise FactError(f"{path.name} holds an empty list.")
        return [(f"{path.name} record {i} (from 0)", record) for i, record in enumerate(whole)]
    if not isinstance(whole, FactError):
        return [(f"{path.name} line 1", whole)]  # one object, perhaps over several lines
    lines = enumerate(text.split("\n"), 1)  # not splitlines: a JSON text may hold other line ends
    return [(f"{path.name} line {i}", _json(line)) for i, line in lines if line.strip()]


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        FactError: It is missing, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FactError(f"{path.name} is not UTF-8 text: byte {error.start}: {error.reason}.") from error
    except FileNotFoundError as error:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        raise FactError(f"there is no file {str(path)!r}.{f' Did you mean {near[0]!r}?' if near else ''}") from error
    except OSError as error:
        raise FactError(f"{str(path)!r} cannot be read: {error.strerror}.") from error


def _json(text: str) -> Any:
    """Parse a text, or return the error, so that one broken line does not hide the others."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        return FactError(f"broken JSON at {line}column {error.colno}: {error.msg}.")
    except (ValueError, RecursionError) as error:
        return FactError(f"unreadable JSON: {error}.")


def _detect(path: Path, records: Sequence[tuple[str, Any]]) -> str:
    """Name the format. Many records are looked at, so that one with a missing field cannot mislead."""
    sample = [record for _, record in records[:100] if isinstance(record, dict)]
    found = dict.fromkeys(key for record in sample for key in record)
    rewrites = [record["requested_rewrite"] for record in sample if "requested_rewrite" in record]
    if "target" not in found and rewrites:
        return "mquake" if isinstance(rewrites[0], list) else "counterfact"
    for name, form in FORMATS.items():
        if form.marks & found.keys():
            return name
    if "prompt" in found:
        return "retouch"
    for where, record in records:
        if isinstance(record, FactError):
            raise FactError(f"{where}: {record} {_JSON}") from record
    known = "\n  ".join(f"{name}: {form.about}" for name, form in FORMATS.items())
    fields = ", ".join(found) or "none"
    raise FactError(f"{path.name}: unknown format. Fields found: {fields}. Known formats:\n  {known}")


# From records to facts


class _Fields:
    """A record whose fields name themselves when they are wrong."""

    def __init__(self, data: object, name: str = "") -> None:
        if not isinstance(data, dict):
            raise FactError(f"{f'field {name!r}' if name else 'a record'} must be an object; got {data!r:.80}.")
        self.data, self.name = data, f"{name}." if name else ""

    def text(self, key: str) -> str:
        """Return a text that must be there. A published target may be wrapped as ``{"str": ...}``."""
        if self.data.get(key) is None:
            raise FactError(missing(self.name + key, self.data))
        value = self.data[key]
        if isinstance(value, dict):
            return _Fields(value, self.name + key).text("str")
        need_text(self.name + key, value)
        return str(value).strip()

    def maybe(self, key: str) -> str | None:
        """Return a text that may be missing or blank."""
        return None if _blank(self.data.get(key)) else self.text(key)

    def ident(self, key: str, i: int | None = None) -> str | None:
        """Return a record's number as text, with the place in its group."""
        return None if _blank(self.data.get(key)) else f"{self.data[key]}" + ("" if i is None else f"-{i}")

    def items(self, key: str, needed: bool = False) -> list[Any]:
        """Return a list that may be missing."""
        if self.data.get(key) is None:
            if needed:
                raise FactError(missing(self.name + key, self.data))
            return []
        return as_items(self.name + key, self.data[key])

    def texts(self, key: str) -> tuple[str, ...]:
        """Return the texts of a list; a single text counts as a list of one, blank ones are dropped."""
        value = [self.data[key]] if isinstance(self.data.get(key), str) else self.items(key)
        return as_texts(self.name + key, [item for item in value if not _blank(item)])

    def prompts(self, key: str) -> tuple[Prompt, ...]:
        """Return the prompts of a list of texts, or of objects with ``prompt`` and ``ground_truth``."""
        return tuple(self._prompt(f"{self.name}{key}[{i}]", item) for i, item in enumerate(self.items(key)))

    def _prompt(self, name: str, item: object) -> Prompt:
        if not isinstance(item, dict):
            return as_prompt(name, item)
        inner = _Fields(item, name)
        return Prompt(
            inner.text("prompt"), *_answers(f"{name}.ground_truth", item.get("ground_truth", item.get("answer")))
        )

    def part(self, key: str) -> _Fields:
        """Return an object that may be missing."""
        value = self.data.get(key)
        return _Fields({} if value is None or value == [] else value, self.name + key)

    def parts(self, key: str) -> list[_Fields]:
        """Return the objects of a list that must be there."""
        items = self.items(key, needed=True)
        return [_Fields(item, f"{self.name}{key}[{i}]") for i, item in enumerate(items)]


def _blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _answers(name: str, value: object) -> tuple[str | None, tuple[str, ...]]:
    """Return the first answer and all others, from a text, a list, or a list of lists of aliases."""
    flat = [answer for answer in _flat(value) if not _blank(answer)]
    answers = tuple(dict.fromkeys(as_texts(name, flat)))
    return (answers[0], answers[1:]) if answers else (None, ())


def _flat(value: object) -> Iterator[object]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        elif item is not None:
            yield item


def _read_retouch(record: _Fields) -> list[Fact]:
    data, subject = dict(record.data), record.data.get("subject")
    if isinstance(target := data.get("target"), str):
        data["target"] = target.rstrip() or target
    if isinstance(subject, str) and (subject := subject.strip()):
        own = ("paraphrases", "related", "instructions", "generation")
        data |= {"subject": subject, **{n: _about(data[n], subject) for n in own if n in data}}
        _refuse_slots(data.get("neighbors"))
    return [Fact.from_dict(data)]


def _about(value: object, subject: str) -> object:
    """Put the subject into the ``{}`` of prompts that are about it too."""
    if isinstance(value, str):
        return value.replace("{}", subject)
    if isinstance(value, list):
        return [_about(item, subject) for item in value]
    return (
        {**value, "prompt": _about(value["prompt"], subject)}
        if isinstance(value, dict) and "prompt" in value
        else value
    )


def _refuse_slots(neighbors: object) -> None:
    for i, item in enumerate(neighbors if isinstance(neighbors, list) else ()):
        text = item.get("prompt") if isinstance(item, dict) else item
        if isinstance(text, str) and "{}" in text:
            raise FactError(f"field 'neighbors[{i}]' holds {{}}: write out the other subject that {text!r} is about.")


def _rewrite(rewrite: _Fields, **more: Any) -> Fact:
    return Fact.of(
        rewrite.text("prompt"),
        more.pop("subject", None) or rewrite.text("subject"),
        rewrite.text("target_new"),
        rewrite.maybe("target_true"),
        relation=rewrite.maybe("relation_id") or rewrite.maybe("relation"),
        **more,
    )


def _read_counterfact(record: _Fields) -> list[Fact]:
    if "requested_rewrite" not in record.data:
        raise FactError(missing("requested_rewrite", record.data))
    fact = _rewrite(
        record.part("requested_rewrite"),
        id=record.ident("case_id"),
        paraphrases=record.texts("paraphrase_prompts"),
        neighbors=record.prompts("neighborhood_prompts"),
        related=record.prompts("relation_specific_prompts"),
        generation=record.texts("generation_prompts"),
    )
    return [fact]


def _read_flat(record: _Fields) -> list[Fact]:
    near = record.maybe("locality_prompt")
    fact = Fact.of(
        record.text("prompt"),
        record.text("subject"),
        record.text("target_new"),
        _answers("ground_truth", record.data.get("ground_truth"))[0],
        id=record.ident("case_id"),
        paraphrases=record.texts("rephrase_prompt"),
        neighbors=[Prompt(near, record.maybe("locality_ground_truth"))] if near else [],
    )
    return [fact]


def _read_knowedit(record: _Fields) -> list[Fact]:
    # "Forgetfulness" asks for the same relation's other objects: same subject, so related and no neighbour.
    locality = record.part("locality")
    target, aliases = _answers("target_new", record.data.get("target_new"))
    fact = Fact.of(
        record.text("prompt"),
        record.text("subject"),
        target or record.text("target_new"),
        _answers("ground_truth", record.data.get("ground_truth"))[0],
        aliases=aliases,
        id=record.ident("case_id"),
        paraphrases=record.texts("rephrase_prompt"),
        related=locality.prompts("Relation_Specificity") + locality.prompts("Forgetfulness"),
    )
    return [fact]


def _read_zsre(record: _Fields) -> list[Fact]:
    near = record.maybe("loc")
    fact = Fact.of(
        record.text("src"),
        record.text("subject"),
        record.text("alt"),
        _answers("answers", record.data.get("answers"))[0],
        paraphrases=record.texts("rephrase"),
        neighbors=[Prompt(near, record.maybe("loc_ans"))] if near else [],
    )
    return [fact]


def _read_s2rke(record: _Fields) -> list[Fact]:
    subject = record.part("subject").text("name")
    return [
        _rewrite(
            edit.part("requested_rewrite"),
            subject=subject,
            id=record.ident("subjectID", i),
            paraphrases=edit.texts("paraphrase_prompts"),
            neighbors=edit.prompts("neighborhood_prompts"),
        )
        for i, edit in enumerate(record.parts("Star_Topology"))
    ]


def _read_mquake(record: _Fields) -> list[Fact]:
    hops = [hop for hop in record.items("new_single_hops") if isinstance(hop, dict)]
    spellings = {(hop.get("question"), hop.get("answer")): hop.get("answer_alias") for hop in hops}
    facts = []
    for i, edit in enumerate(record.parts("requested_rewrite")):
        question = edit.maybe("question")
        aliases = spellings.get((question, edit.text("target_new"))) or ()
        asked = (question,) if question else ()
        facts.append(_rewrite(edit, id=record.ident("case_id", i), aliases=aliases, instructions=asked))
    return facts


def _read_known(record: _Fields) -> list[Fact]:
    # what a model says already: a fact to be located, not one to be edited
    template = record.maybe("prompt") or record.text("template")
    relation = record.maybe("relation_id")
    ident = record.ident("known_id")
    return [Fact.of(template, record.text("subject"), record.text("attribute"), relation=relation, id=ident)]


class _Format(NamedTuple):
    marks: frozenset[str]
    about: str
    read: Callable[[_Fields], list[Fact]]


FORMATS = {
    "retouch": _Format(
        frozenset({"target"}),
        "our own: prompt (filled or with {}), target, and optionally subject, truth, relation, id, aliases,"
        " paraphrases, neighbors, related, instructions, generation",
        _read_retouch,
    ),
    "s2rke": _Format(
        frozenset({"Star_Topology"}),
        "S2RKE: subject{name}, Star_Topology[{requested_rewrite, paraphrase_prompts, neighborhood_prompts}]",
        _read_s2rke,
    ),
    "counterfact": _Format(
        frozenset({"paraphrase_prompts", "neighborhood_prompts"}),
        "CounterFact and COUNTERFACT_RS: requested_rewrite{prompt, subject, target_new, target_true},"
        " paraphrase_prompts, neighborhood_prompts, generation_prompts, relation_specific_prompts",
        _read_counterfact,
    ),
    "mquake": _Format(
        frozenset({"new_answer", "new_single_hops"}),
        "MQuAKE: requested_rewrite[{prompt, subject, target_new, target_true, question}]",
        _read_mquake,
    ),
    "zsre": _Format(
        frozenset({"src", "alt", "loc_ans"}),
        "zsRE (MEND): subject, src, alt, answers, rephrase, loc, loc_ans",
        _read_zsre,
    ),
    "knowedit": _Format(
        frozenset({"portability", "locality"}),
        "KnowEdit and RippleEdits re-packed: subject, prompt, target_new, ground_truth, rephrase_prompt,"
        " locality{Relation_Specificity, Forgetfulness}",
        _read_knowedit,
    ),
    "flat": _Format(
        frozenset({"target_new", "ground_truth", "rephrase_prompt", "locality_prompt"}),
        "flat CounterFact: prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt,"
        " locality_ground_truth",
        _read_flat,
    ),
    "known": _Format(
        frozenset({"attribute"}),
        "known facts (ROME's known_1000), to be located and not edited: subject, prompt, attribute, relation_id",
        _read_known,
    ),
}
