"""The slim model, for whoever trains, cuts, serves or saves it.

A `SlimForSequenceClassification` is the family's own encoder with narrower maps inside and an exit after its blocks. It
starts at full width: `from_classifier` takes a fine-tuned classifier, `from_encoder` a bare encoder, `with_exits` another
network of ours. Its pieces are open to the other modules: ``embed``, ``run_block``, ``read_exit``, ``levels``, ``parts``.
"""

from __future__ import annotations

from ._classifier import Levels, SlimForSequenceClassification, SlimOutput
from ._config import SlimConfig
from ._families import Factors, Parts
from ._originals import from_classifier, from_encoder, with_exits
from ._saved import network_of, open_slim, plain_config, prove, save

__all__ = [
    "Factors",
    "Levels",
    "Parts",
    "SlimConfig",
    "SlimForSequenceClassification",
    "SlimOutput",
    "from_classifier",
    "from_encoder",
    "network_of",
    "open_slim",
    "plain_config",
    "prove",
    "save",
    "with_exits",
]
