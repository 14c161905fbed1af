"""The recommender without knowledge: what harm is measured against, what a policy starts from, what serves at last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..settings import Settings, setting
from .base import Recommender, Run

if TYPE_CHECKING:
    from .generator import Generator as Generator
    from .scorer import GenerativeScorer

__all__ = ["Reference", "ReferenceSettings"]


@dataclass(frozen=True)
class ReferenceSettings(Settings):
    """How the reference is built and trained."""

    size: Literal["tiny", "small", "base", "tiger"] = setting(
        "small", "Widths and depth: small suits a CPU, base a GPU; tiger is the size of the TIGER paper."
    )
    tokens: Literal["item", "code"] = setting(
        "item", "Encoder positions: one an item, or one a code as published, which costs four times as much."
    )
    dropout: float = setting(0.1, "Share of the activations that training drops; 0.2 for sparse data.", ge=0, lt=1)
    learning_rate: float | None = setting(None, "Peak of the learning rate; by default what suits the size.", gt=0)
    batch_size: int = setting(256, "Samples of a step.", ge=1)
    n_epochs: int = setting(200, "Most passes over the training samples.", ge=1)
    samples_per_epoch: int | None = setting(None, "Samples of an epoch, drawn anew for each; by default all.", ge=1)
    patience: int = setting(10, "Epochs without a better NDCG@10 on validation users before training ends.", ge=1)
    warm_up_steps: int = setting(500, "Steps in which the learning rate rises.", ge=0)
    weight_decay: float = setting(0.01, "Decay of matrices; norms and embeddings have none.", ge=0)
    clip: float = setting(1.0, "Largest norm of a step's gradient.", gt=0)
    n_validation: int = setting(2000, "Most users whom an epoch is judged by.", ge=1)
    validation_beams: int = setting(20, "Beams of the search that judges an epoch.", ge=10)
    seed: int = setting(0, "Seed of everything random.", ge=0)


@dataclass(frozen=True)
class Reference(ReferenceSettings, Recommender):
    """Recommend by writing the next item's codes, with no language model.

    Source: TIGER, "Recommender Systems with Generative Retrieval" (Rajput et al., arXiv 2305.05065). Where we differ:
        the tokeniser is RQ-KMeans, an item is one encoder position, users have no token, scores are true
        log-likelihoods, and the search proves what it did not miss.

    Use when: always; it is the floor under every policy. Against SASRec it shows what codes cost.

    Known problems: items without training interactions are seldom found. On a CPU only ``small`` with item tokens is
        quick; numbers that compare with published ones need ``base`` or ``tiger``, ``tokens="code"``, and a GPU.
    """

    beams: int = setting(50, "Beams of the search; ranks beyond them are unknown.", ge=1)
    full: bool = setting(False, "Rank every item exactly, in place of a search; for small catalogues.")
    filter_seen: bool = setting(False, "Never rank what the history already holds.")

    def fit(self, run: Run) -> GenerativeScorer:
        """Train the generator, or take the run's own if it was trained exactly so.

        Raises:
            UserError: The run has no catalogue, or nothing to train on.
        """
        from .generator_fit import fit_reference, reference_key
        from .scorer import GenerativeScorer

        catalogue = run.needs_catalogue()
        generator = run.reference
        key = reference_key(run.data, run.splits, catalogue, self, run.n_history)
        if generator is None or generator.record.get("key") != key:
            generator = fit_reference(
                run.data, run.splits, catalogue, self, run.folder, n_history=run.n_history, device=run.device
            )
        return GenerativeScorer(
            generator, catalogue, run.data, beams=self.beams, full=self.full, filter_seen=self.filter_seen
        )
