"""Questions of several domains, split so that nothing that is asked at the end was seen before.

A suite holds for each domain the questions that an edge trains on, those by which settings are chosen, and those that
are read once, at the end. A question's split hangs on its own hash and on nothing else, so that questions that read the
same never stand in two. Published sets are read in their published files, from wherever they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError, unknown
from . import _mmlu
from ._files import Labelled, labelled
from ._suite import Split, Suite, gather, normal, question_key, share
from .base import Example, Question
from .compose import composed, shots
from .templates import LETTERS, render, template

__all__ = [
    "Split",
    "Suite",
    "answered",
    "examples",
    "folders",
    "lessons",
    "mmlu_cd",
    "question_key",
    "share",
    "text_cd",
]

TEXT_DOMAINS = ("ag_news", "trec", "sst2")


# Sentences to classify


@dataclass(frozen=True)
class _Task:
    """How a set of labelled texts becomes questions, and where its files lie."""

    files: Mapping[str, tuple[str, ...]]
    subject: str
    ask: str
    options: Mapping[str, str]
    least_words: int = 0


_SENTIMENT = "Is this remark about a film negative or positive?\n{text}"
_TASKS = {
    "ag_news": _Task(
        {
            "train": ("sentence_cls/agnews.train10k.tsv", "agnews.train10k.tsv"),
            "test": ("sentence_cls/agnews.test.tsv", "agnews.test.tsv"),
        },
        "news",
        "In which section of a newspaper does this belong?\n{text}",
        {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Science"},
    ),
    "trec": _Task(
        {
            "train": ("sentence_cls/TREC.train.all", "TREC.train.all"),
            "test": ("sentence_cls/TREC.test.all", "TREC.test.all"),
        },
        "kinds of answer",
        "What kind of answer does this question ask for?\n{text}",
        {
            "0": "description",
            "1": "thing",
            "2": "abbreviation",
            "3": "person",
            "4": "place",
            "5": "number",
        },
    ),
    "sst2": _Task(
        {"train": ("glue/SST-2/train.tsv", "SST-2/train.tsv"), "test": ("glue/SST-2/dev.tsv", "SST-2/dev.tsv")},
        "films",
        _SENTIMENT,
        {"0": "negative", "1": "positive"},
        least_words=4,
    ),
    "rte": _Task(
        {"train": ("glue/RTE/train.tsv", "RTE/train.tsv"), "test": ("glue/RTE/dev.tsv", "RTE/dev.tsv")},
        "inference",
        "{text}\nDoes it follow from this that: {pair}",
        {"entailment": "yes", "not_entailment": "no"},
    ),
    "mrpc": _Task(
        {
            "train": ("glue/MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_train.txt"),
            "test": ("glue/MRPC/msr_paraphrase_test.txt", "MRPC/msr_paraphrase_test.txt"),
        },
        "paraphrase",
        "Do these two sentences mean the same?\n{text}\n{pair}",
        {"1": "yes", "0": "no"},
    ),
    "mr": _Task(
        {"train": ("sentence_cls/rt-polarity.all", "rt-polarity.all")},
        "films",
        _SENTIMENT,
        {"0": "negative", "1": "positive"},
    ),
}


def text_cd(folder: str | Path, domains: Sequence[str] = TEXT_DOMAINS, *, seed: int = 0) -> Suite:
    """Read published sets of sentences as lettered multiple choice: a suite that small models are above chance on.

    Test is the published test or dev set; a fifth of the training rows, by hash, is for selection. Training rows that
    read as a test row are dropped. ``mr`` and ``sst2`` hold the same sentences: ``mr`` is a second edge of one domain,
    a control. It has no published test, so that a part of what SST-2 does not hold serves; and none of its rows that
    touches an SST-2 test sentence is used.

    Args:
        folder: Holds ``sentence_cls`` and ``glue``, or their files.
        domains: Of ag_news, trec, sst2, rte, mrpc, mr.
        seed: Of the order of options, which is drawn for each question.

    Raises:
        UnknownName: There is no such domain.
        FactError: A line cannot be used; with file and line.
        UserError: A file is missing.
    """
    for name in domains:
        if name not in _TASKS:
            raise unknown("domain of text-cd", name, _TASKS)
    rows: dict[str, dict[str, list[Question]]] = {}
    for name in domains:
        rows[name] = _published(Path(folder), name, seed)
    if "mr" in rows:
        films = rows.get("sst2") or _published(Path(folder), "sst2", seed)
        rows["mr"] = _beside(rows["mr"]["train"], films["train"], films["test"])
    return gather("text-cd", rows, {"seed": seed})


def _published(folder: Path, name: str, seed: int) -> dict[str, list[Question]]:
    task = _TASKS[name]
    found = {}
    for split, places in task.files.items():
        path = next((folder / place for place in places if (folder / place).is_file()), None)
        if path is None:
            raise UserError(
                f"{folder} has no {places[0]}, which text-cd reads for {name}. Give the folder that holds it."
            )
        least = task.least_words if split == "train" else 0
        kept = [row for row in labelled(path) if len(row.text.split()) >= least]
        found[split] = [_asked(name, task, row, seed) for row in kept]
    return found


def _asked(domain: str, task: _Task, row: Labelled, seed: int) -> Question:
    if row.label not in task.options:
        raise UserError(f"{row.where}: the label {row.label!r:.40} is none of {', '.join(task.options)}.")
    stem = task.ask.replace("{pair}", row.pair).replace("{text}", row.text)
    return _shuffled(domain, task.subject, stem, tuple(task.options.values()), task.options[row.label], seed)


def _shuffled(domain: str, subject: str, stem: str, options: Sequence[str], right: str, seed: int) -> Question:
    key = question_key(stem, options)
    order = sorted(
        options, key=lambda option: hashlib.sha256(f"{seed} {key} {option}".encode("utf-8", "surrogatepass")).digest()
    )
    return Question(domain, subject, stem, tuple(order), order.index(right), key)


def _beside(rows: Sequence[Question], train: Sequence[Question], test: Sequence[Question]) -> dict[str, list[Question]]:
    """Split rows of a set that shares sentences with another one's training and test rows."""
    known = {q.key for q in train}
    asked = _Phrases(q.stem for q in test)
    free = [q for q in rows if not asked.touch(q.stem)]
    held = [q for q in free if q.key not in known and share(q.key) >= 0.75]
    keys = {q.key for q in held}
    return {"train": [q for q in free if q.key not in keys], "test": held}


