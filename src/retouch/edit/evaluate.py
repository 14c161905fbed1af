"""What an edit did: to the fact, its paraphrases, its neighbours and its subject's other relations.

The model before the edit is measured once (`examine`), each edited model against that (`grade`), or many edited models
at once (`grade_all`). A record's own means come first, then the mean over records (`summarise`), with a bootstrap
interval over subjects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from ..change import Change
from ..lanes import Owners
from ..measure import Answer, Before, Shift, answers, continuations, look, next_logp, perplexities, perplexity
from ..model import Model
from ..progress import report
from ..stats import bundled_text
from ..tokens import Bos, Text
from .facts import Fact, Prompt, is_stop
from .score import harmonic, summarise
from .written import Generated, generate, hit, owned

__all__ = [
    "Exam",
    "Generated",
    "Neutral",
    "examine",
    "generate",
    "grade",
    "grade_all",
    "harmonic",
    "hit",
    "known",
    "look_again",
    "neutral_of",
    "summarise",
]

T = TypeVar("T")
SPELLINGS = 10
"""Other spellings of a related prompt's answer that are tried; published sets have up to 163."""


@dataclass(frozen=True, eq=False)
class Exam:
    """One fact and what the model before the edit says around it.

    Attributes:
        fact: The fact.
        truth: The old answer: the fact's own, or the model's greedy one.
        gold: For each related prompt the token that stands for the old answer.
        logp: Log P of the next token after each neighbour and each related prompt, (prompts, vocabulary), where the
            model runs.
        bits: N-gram entropy of the texts generated before the edit; None when there are no generation prompts.
    """

    fact: Fact
    truth: str
    gold: tuple[int, ...]
    logp: Tensor
    bits: float | None

    @property
    def argmax(self) -> Tensor:
        """The likeliest next token after each neighbour, then after each related prompt."""
        return self.logp.argmax(1)

    def forgotten(self) -> Exam:
        """Drop the distributions, which are by far the largest part; `look_again` brings them back."""
        return replace(self, logp=self.logp.new_empty(0, self.logp.shape[1]))


@dataclass(frozen=True)
class Neutral:
    """Perplexity on a fixed text before the edit."""

    text: str
    n_tokens: int
    before: float


def neutral_of(model: Model, n_tokens: int = 256) -> Neutral:
    """Measure the neutral text that ships with Retouch."""
    text = bundled_text("neutral")
    return Neutral(text, n_tokens, perplexity(model, text, n_tokens))


def examine(
    model: Model,
    facts: Sequence[Fact],
    *,
    n_generations: int = 2,
    seed: int = 0,
    bos: Bos = "tokenizer",
    batch_size: int = 16,
) -> list[Exam]:
    """Measure the model before any edit, once for all methods.

    Args:
        model: The unedited model.
        facts: The facts.
        n_generations: How many of a fact's generation prompts are continued for fluency.
        seed: Of the sampling.
        bos: Beginning-of-text rule.
        batch_size: Facts of one batch of sampling; the same as that of `generate` after the edit.
    """
    if not facts:
        return []
    report("Before the edits", 0, len(facts))
    unknown = [f for f in facts if not f.truth]
    said = dict(zip(map(id, unknown), continuations(model, [f.filled for f in unknown], 4)))
    truths = [f.truth or said[id(f)].strip().split("\n")[0] or "the" for f in facts]
    texts = generate(model, facts, n_generations=n_generations, edit_form=False, seed=seed, batch_size=batch_size)
    logps = _next(model, facts, bos)
    golds = [tuple(_gold(model, row) for row in logp[len(f.neighbors) :]) for f, logp in zip(facts, logps)]
    report("Before the edits", len(facts), len(facts))
    return [Exam(*each) for each in zip(facts, truths, golds, logps, [t.bits for t in texts])]


def look_again(model: Model, exams: Sequence[Exam], bos: Bos = "tokenizer") -> list[Exam]:
    """Ask the unedited model anew for distributions that were dropped."""
    return [replace(e, logp=logp) for e, logp in zip(exams, _next(model, [e.fact for e in exams], bos))]


def _next(model: Model, facts: Sequence[Fact], bos: Bos) -> list[Tensor]:
    sizes = [len(f.neighbors) + len(f.related) for f in facts]
    texts = [Text(p.prompt) for f in facts for p in _around(f)]
    return list(torch.split(next_logp(model, texts, bos, device=model.device), sizes))


def _around(fact: Fact) -> tuple[Prompt, ...]:
    return (*fact.neighbors, *fact.related)


