"""``lwgr``: a language model's knowledge of each user, let in under a limit of harm."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from ..settings import setting
from .base import Recommender, Run

if TYPE_CHECKING:
    from .fitted import PolicyScorer

__all__ = ["LWGR", "PRESETS", "Settled"]


@dataclass(frozen=True)
class Settled:
    """What a preset decides, unless a setting says otherwise.

    Attributes:
        constraint: What the constraint is measured on.
        max_harm: The limit of the mean harm.
        slack: What the harm of one target forgives.
        price: The constraint's price at the start.
        price_step: How fast it moves.
        price_damping: How it answers to a change.
        price_maximum: Its maximum; None: none.
        price_relative: Whether steps are counted in limits, and the harm is smoothed.
        order: Where the instructions stand.
        context: Whose encoder chooses them.
        residual: Whether knowledge is added to the first input, from zero on.
        gate: Whether each user has a factor.
        fusion_layers: How many times the first input looks.
        lagged: Whether training also uses knowledge that is too old.
        knowledge_dropout: Share of the targets that are trained without knowledge.
        n_alone: Epochs in which only the new parts are trained.
        learning_rate: Peak of the recommender's own.
        choice: Which epoch is kept.
    """

    constraint: Literal["slice", "batch", "fixed", "none"]
    max_harm: float
    slack: float
    price: float
    price_step: float
    price_damping: float
    price_maximum: float | None
    price_relative: bool
    order: Literal["suffix", "prefix"]
    context: Literal["reference", "policy"]
    residual: bool
    gate: bool
    fusion_layers: int
    lagged: bool
    knowledge_dropout: float
    n_alone: int
    learning_rate: float
    choice: Literal["feasible", "best"]


PRESETS = {
    "default": Settled(
        "slice", 0.03, 0.0, 0.05, 0.05, 0.1, 16.0, True, "suffix", "reference", True, True, 2, True, 0.15, 10, 3e-5,
        "feasible",
    ),
    "paper": Settled(
        "batch", 1e-4, 1e-4, 0.05, 5e-4, 0.0, None, False, "prefix", "policy", False, False, 3, False, 0.0, 0, 3e-4,
        "best",
    ),
}  # fmt: skip
"""Ours, and as published. The maximum price of 16 is four times the four codes of an item."""


@dataclass(frozen=True)
class LWGR(Recommender):
    """Recommend with what a language model knows about each user, and never much worse than without.

    A few instruction tokens are chosen for each user by what the reference recommender knows; a frozen language model
    reads them with the titles of the user's items; its states are fused into the first input of the recommender's
    decoder. This policy is trained while its harm on targets that it does not learn, against the reference, is held
    under a limit by a multiplier.

    Source:
        "LWGR: Lagrangian-Constrained Personalized World Knowledge for Generative Recommendation" (Mu, Deng et al.,
        arXiv 2605.18771). ``preset="paper"`` is the published form as far as it is known. The default differs: the
        constraint stands on targets that cross-entropy does not see, with a limit and steps of honest size; it starts
        equal to the reference; instructions stand behind the titles, so titles are read once.

    Use when:
        Items have titles that say something, and the reference is trained. Compare with ``continued``.

    Known problems:
        With the published constants the constraint does nothing on a small data set. A language model may have read
        public data sets: ``titles_shuffled`` shows what titles carry. The language model itself is not tuned.

    Example:
        >>> LWGR(max_harm=0.02).settled().max_harm, LWGR(preset="paper").settled().order
        (0.02, 'prefix')
    """

    preset: Literal["default", "paper"] = setting("default", "What the settings without a value of their own are.")
    instruction: Literal["codebooks", "continuous", "global", "prompt"] = setting(
        "codebooks", "Tokens from codebooks; as the state asks, without books; free ones for all; or a fixed text's."
    )
    knowledge: Literal["llm", "text", "shuffled", "shuffled_evaluation", "none"] = setting(
        "llm", "A language model; text vectors only; another user's history, always or when evaluated; or nothing."
    )
    titles_shuffled: bool = setting(False, "Give the language model the titles of other items: a control.")
    text_vectors: str = setting(
        "", "A .npy file of one vector an item for ``knowledge=text``; by default those of a bundled sentence encoder."
    )
    prompt: str = setting(
        "Describe what this customer likes, in tastes and needs:", "The text of ``instruction=prompt``."
    )
    constraint: Literal["slice", "batch", "fixed", "none"] | None = setting(
        None, "Harm on kept-back targets, on the training batch, at a fixed price, or no constraint. Paper: batch."
    )
    max_harm: float | None = setting(None, "Limit of the mean harm, nats per code: 0.03; paper: 1e-4.", gt=0)
    harm: Literal["hinge", "margin", "kl"] = setting(
        "hinge", "Likelihood of the target lost; lead over rivals lost; or any change among the best items."
    )
    slack: float | None = setting(None, "Harm that is forgiven to each target: 0; paper: 1e-4.", ge=0)
    price: float | None = setting(None, "The constraint's price at the start: 0.05.", ge=0)
    price_step: float | None = setting(
        None, "How fast it moves: 0.05 per limit of excess, more in a training of few steps; paper: 5e-4 per nat.", gt=0
    )
    price_damping: float | None = setting(None, "How it answers to a change of harm: 0.1; paper: 0.", ge=0)
    price_maximum: float | None = setting(None, "Its maximum: 16; paper: none.", gt=0)
    order: Literal["suffix", "prefix"] | None = setting(
        None, "Instructions behind the titles, or in front. Paper: prefix."
    )
    context: Literal["reference", "policy"] | None = setting(None, "Whose encoder chooses instructions. Paper: policy.")
    residual: bool | None = setting(None, "Add to the first input, beginning with nothing; paper: replace it.")
    gate: bool | None = setting(None, "Give each user a factor for knowledge; paper: no.")
    fusion_layers: int | None = setting(None, "Looks of the first input at knowledge: 2; paper: 3.", ge=1)
    lagged: bool | None = setting(None, "Train with knowledge that is up to 4 items old, too; paper: no.")
    knowledge_dropout: float | None = setting(
        None, "Share of the targets trained without knowledge: 0.15; paper: 0.", ge=0, lt=1
    )
    choice: Literal["feasible", "best"] | None = setting(
        None, "Keep the best epoch within the limit, or the best. Paper: best."
    )
    n_books: int = setting(5, "Instruction tokens for each user.", ge=1)
    n_codewords: int | None = setting(None, "Words of a book; by default 16, 64 or 256, by the number of users.", ge=2)
    d_code: int = setting(32, "Width of a word.", ge=1)
    temperature: float = setting(0.1, "Of the distribution over the words that carries the gradient.", gt=0)
    titles: Literal["pooled", "tokens"] = setting("pooled", "A title is one position, or one a token.")
    llm_text: Literal["title", "text"] = setting("title", "What of an item the language model reads.")
    max_title_tokens: int = setting(12, "Where a title is cut with ``titles=tokens``.", ge=1)
    n_llm_layers: int | None = setting(None, "Blocks of the language model, from the first; by default all.", ge=1)
    text_cache_mib: int = setting(2048, "Memory for what the language model keeps of titles, in MiB.", ge=0)
    n_alone: int | None = setting(
        None, "Most epochs in which only the new parts are trained, before all is: 10; paper: 0.", ge=0
    )
    learning_rate: float | None = setting(None, "Peak of the recommender's learning rate: 3e-5; paper: 3e-4.", gt=0)
    learning_rate_new: float = setting(1e-3, "Peak of the learning rate of all new parts.", gt=0)
    batch_size: int = setting(256, "Targets of a step.", ge=1)
    n_epochs: int = setting(30, "Most passes over the users in which all is trained.", ge=1)
    patience: int = setting(5, "Epochs without a better choice before training ends.", ge=1)
    cuts_per_epoch: int | None = setting(
        None, "Targets of a user and pass; by default 1, or 8 below 2,000 users.", ge=1
    )
    cuts_pool: int = setting(
        8, "Targets of a user with a long history that a language model is asked for; 0: all.", ge=0
    )
    warm_up_steps: int = setting(
        200, "Most steps in which the learning rates rise; never more than a twentieth of the steps.", ge=0
    )
    weight_decay: float = setting(0.01, "Decay of matrices; norms and embeddings have none.", ge=0)
    clip: float = setting(1.0, "Largest norm of a step's gradient.", gt=0)
    n_validation: int = setting(2000, "Most users whom an epoch is judged by.", ge=1)
    validation_beams: int = setting(20, "Beams of the search that judges an epoch.", ge=10)
    beams: int = setting(50, "Beams of the search that ranks.", ge=1)
    full: bool = setting(False, "Rank every item exactly, in place of a search; for small catalogues.")
    filter_seen: bool = setting(False, "Never rank what the history already holds.")

    def settled(self) -> Settled:
        """Return what the preset decides, with this method's own values put in."""
        preset = PRESETS[self.preset]
        own: dict[str, Any] = {f.name: getattr(self, f.name, None) for f in fields(Settled)}
        return Settled(**{name: getattr(preset, name) if value is None else value for name, value in own.items()})

    def fit(self, run: Run) -> PolicyScorer:
        """Train the policy from the run's reference, or go on where an earlier call was stopped.

        Raises:
            UserError: The run has no catalogue, reference, or language model.
        """
        from ._fitting import fit_policy

        return fit_policy(self, run)