class _Phrases:
    """Sentences, to be asked whether another one holds one of them or lies in one."""

    def __init__(self, sentences: Iterable[str], n_words: int = 4) -> None:
        self.n_words = n_words
        self.of: dict[tuple[str, ...], list[str]] = {}
        self.short: set[str] = set()
        for sentence in sentences:
            text = normal(sentence.rsplit("\n", 1)[-1])
            words = text.split()
            for i in range(len(words) - n_words + 1):
                self.of.setdefault(tuple(words[i : i + n_words]), []).append(f" {text} ")
            if len(words) < n_words:
                self.short.add(text)

    def touch(self, sentence: str) -> bool:
        text = normal(sentence.rsplit("\n", 1)[-1])
        words, inside = text.split(), f" {text} "
        if text in self.short:
            return True
        grams = (tuple(words[i : i + self.n_words]) for i in range(len(words) - self.n_words + 1))
        return any(inside in other or other in inside for gram in grams for other in self.of.get(gram, ()))


# Own data


def folders(path: str | Path, *, seed: int = 0) -> Suite:
    """Read own data: a sub-folder for each domain, or MMLU's layout.

    A sub-folder holds ``train`` and ``test``, and ``valid`` if there is one, as ``.tsv``, ``.csv``, ``.jsonl`` or
    ``.all``, with columns text (and text2) and label. The labels become the options. Without ``valid`` a fifth of
    train serves for selection; without ``test`` valid (or dev) is the test.

    Args:
        path: The folder.
        seed: Of the order of options.

    Raises:
        FactError: A line cannot be used; with file and line.
        UserError: There is no such folder, or files are missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"There is no folder {str(folder)!r}.")
    if list((folder / "test").glob("*_test.csv")):
        return mmlu_cd(folder)
    rows = {sub.name: _domain(sub, seed) for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name[0] != "."}
    if len(rows) < 2:
        raise UserError(f"{folder} has {len(rows)} sub-folders; a suite needs one for each of two domains or more.")
    return gather(folder.resolve().name, rows, {"seed": seed})


def _domain(folder: Path, seed: int) -> dict[str, list[Question]]:
    files = {s: _file(folder, names) for s, names in _NAMES.items()}
    if files["test"] is None:
        files["test"], files["selection"] = files["selection"], None
    if missing := [s for s in ("train", "test") if files[s] is None]:
        raise UserError(f"{folder} has no {missing[0]} file ({missing[0]}.tsv, .csv, .jsonl or .all).")
    rows = {split: labelled(file) for split, file in files.items() if file is not None}
    options = sorted({row.label for row in rows["train"]})
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"{folder}: a domain needs 2 to {len(LETTERS)} labels; train has {len(options)}.")
    for row in (row for part in rows.values() for row in part):
        if row.label not in options:
            raise UserError(f"{row.where}: the label {row.label!r:.40} does not occur in train.")
    subject = folder.name.replace("_", " ")
    return {
        split: [_shuffled(folder.name, subject, f"{r.text}\n{r.pair}".strip(), options, r.label, seed) for r in part]
        for split, part in rows.items()
    }


_NAMES = {"train": ("train",), "selection": ("valid", "validation", "val", "dev"), "test": ("test",)}


def _file(folder: Path, names: Sequence[str]) -> Path | None:
    places = (folder / f"{name}{suffix}" for name in names for suffix in (".tsv", ".csv", ".jsonl", ".all"))
    return next((place for place in places if place.is_file()), None)


# MMLU


def mmlu_cd(
    folder: str | Path,
    level: Literal["cd4", "fine"] = "cd4",
    domains: Sequence[str] | None = None,
    *,
    max_characters: int | None = None,
    seed: int = 0,
) -> Suite:
    """Read MMLU as the questions of MMLU-CD (reconstruction): 60 % to train on, 15 % to choose by, 25 % for the end.

    Source: the layout and the map of subjects of hendrycks/test; the composing is reconstructed from the abstract of
    arXiv 2605.23913.

    Args:
        folder: Holds ``dev``, ``val`` and ``test`` with a CSV for each subject, or ``mmlu`` with these.
        level: ``cd4``: the four categories; ``fine``: six fields that differ.
        domains: Other categories or fields.
        max_characters: Leave out questions that are longer, options included.
        seed: Of which questions of a subject stay where one would be more than a quarter of its domain.

    Raises:
        FactError: A row is not as published; with file and line.
        UserError: Files are missing, or a domain is too small.
    """
    return _mmlu.read(Path(folder), level, domains, max_characters, seed)


# What edges learn from


def examples(
    suite: Suite,
    domain: str,
    form: Literal["aware", "blind"] = "aware",
    n: int | None = None,
    seed: int = 0,
    *,
    k: int | None = None,
    how: str | None = None,
) -> list[Example]:
    """Make what a domain's edge trains on from its own questions alone.

    Args:
        suite: The suite.
        domain: The edge's domain.
        form: ``blind``: single questions; ``aware``: prompts of 1 to `k` of the domain's own questions, so that the
            format is learned though no text leaves an edge.
        n: How many; if not given, so many that each question is asked once.
        seed: Of the drawing.
        k: The most questions of one prompt; as many as the suite has domains, at most 4.
        how: The template; the suite's if not given.

    Raises:
        UnknownName: The suite has no such domain, or there is no such template.
    """
    if domain not in suite.domains:
        raise unknown(f"domain of {suite.name}", domain, suite.domains)
    most = 1 if form == "blind" else k or min(4, len(suite.domains))
    front = suite.shots.get(domain, ())[:1]
    return lessons(suite.train[domain], most, f"{seed} {domain} {form}", n=n, how=how or suite.template, front=front)


def answered(suite: Suite, k: int, seed: int = 0) -> tuple[tuple[Question, ...], ...]:
    """Draw the answered examples that the suite's template wants in front of a prompt of `k` questions; most want none.

    Raises:
        UserError: The suite keeps too few questions for them.
    """
    n = template(suite.template).n_shots
    return shots(suite.shots, k, n, seed) if n else ()


def lessons(
    questions: Sequence[Question], most: int, seed: str, *, n: int | None = None, how: str = "plain",
    front: Sequence[Question] = (),
) -> list[Example]:  # fmt: skip
    """Make examples of any questions, 1 to `most` in a prompt; public ones serve for replay.

    Args:
        questions: The questions.
        most: The most questions of one prompt.
        seed: Of the drawing.
        n: How many; if not given, so many that each question is asked once.
        how: The template.
        front: The answered example that stands in front, where the template has any.

    Raises:
        UserError: There is no question.
        UnknownName: There is no such template.
    """
    wording = template(how)
    if wording.n_shots and not front:
        raise UserError(
            f"The template {wording.name} wants answered examples in front, and no question is kept for them."
        )
    before = [tuple(front)] * wording.n_shots
    return [_example(group, wording.name, before) for group in composed(questions, most, seed, n=n)]


def _example(group: Sequence[Question], how: str, front: Sequence[Sequence[Question]]) -> Example:
    shown = render(group, how, front)
    right = [q.answer for q in group]
    if template(how).asks == "end":
        return Example(shown.prompt, shown.target(right))
    last = shown.labels[-1][right[-1]]  # loss on answers only, and here questions stand between them
    return Example(shown.prompt + shown.target(right)[: -len(last)].rstrip(), f" {last}")