def _gold(model: Model, logp: Tensor, among: int = 20) -> int:
    """Pick the likeliest next token that is no stop word; the likeliest one if all are."""
    top: list[int] = logp.topk(min(among, len(logp))).indices.tolist()
    return next((t for t in top if not is_stop(model.tokenizer.decode([t]).strip())), top[0])


def grade(
    model: Model,
    exam: Exam,
    *,
    generated: Generated | None = None,
    neutral: Neutral | None = None,
    bos: Bos = "tokenizer",
) -> dict[str, float]:
    """Measure an edited model on one fact. Metrics that the fact has no prompts for are left out.

    Args:
        model: The edited model.
        exam: What `examine` measured before.
        generated: What the edited model wrote (`generate`); None leaves fluency, edit_form and instruction out.
        neutral: The neutral text's perplexity before; None leaves the ratio out.
        bos: Beginning-of-text rule.

    Source:
        Meng et al. 2022 (efficacy, paraphrase, neighbourhood, fluency); sunshower-liu/RETS (R-specificity). See
        ``docs/metrics.md`` for every formula.

    Returns:
        Metrics by name, from 0 to 1 unless the name says otherwise.
    """
    written = None if generated is None else [generated]
    return grade_all(model, [exam], generated=written, neutral=neutral, bos=bos)[0]


def grade_all(
    model: Model,
    exams: Sequence[Exam],
    changes: Sequence[Change] | None = None,
    *,
    generated: Sequence[Generated] | None = None,
    neutral: Neutral | None = None,
    bos: Bos = "tokenizer",
) -> list[dict[str, float]]:
    """Measure many facts in few passes: on one edited model, or each under its own change.

    Equal to applying each change and grading its facts alone.

    Args:
        model: The edited model; with `changes`, the unedited one.
        exams: What `examine` measured before.
        changes: The change of each record; one that several records share runs once.
        generated: What the edited models wrote about each record.
        neutral: As in `grade`.
        bos: As in `grade`.
    """
    texts = [_targets(e) for e in exams]
    prompts = [_prompts(e) for e in exams]
    each = [i for i, own in enumerate(texts) for _ in own] + [i for i, own in enumerate(prompts) for _ in own]
    with owned(model, changes, each) as owners:
        said, shifts = look(model, _flat(texts), _flat(prompts), bos, owners)
        ratios = _ratios(model, neutral, changes, owners) if neutral else []
    heard, moved = iter(said), iter(shifts)
    rows = []
    for i, exam in enumerate(exams):
        row = _row(exam, _Heard(heard), list(islice(moved, len(prompts[i]))))
        if generated is not None:
            _written(row, exam, generated[i])
        if neutral is not None:
            row["perplexity_ratio"] = ratios[i if changes else 0]
        rows.append(row)
    return rows


def _flat(lists: Iterable[Iterable[T]]) -> list[T]:
    return [item for inner in lists for item in inner]


def _ratios(model: Model, neutral: Neutral, changes: Sequence[Change] | None, owners: Owners | None) -> list[float]:
    """Measure the neutral text once for each distinct change, and once where all records share a model."""
    if not changes or owners is None:
        return [perplexity(model, neutral.text, neutral.n_tokens) / neutral.before]
    first = {id(c): i for i, c in reversed(list(enumerate(changes)))}
    found = perplexities(model, neutral.text, Owners(owners.lanes, list(first.values())), neutral.n_tokens)
    ratio = dict(zip(first, (p / neutral.before for p in found)))
    return [ratio[id(c)] for c in changes]


# What is asked about a fact; `_row` hears the answers in this order


def _targets(exam: Exam) -> list[Text]:
    fact = exam.fact
    asked = [Text(fact.before, fact.subject, fact.after), *(Text(p) for p in fact.paraphrases)]
    pairs = [(t, answer) for t in asked for answer in (fact.target, exam.truth)]
    pairs += [(Text(p.prompt), a) for p in fact.neighbors for a in (p.answer or exam.truth, fact.target)]
    pairs += [(Text(p.prompt), fact.target) for p in fact.related]
    pairs += [(Text(p.prompt), answer) for p in fact.related for answer in _right(p)]
    return [replace(text, target=answer) for text, answer in pairs]


def _right(prompt: Prompt) -> list[str]:
    """Return the spellings of a known answer that count as right."""
    return [prompt.answer, *prompt.aliases[:SPELLINGS]] if prompt.answer else []


