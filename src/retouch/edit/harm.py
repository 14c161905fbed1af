"""What an edit did to everything else, certified: changed answers and neutral text, on prompts held out from planning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bound import Certificate, certify, require
from ..measure import chunk_nll, next_logp
from ..model import Model
from ..progress import report
from ..stats import bundled_text
from ..tokens import Text
from .constraints import for_facts
from .facts import Fact

__all__ = ["Bystanders", "Harm", "bystanders", "measure_harm"]

CHUNK = 16
"""Tokens of one piece of neutral text: one example of the certificate."""


@dataclass(frozen=True, eq=False)
class Bystanders:
    """Prompts that an edit must leave alone, and what a model says on them.

    Attributes:
        prompts: By group: ``neighbours`` (of the facts), ``same subject`` (other relations), ``protected`` (constraint
            prompts of the half that no method sees while it plans; see `retouch.edit.constraints`). The first and the
            last are certified; a fact's own subject is reported beside.
        logp: log P of the next token, by group, (prompts, vocabulary).
        neutral: NLL of each piece of neutral text, nats a token.
    """

    prompts: dict[str, list[str]]
    logp: dict[str, Tensor]
    neutral: Tensor


@dataclass(frozen=True, eq=False)
class Harm:
    """The difference that an edit made to bystanders.

    Attributes:
        changed: By group, whether each prompt's likeliest next token changed.
        drift: By group, KL(before, after) of the next token, nats.
        perplexity_ratio: Of the neutral text, after over before.
        certificates: Changed answers, and neutral text; both against the same limit.
    """

    changed: dict[str, Tensor]
    drift: dict[str, Tensor]
    perplexity_ratio: float
    certificates: tuple[Certificate, ...]

    @property
    def holds(self) -> bool:
        """Whether every certificate is within its limit."""
        return all(c.holds for c in self.certificates)

    def require(self) -> None:
        """Refuse the change unless every certificate holds.

        Raises:
            BoundRefused: With the numbers.
        """
        for certificate in self.certificates:
            require(certificate)

    def to_dict(self) -> dict[str, object]:
        """Return the numbers for programs."""
        return {
            "certificates": [c.to_dict() for c in self.certificates],
            "perplexity_ratio": self.perplexity_ratio,
            "changed": {g: float(c.float().mean()) for g, c in self.changed.items()},
            "drift_nats": {g: float(d.mean()) for g, d in self.drift.items()},
        }


def bystanders(model: Model, facts: Sequence[Fact], n_tokens: int = 2048, n_protected: int = 320) -> Bystanders:
    """Ask the unedited model what an edit of these facts must not change.

    Args:
        model: The unedited model.
        facts: What is edited.
        n_tokens: Tokens of neutral text.
        n_protected: Most protected prompts.
    """
    edited = {f.filled.strip() for f in facts} | {p.strip() for f in facts for p in f.paraphrases}
    groups = {
        "neighbours": [p.prompt for f in facts for p in f.neighbors],
        "same subject": [p.prompt for f in facts for p in f.related],
        "protected": [c.prompt for c in for_facts(facts, n=n_protected, half="certify")],
    }
    groups = {g: [p for p in dict.fromkeys(ps) if p.strip() not in edited] for g, ps in groups.items()}
    groups = {g: ps for g, ps in groups.items() if ps}
    neutral = chunk_nll(model, bundled_text("neutral"), n_tokens, CHUNK)
    return Bystanders(groups, _ask(model, groups, "Bystanders before the edit"), neutral)


def _ask(model: Model, groups: dict[str, list[str]], what: str) -> dict[str, Tensor]:
    found = {}
    total = sum(map(len, groups.values()))
    done = 0
    for group, prompts in groups.items():
        report(what, done, total)
        found[group] = next_logp(model, [Text(p) for p in prompts])
        done += len(prompts)
    report(what, total, total)
    return found


def measure_harm(edited: Model, before: Bystanders, limit: float, confidence: float = 0.95) -> Harm:
    """Measure the harm to bystanders and certify it from above.

    Two harms, each against `limit`: the share of held-out prompts (protected ones and the facts' neighbours) whose
    likeliest next token changed, by Hoeffding-Bentkus; and the rise of neutral text's NLL, in nats a token clipped to
    [0, 1], by betting. The methods are fixed beforehand, as their guarantee demands.

    Args:
        edited: The edited model.
        before: What the unedited one said.
        limit: Largest harm that is allowed.
        confidence: That each certificate holds.
    """
    now = _ask(edited, before.prompts, "Bystanders after the edit")
    changed = {g: before.logp[g].argmax(1) != now[g].argmax(1) for g in now}
    drift = {g: (before.logp[g].exp() * (before.logp[g] - now[g])).sum(1).clamp(min=0) for g in now}
    neutral = chunk_nll(edited, bundled_text("neutral"), len(before.neutral) * CHUNK, CHUNK)
    rise = (neutral - before.neutral).clamp(0, 1)
    answers = torch.cat([changed[g] for g in ("neighbours", "protected") if g in changed]).double().numpy()
    certificates = (
        certify(
            answers,
            limit,
            confidence=confidence,
            method="hoeffding_bentkus",
            what="changed answers",
        ),
        certify(
            rise.double().numpy(), limit, confidence=confidence, method="betting", what="nats lost on neutral text"
        ),
    )
    ratio = float((neutral.mean() - before.neutral.mean()).exp())
    return Harm(changed, drift, ratio, certificates)
