"""Serve an exported slim model with numpy, onnxruntime and tokenizers.

The router lives in ``retouch._router``, which loads no torch: a service that has to stay small imports it from there.
"""

from __future__ import annotations

from .._router import FORMAT, Answers, Exits, Prediction, Router, open_router, read_exits

__all__ = ["FORMAT", "Answers", "Exits", "Prediction", "Router", "open_router", "read_exits"]