def _prompts(exam: Exam) -> list[Before]:
    tokens = [0] * len(exam.fact.neighbors) + list(exam.gold)
    return [Before(Text(p.prompt), logp, t) for p, logp, t in zip(_around(exam.fact), exam.logp, tokens, strict=True)]


@dataclass(frozen=True)
class _Heard:
    """The answers, in the order of `_targets`."""

    answers: Iterator[Answer]

    def take(self, n: int) -> list[Answer]:
        return list(islice(self.answers, n))

    def pairs(self, n: int) -> list[tuple[Answer, Answer]]:
        both = self.take(2 * n)
        return list(zip(both[::2], both[1::2]))


def _row(exam: Exam, heard: _Heard, shifts: Sequence[Shift]) -> dict[str, float]:
    fact, row = exam.fact, dict[str, float]()
    new, old = heard.pairs(1)[0]
    _rewrites(row, "efficacy", [(new, old)])
    row["efficacy_magnitude"] = math.exp(-new.nll) - math.exp(-old.nll)
    _rewrites(row, "paraphrase", heard.pairs(len(fact.paraphrases)))
    n = len(fact.neighbors)
    if n:
        near = heard.pairs(n)
        row["s_specificity"] = _mean(old.nll < new.nll for old, new in near)
        row["s_specificity_strict"] = _mean(old.strict for old, _ in near)
        row["s_specificity_tokens"] = _mean(old.exact for old, _ in near)
        _moved(row, "s", shifts[:n])
    if fact.related:
        _related(row, exam, heard, shifts[n:])
        _moved(row, "r", shifts[n:])
    return row


def _rewrites(row: dict[str, float], name: str, said: Sequence[tuple[Answer, Answer]]) -> None:
    if said:
        row[name] = _mean(new.nll < old.nll for new, old in said)
        row[f"{name}_strict"] = _mean(new.strict for new, _ in said)
        row[f"{name}_tokens"] = _mean(new.exact for new, _ in said)


def _moved(row: dict[str, float], name: str, shifts: Sequence[Shift]) -> None:
    row[f"{name}_same"] = _mean(s.same for s in shifts)
    row[f"{name}_kl"] = _mean(s.kl for s in shifts)


def _related(row: dict[str, float], exam: Exam, heard: _Heard, shifts: Sequence[Shift]) -> None:
    related = exam.fact.related
    new = heard.take(len(related))
    # the largest of the target's tokens counts, as published; the mean is the stricter reading
    row["r_specificity"] = _mean(old.nll < b.worst for old, b in zip(shifts, new))
    differs = [gold != b.first for gold, b in zip(exam.gold, new)]
    row["r_skipped"] = _mean(not d for d in differs)
    if any(differs):
        row["r_specificity_mean"] = _mean(old.nll < b.nll for old, b, d in zip(shifts, new, differs) if d)
    right = [(heard.take(len(_right(p))), b) for p, b in zip(related, new) if p.answer]
    if right:  # any spelling will do
        row["r_gold"] = _mean(min(a.nll for a in own) < b.nll for own, b in right)
        row["r_gold_strict"] = _mean(any(a.strict for a in own) for own, _ in right)
        row["r_gold_tokens"] = _mean(max(a.exact for a in own) for own, _ in right)


def _written(row: dict[str, float], exam: Exam, generated: Generated) -> None:
    wanted = (exam.fact.target, *exam.fact.aliases)
    row["edit_form"] = float(hit(generated.said, wanted, exam.truth))
    hits = {form: float(hit(said, wanted, exam.truth)) for form, said in generated.instructed.items()}
    if hits:
        row["instruction"] = _mean(hits.values())
        row |= {f"instruction_{form}": value for form, value in hits.items()}
        row["gap"] = row["edit_form"] - row["instruction"]
    if generated.bits is not None and exam.bits is not None:
        row["fluency_bits"] = generated.bits
        row["fluency"] = min(1.0, generated.bits / exam.bits) if exam.bits else 1.0


def _mean(values: Iterable[float]) -> float:
    items = [float(v) for v in values]
    return sum(items) / len(items)


def known(model: Model, facts: Sequence[Fact], bos: Bos = "tokenizer") -> list[bool]:
    """Tell for each fact whether the unedited model prefers the true answer to the new one."""
    usable = [f for f in facts if f.truth]
    texts = [Text(f.before, f.subject, f.after, t) for f in usable for t in (f.target, f.truth or "")]
    said = answers(model, texts, bos)
    verdict = {id(f): old.nll < new.nll for f, new, old in zip(usable, said[::2], said[1::2])}
    return [verdict.get(id(f), False) for f in facts]
