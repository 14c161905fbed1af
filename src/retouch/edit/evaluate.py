"""What an edit did: to the fact, its paraphrases, its neighbours and its subject's other relations.

The model before the edit is measured once (`examine`), each edited model against that (`grade`). A record's own means
come first, then the mean over records, with a bootstrap interval over subjects.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..change import Change, side_by_side
from ..measure import Answer, answers, continuations, next_logp, ngram_entropy, perplexity
from ..model import Model
from ..progress import report, track
from ..stats import bundled_text
from ..tokens import Bos, Text
from .facts import Fact, is_stop

__all__ = [
    "Exam",
    "Generated",
    "Neutral",
    "examine",
    "generate",
    "grade",
    "harmonic",
    "hit",
    "known",
    "neutral_of",
    "summarise",
]


@dataclass(frozen=True, eq=False)
class Exam:
    """One fact and what the model before the edit says around it.

    Attributes:
        fact: The fact.
        truth: The old answer: the fact's own, or the model's greedy one.
        gold: For each related prompt the token that stands for the old answer.
        argmax: The likeliest next token after each neighbour and each related prompt.
        logp: Its whole distribution, (prompts, vocabulary).
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


def _texts(fact: Fact) -> list[Text]:
    return [Text(p.prompt) for p in (*fact.neighbors, *fact.related)]


def examine(
    model: Model, facts: Sequence[Fact], *, n_generations: int = 2, seed: int = 0, bos: Bos = "tokenizer"
) -> list[Exam]:
    """Measure the model before any edit, once for all methods.

    Args:
        model: The unedited model.
        facts: The facts.
        n_generations: How many of a fact's generation prompts are continued for fluency.
        seed: Of the sampling.
        bos: Beginning-of-text rule.
    """
    exams = []
    for fact in track(facts, "Before the edits"):
        texts = _texts(fact)
        logp = next_logp(model, texts, bos) if texts else torch.empty(0, model.anatomy.vocab_size)
        gold = tuple(_gold(model, row) for row in logp[len(fact.neighbors) :])
        truth = fact.truth or continuations(model, [fact.filled], 4)[0].strip().split("\n")[0] or "the"
        exams.append(Exam(fact, truth, gold, logp, None))
    texts_before = generate(model, facts, n_generations=n_generations, seed=seed)
    return [replace(e, bits=g.bits) for e, g in zip(exams, texts_before)]


def _gold(model: Model, logp: Tensor, among: int = 20) -> int:
    """Pick the likeliest next token that is no stop word; the likeliest one if all are."""
    top: list[int] = logp.topk(min(among, len(logp))).indices.tolist()
    return next((t for t in top if not is_stop(model.tokenizer.decode([t]).strip())), top[0])


@dataclass(frozen=True)
class Generated:
    """What a model writes about a fact.

    Attributes:
        said: Greedy continuation of the prompt, 16 tokens.
        bits: Mean n-gram entropy of its continued generation prompts; None when it has none.
    """

    said: str
    bits: float | None


def generate(
    model: Model,
    facts: Sequence[Fact],
    changes: Sequence[Change] | None = None,
    *,
    n_generations: int = 2,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Generated]:
    """Let a model continue each fact's prompt and generation prompts.

    Args:
        model: The model; with `changes`, the unedited one.
        facts: The facts.
        changes: A change for each fact: each is asked with its own change in force, many at once.
        n_generations: Generation prompts of each fact, continued to 100 tokens in all by seeded top-k 5; 0 leaves
            fluency out.
        seed: Of the sampling.
        batch_size: Facts of one batch. Sampling draws for a whole batch, so the same batches give the same texts.
    """
    found: list[Generated] = []
    for start in range(0, len(facts), batch_size):
        part = facts[start : start + batch_size]
        here = side_by_side(model, changes[start : start + batch_size]) if changes else nullcontext()
        with here:
            said = continuations(model, [f.filled for f in part], 16)
            prompts = [_some(f, n_generations) for f in part] if n_generations else []
            flat = [p for group in prompts for p in group]
            new = continuations(model, flat, 100, total=True, top_k=5, seed=seed)
        entropies = [ngram_entropy(f"{p} {t}") for p, t in zip(flat, new)]
        for i, fact in enumerate(part):
            own = entropies[i * n_generations : (i + 1) * n_generations] if fact.generation else []
            found.append(Generated(said[i], sum(own) / len(own) if own else None))
        report("Texts written", len(found), len(facts))
    return found


