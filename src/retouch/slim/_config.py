"""What a saved slim model says of itself, in its ``config.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .. import anatomy as anatomies
from ..errors import ModelError
from ._families import family_of
from .base import Size, Widths

__all__ = ["FORMAT", "SlimConfig"]

FORMAT = 1
"""The format number of a saved slim model."""


class SlimConfig(PreTrainedConfig):  # type: ignore[misc]
    """The configuration of a `SlimForSequenceClassification`.

    Args:
        base: The family's own configuration as a dictionary, with ``model_type``.
        heads: Attention heads, for each block; None: the original's.
        d_ff: MLP neurons, for each block; None: the original's.
        rank: Rank of the word embedding's two factors; None: one table.
        exits: Blocks with an exit; None: all.
        kept_heads: For each block, the original numbers of its heads, in order; None: the first ones.
        kept_neurons: For each block, the original numbers of its MLP neurons, in order; None: the first ones.
        pooling: What an exit reads: the ``"first"`` real token, or the ``"mean"`` over real tokens.
        pooler: ``"tanh"`` or ``"relu"``: a dense map and what follows it, in front of the last exit's classifier, as
            fine-tuned originals have; None: none.
        task: ``"classification"`` or ``"regression"``.
        target_mean: Mean of a regression's labels; exits answer in standardised units.
        target_scale: Their standard deviation.
        rule: When an exit is sure enough.
        threshold: An exit answers when its uncertainty is below this; None: the last block always answers.
        temperatures: One for each exit, in the order of `exits`; None: 1 everywhere.
        every: Only every so many blocks may an exit answer.
        min_block: The first block whose exit may answer.
        tolerance: How near two answers of a regression must be to count as equal; None: the rule's own default.
        exit_dropout: Dropout in front of each exit's classifier.
        format: Format number.
        **kwargs: What every configuration of transformers takes, such as ``id2label``.
    """

    model_type = "retouch_slim"
    keys_to_ignore_at_inference = ["exit_logits", "exit_block", "hidden_states"]

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        heads: Sequence[int] | None = None,
        d_ff: Sequence[int] | None = None,
        rank: int | None = None,
        exits: Sequence[int] | None = None,
        kept_heads: Sequence[Sequence[int]] | None = None,
        kept_neurons: Sequence[Sequence[int]] | None = None,
        pooling: str = "first",
        pooler: str | None = None,
        task: str = "classification",
        target_mean: float = 0.0,
        target_scale: float = 1.0,
        rule: str = "entropy",
        threshold: float | None = None,
        temperatures: Sequence[float] | None = None,
        every: int = 1,
        min_block: int = 0,
        tolerance: float | None = None,
        exit_dropout: float = 0.1,
        format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        self.format = format
        self.base = base
        self.heads, self.d_ff, self.rank, self.exits = _ints(heads), _ints(d_ff), rank, _ints(exits)
        self.kept_heads, self.kept_neurons = _rows(kept_heads), _rows(kept_neurons)
        self.pooling, self.pooler, self.task = pooling, pooler, task
        self.target_mean, self.target_scale = float(target_mean), float(target_scale)
        self.rule, self.threshold, self.every, self.min_block = rule, threshold, every, min_block
        self.temperatures = None if temperatures is None else [float(t) for t in temperatures]
        self.tolerance, self.exit_dropout = tolerance, exit_dropout
        self.initializer_range = 0.02
        if base is not None:
            self._complete()
            kwargs.setdefault("pad_token_id", base.get("pad_token_id"))
        if task == "regression":
            kwargs.setdefault("problem_type", "regression")
            if not kwargs.get("id2label"):
                kwargs.setdefault("num_labels", 1)
        super().__init__(**{"tie_word_embeddings": False} | kwargs)

    def _complete(self) -> None:
        anatomy = anatomies.describe(self.base_config)
        self.heads = [anatomy.heads] * anatomy.n_blocks if self.heads is None else self.heads
        self.d_ff = [anatomy.d_ff] * anatomy.n_blocks if self.d_ff is None else self.d_ff
        self.exits = list(range(anatomy.n_blocks)) if self.exits is None else self.exits

    @property
    def base_config(self) -> Any:
        """The family's own configuration.

        Raises:
            ModelError: There is none, or the family cannot be slimmed.
        """
        if not isinstance(self.base, dict) or not self.base.get("model_type"):
            raise ModelError("A slim configuration needs base: the configuration of the encoder that it was made from.")
        values = dict(self.base)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        family_of(config)
        return config

    @property
    def size(self) -> Size:
        """The original in numbers."""
        base = self.base_config
        family, anatomy = family_of(base), anatomies.describe(base)
        return Size(
            blocks=anatomy.n_blocks,
            d_model=anatomy.d_model,
            heads=anatomy.heads,
            d_ff=anatomy.d_ff,
            vocab=anatomy.vocab_size,
            positions=base.max_position_embeddings,
            token_types=base.type_vocab_size if family.token_types else 0,
            classes=self.num_labels,
            pooler=self.pooler is not None,
            extra=base.relative_attention_num_buckets * anatomy.heads if family.relative else 0,
        )

    @property
    def widths(self) -> Widths:
        """How wide each block is, and where the exits are."""
        return Widths(tuple(self.heads or ()), tuple(self.d_ff or ()), self.rank, tuple(self.exits or ()))

    def check(self) -> None:
        """Check that a network can be built from these fields.

        Raises:
            UserError: A field has a value that it cannot have, or does not fit another one.
        """
        if not isinstance(self.format, int) or not 1 <= self.format <= FORMAT:
            raise ModelError(
                f"This slim model has format {self.format!r}; this Retouch reads {FORMAT}. Update Retouch."
            )
        size, widths = self.size, self.widths
        widths.require_within(size)
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ModelError(f"A slim model's {name} must be one of {allowed}; got {getattr(self, name)!r}.")
        if self.task == "regression" and self.num_labels != 1:
            raise ModelError(f"A regression has one output; this configuration has {self.num_labels} labels.")
        if not self.target_scale > 0:
            raise ModelError(f"target_scale must be above 0; got {self.target_scale}.")
        if self.temperatures is not None and len(self.temperatures) != widths.n_exits:
            raise ModelError(f"{len(self.temperatures)} temperatures do not fit {widths.n_exits} exits.")
        _check_kept("kept_heads", self.kept_heads, widths.heads, size.heads)
        _check_kept("kept_neurons", self.kept_neurons, widths.d_ff, size.d_ff)


_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "pooling": ("first", "mean"),
    "pooler": (None, "tanh", "relu"),
    "task": ("classification", "regression"),
}


def _check_kept(name: str, kept: list[list[int]] | None, widths: tuple[int, ...], full: int) -> None:
    if kept is None:
        return
    if [len(ids) for ids in kept] != list(widths):
        raise ModelError(f"{name} lists {[len(ids) for ids in kept]} numbers a block; the widths are {list(widths)}.")
    for block, ids in enumerate(kept):
        if ids != sorted(set(ids)) or not all(0 <= i < full for i in ids):
            raise ModelError(f"{name} of block {block} must be different numbers from 0 to {full - 1}, in order.")


def _ints(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else [int(v) for v in values]


def _rows(rows: Sequence[Sequence[int]] | None) -> list[list[int]] | None:
    return None if rows is None else [[int(v) for v in row] for row in rows]
