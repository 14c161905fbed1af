"""First k blocks: drop the upper ones and fine-tune, the plainest rival."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .. import store
from ..errors import UserError
from ..settings import setting
from .base import SlimMethod
from .network import SlimConfig, SlimForSequenceClassification
from .presets import Stage, Stages, TrainingSettings
from .static import length

if TYPE_CHECKING:
    from .stages import Fitted, Run, Trained

__all__ = ["FirstK"]


@dataclass(frozen=True)
class FirstK(TrainingSettings, SlimMethod):
    """Keep the first k blocks of the fine-tuned original at full width and train them on with a fresh exit.

    It learns from the labels, at the rate of fine-tuning, on as many tokens as the method with exits gets after the
    original.

    Source: the depth rival of Turc et al. (2019) and of Sajjad et al., On the Effect of Dropping Layers of Pre-trained
        Transformer Models (2023): dropping upper blocks is often the strongest of the cheap ways.

    Use when: half of the cost is small enough, or as the rival never to omit.

    Known problems: the embedding table stays whole, so that small parameter shares are out of reach.

    Shapes: widths stay as they are; blocks become k.

    Example:
        >>> FirstK(n_blocks=2).n_blocks
        2
    """

    n_blocks: int = setting(3, "How many blocks stay.", ge=1)

    def fit(self, run: Run) -> Fitted:
        """Train the stages in their order.

        Raises:
            UserError: The model has fewer blocks.
        """
        if self.n_blocks > (blocks := run.plan.size.blocks):
            raise UserError(f"n_blocks is {self.n_blocks}, and the model has {blocks} blocks. Keep at most as many.")
        original = run.original()
        return run.fitted(run.recovered(self.shortened(run, original), None, self.stage(run.stages)), original)

    def stage(self, stages: Stages) -> Stage:
        """Return its one stage."""
        whole = length(
            stages.assistant_hidden, stages.assistant, stages.slenderise, stages.recover_hidden, stages.recover
        )
        return replace(stages.finetune, name="first_k").scaled(whole / length(stages.finetune), 1.0)

    def shortened(self, run: Run, original: Trained) -> Trained:
        """Return the first blocks of the original with a fresh exit, untrained."""
        network = original.network
        values, k = network.config.to_dict(), self.n_blocks
        depth = "n_layers" if "n_layers" in values["base"] else "num_hidden_layers"
        parts = {name: values[name][:k] for name in ("heads", "d_ff", "kept_heads", "kept_neurons") if values.get(name)}
        values |= parts | {"base": values["base"] | {depth: k}, "exits": [k - 1], "pooler": None, "temperatures": None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed("exits"))
            short = SlimForSequenceClassification(SlimConfig.from_dict(values)).to(network.device)
        weights = network.body.state_dict()
        short.body.load_state_dict({name: weights[name] for name in short.body.state_dict()})
        key = store.key(whole=original.key, n_blocks=k, seed=self.seed)
        return replace(original, network=short.eval(), key=key, record={})