def _some(fact: Fact, n: int) -> list[str]:
    """Exactly `n` generation prompts, repeated where there are fewer, so that all facts fill equal groups."""
    prompts = list(dict.fromkeys(fact.generation)) or [fact.filled]
    return [prompts[i % len(prompts)] for i in range(n)]


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
        generated: What the edited model wrote (`generate`); None leaves fluency and edit_form out.
        neutral: The neutral text's perplexity before; None leaves the ratio out.
        bos: Beginning-of-text rule.

    Source:
        Meng et al. 2022 (efficacy, paraphrase, neighbourhood, fluency); sunshower-liu/RETS (R-specificity). See
        ``docs/metrics.md`` for every formula.

    Returns:
        Metrics by name, from 0 to 1 unless the name says otherwise.
    """
    fact, row = exam.fact, dict[str, float]()
    asked = [Text(fact.before, fact.subject, fact.after), *(Text(p) for p in fact.paraphrases)]
    rewritten = _pairs(model, asked, [(fact.target, exam.truth)] * len(asked), bos)
    _rewrites(row, "efficacy", rewritten[:1])
    row["efficacy_magnitude"] = math.exp(-rewritten[0][0].nll) - math.exp(-rewritten[0][1].nll)
    _rewrites(row, "paraphrase", rewritten[1:])
    texts = _texts(fact)
    if texts:
        _neighbors(row, model, exam, bos)
        _related(row, model, exam, texts, bos)
    if generated is not None:
        row["edit_form"] = float(hit(generated.said, (fact.target, *fact.aliases), exam.truth))
        if generated.bits is not None and exam.bits is not None:
            row["fluency_bits"] = generated.bits
            row["fluency"] = min(1.0, generated.bits / exam.bits) if exam.bits else 1.0
    if neutral is not None:
        row["perplexity_ratio"] = perplexity(model, neutral.text, neutral.n_tokens) / neutral.before
    return row


def _pairs(
    model: Model, texts: Sequence[Text], targets: Sequence[tuple[str, str]], bos: Bos
) -> list[tuple[Answer, Answer]]:
    both = [Text(t.before, t.subject, t.after, target, t.context) for t, pair in zip(texts, targets) for target in pair]
    said = answers(model, both, bos)
    return list(zip(said[::2], said[1::2]))


def _rewrites(row: dict[str, float], name: str, said: Sequence[tuple[Answer, Answer]]) -> None:
    if said:
        row[name] = _mean(new.nll < old.nll for new, old in said)
        row[f"{name}_strict"] = _mean(new.strict for new, _ in said)
        row[f"{name}_tokens"] = _mean(new.exact for new, _ in said)


def _neighbors(row: dict[str, float], model: Model, exam: Exam, bos: Bos) -> None:
    fact = exam.fact
    if not fact.neighbors:
        return
    texts = [Text(p.prompt) for p in fact.neighbors]
    said = _pairs(model, texts, [(p.answer or exam.truth, fact.target) for p in fact.neighbors], bos)
    row["s_specificity"] = _mean(old.nll < new.nll for old, new in said)
    row["s_specificity_strict"] = _mean(old.strict for old, _ in said)


def _related(row: dict[str, float], model: Model, exam: Exam, texts: Sequence[Text], bos: Bos) -> None:
    fact, n = exam.fact, len(exam.fact.neighbors)
    now = next_logp(model, texts, bos)
    same = (now.argmax(1) == exam.argmax).float()
    drift = (exam.logp.exp() * (exam.logp - now)).sum(1).clamp(min=0)
    if n:
        row["s_same"], row["s_kl"] = float(same[:n].mean()), float(drift[:n].mean())
    if len(texts) == n:
        return
    row["r_same"], row["r_kl"] = float(same[n:].mean()), float(drift[n:].mean())
    new = answers(model, [Text(p.prompt, target=fact.target) for p in fact.related], bos)
    old = [-float(now[n + j, t]) for j, t in enumerate(exam.gold)]
    # the largest of the target's tokens counts, as published; the mean is the stricter reading
    row["r_specificity"] = _mean(a < b.worst for a, b in zip(old, new))
    row["r_specificity_mean"] = _mean(a < b.nll for a, b in zip(old, new))


def _mean(values: object) -> float:
    items = [float(v) for v in values]  # type: ignore[attr-defined]
    return sum(items) / len(items)


def hit(said: str, wanted: Sequence[str], old: str) -> bool:
    """Tell whether a text gives the new answer, at word boundaries, and not the old one before it.

    Example:
        >>> hit("It is in Rome, Italy.", ["Rome"], "Paris"), hit("Not Paris but Rome", ["Rome"], "Paris")
        (True, False)
    """
    text = _normal(said)
    places = [m.start() for w in wanted if (m := re.search(rf"\b{re.escape(_normal(w))}\b", text)) and _normal(w)]
    before = re.search(rf"\b{re.escape(_normal(old))}\b", text) if _normal(old) else None
    return bool(places) and not (before and before.start() < min(places))


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]", " ", text).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def known(model: Model, facts: Sequence[Fact], bos: Bos = "tokenizer") -> list[bool]:
    """Tell for each fact whether the unedited model prefers the true answer to the new one."""
    usable = [f for f in facts if f.truth]
    texts = [Text(f.before, f.subject, f.after) for f in usable]
    said = _pairs(model, texts, [(f.target, f.truth or "") for f in usable], bos) if usable else []
    verdict = {id(f): old.nll < new.nll for f, (new, old) in zip(usable, said)}
    return [verdict.get(id(f), False) for f in facts]


def harmonic(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 if one value is 0.

    Example:
        >>> harmonic([1.0, 0.5]), harmonic([1.0, 0.0])
        (0.6666666666666666, 0.0)
    """
    return len(values) / sum(1 / v for v in values) if all(v > 0 for v in values) else 0.0


