"""What pruning costs an edge and recovering costs the cloud: the edge's own questions to each model on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from .compose import Answers
from .composed_metrics import measure, paired

__all__ = ["of_domain", "transfer"]


def of_domain(answers: Answers, domain: str) -> Answers:
    """Keep the single questions of one domain."""
    rows = [i for i, asked in enumerate(answers.instances) if asked.parts[0].domain == domain]
    instances = tuple(answers.instances[i] for i in rows)
    chosen = tuple(answers.chosen[i] for i in rows)
    return replace(answers, instances=instances, chosen=chosen, scores=tuple(answers.scores[i] for i in rows))


def transfer(steps: Mapping[str, Answers]) -> dict[str, Any]:
    """Compare the models that an adapter goes through, on single questions of its own domain.

    Source: what LoRAM (ICLR 2025) promises by training small and inferring large; the table is ours.

    Args:
        steps: Answers to the same questions by ``base`` (the whole model), ``pruned`` (the edge's model before
            training), ``trained`` (after), ``recovered`` (the whole model with the recovered adapter), and perhaps
            ``unpruned`` (the whole model with an adapter trained on it).

    Returns:
        Each one's share of right answers; ``gap``, trained less recovered, with its interval over bundles; with
        ``unpruned`` also ``lost``, unpruned less recovered, and ``kept``, the share of its gain over the base that the
        recovered adapter has (none where it gained nothing).
    """
    told: dict[str, Any] = {name: measure(answers).part_correct for name, answers in steps.items()}
    told["gap"] = asdict(paired(steps["trained"], steps["recovered"], "part_correct"))
    if "unpruned" in steps:
        gain = told["unpruned"] - told["base"]
        told["lost"] = asdict(paired(steps["unpruned"], steps["recovered"], "part_correct"))
        told["kept"] = (told["recovered"] - told["base"]) / gain if gain > 0 else None
    return told
