"""One stage of a slim model as an ONNX graph: some blocks, and the exit after them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._exits import Exits

__all__ = ["Stage", "graph_of", "quiet"]


class Stage(nn.Module):
    """The blocks after `start` up to `stop`, and the exit there; the first stage begins with the embeddings."""

    def __init__(self, network: Any, start: int, stop: int) -> None:
        super().__init__()
        self.network, self.start, self.stop = network, start, stop

    @property
    def last(self) -> bool:
        return bool(self.stop == self.network.size.blocks - 1)

    def forward(self, first: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        hidden = first if self.start >= 0 else self.network.embed(first, attention_mask, token_type_ids)
        for block in range(self.start + 1, self.stop + 1):
            hidden = self.network.run_block(block, hidden, attention_mask)
        logits = self.network.read_exit(self.stop, hidden, attention_mask)
        return logits if self.last else (hidden, logits)


def graph_of(stage: Stage, exits: Exits) -> bytes:
    """Trace a stage; its batch and its tokens may be any number from 1."""
    ids, mask = torch.full((3, 5), exits.pad), torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    hidden = torch.zeros(3, 5, stage.network.size.d_model)
    given: tuple[Tensor, ...] = (ids if stage.start < 0 else hidden, mask)
    names = ["input_ids" if stage.start < 0 else "hidden", "attention_mask"]
    if stage.start < 0 and exits.token_types:
        given, names = (*given, torch.zeros_like(ids)), [*names, "token_type_ids"]
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=exits.positions)}
    with quiet():
        program: Any = torch.onnx.export(
            stage.eval(),
            given,
            dynamo=True,
            dynamic_shapes=tuple(axes for _ in given),
            input_names=names,
            output_names=["logits"] if stage.last else ["hidden_out", "logits"],
            verbose=False,
        )
        found: bytes = _bare(program.model_proto).SerializeToString()
    return found


def _bare(model: Any) -> Any:
    """Take out where in whose files each node was traced: it is as large as a small model, and nobody's business."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the exporter tells its own developers, and leave the root logger without a handler of its making."""
    chatty, silent = logging.getLogger("torch.onnx._internal.exporter._registration"), logging.NullHandler()
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    logging.root.addHandler(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.removeHandler(silent)
        chatty.setLevel(level)