def summarise(rows: Sequence[Mapping[str, float]], subjects: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Average records into a bench's metrics, with scores, counts and 95 % bootstrap intervals over subjects.

    Returns:
        ``NAME``, ``NAME_low`` and ``NAME_high`` for each metric, ``NAME_n`` where some records lack it, and ``score``
        (harmonic mean of efficacy, paraphrase, s_specificity, r_specificity) or ``score_classic`` without the last.
    """
    names = list(dict.fromkeys(n for r in rows for n in r))
    out: dict[str, float] = {}
    groups = np.unique(np.asarray(list(subjects), dtype=object).astype(str), return_inverse=True)[1]
    draws = np.random.default_rng(seed).integers(0, groups.max() + 1, (1000, groups.max() + 1))
    for name in names:
        has = np.array([name in r for r in rows])
        values = np.array([r.get(name, 0.0) for r in rows])
        out[name] = float(values[has].mean())
        totals = np.bincount(groups, np.where(has, values, 0.0))
        counts = np.bincount(groups, has)[draws].sum(1)
        means = (totals[draws].sum(1) / np.maximum(counts, 1))[counts > 0]  # a draw without the metric says nothing
        out[f"{name}_low"], out[f"{name}_high"] = (float(q) for q in np.quantile(means, [0.025, 0.975]))
        if not has.all():
            out[f"{name}_n"] = float(has.sum())
    classic = ["efficacy", "paraphrase", "s_specificity"]
    if all(n in out for n in classic):
        out["score_classic"] = harmonic([out[n] for n in classic])
        if "r_specificity" in out:
            out["score"] = harmonic([out[n] for n in (*classic, "r_specificity")])
    return out
