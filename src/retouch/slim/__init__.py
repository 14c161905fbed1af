"""Make a fine-tuned classifier slender, and give it an exit after every block.

A fine-tuned encoder goes in. What comes out keeps every block but is narrower in each: fewer attention heads, fewer
feed-forward neurons, an embedding of lower rank. After every block stands an exit, a small classifier that may answer
for easy texts, so that most texts never run the upper blocks. Width and exits are trained together, because each block
of a small model serves both its own exit and all blocks above it: what to cut is chosen by the losses of all exits,
and a full-size model with exits (the assistant) teaches block to block and exit to exit.

Thresholds come from data: the cost that you state, or the risk that you state, certified on examples that chose
nothing else. The method is COST-EFF (Shen et al., EMNLP 2022).

Importing this package registers the saved model with the Auto classes of transformers, so that
``AutoModelForSequenceClassification.from_pretrained`` opens it.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForSequenceClassification

from .network import SlimConfig, SlimForSequenceClassification

__all__ = ["SlimConfig", "SlimForSequenceClassification"]

AutoConfig.register(SlimConfig.model_type, SlimConfig, exist_ok=True)
AutoModelForSequenceClassification.register(SlimConfig, SlimForSequenceClassification, exist_ok=True)
