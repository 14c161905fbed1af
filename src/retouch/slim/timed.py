"""Take the time of a saved slim model, and of its export, on real texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .._texts import Text
from ..errors import UserError
from ..router import Router, open_router
from ._reading import Example
from .encoded import encode
from .latency import Latency, call_network, call_router, measure
from .predict import Classifier, open_classifier

__all__ = ["NO_ORIGINAL", "timed"]

NO_ORIGINAL = "The original is not at hand, so no speed-up is told: retouch bench slim measures both in turn."


def timed(
    folder: str | Path,
    texts: Sequence[Text],
    *,
    export: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    n_calls: int = 500,
    threads: int = 1,
) -> Latency:
    """Time a saved slim model, called ``slim``, and its export, called ``export``, with early exits as saved.

    PyTorch and onnxruntime disturb each other's threads, so the two are timed one after the other.

    Args:
        folder: What `retouch.slim.api.Slim.save` wrote.
        texts: Texts, or pairs of texts, of the kind that will be answered.
        export: What ``--export`` wrote of it; None leaves it out.
        batch_sizes: Texts of one call.
        n_calls: Calls at batch size 1.
        threads: Threads of each.

    Raises:
        ModelError: The folder holds no slim model.
        StoreError: `export` is damaged or no export.
        UserError: There are no texts, or the export is of another model.
    """
    if not texts:
        raise UserError("There is no text to time a model on. Give a file with some.")
    classifier = open_classifier(folder)
    calls = {"slim": call_network(classifier.network)}
    router = None if export is None else _opened(export, classifier, threads)
    examples = [Example(text, None, 0) if isinstance(text, str) else Example(*text, 0) for text in texts]
    most = classifier.max_tokens if router is None else min(classifier.max_tokens, router.exits.positions)
    encoded = encode(classifier.tokenizer, examples, most, token_types=classifier.network.size.token_types)
    found = [
        measure(
            one, encoded.ids, types=encoded.types, pad=encoded.pad, batch_sizes=batch_sizes, n_calls=n_calls,
            threads=threads,
        )
        for one in (calls, *([] if router is None else [{"export": call_router(router)}]))
    ]  # fmt: skip
    return _together(found)


def _opened(export: str | Path, classifier: Classifier, threads: int) -> Router:
    router, widths = open_router(export, threads=threads), classifier.network.widths.to_dict()
    if any(router.exits.widths.get(name) != widths[name] for name in ("heads", "d_ff", "rank")):
        raise UserError(f"{export} is the export of another model: its widths differ. Export this one anew.")
    return router


def _together(found: Sequence[Latency]) -> Latency:
    rows = sorted((row for one in found for row in one.rows), key=lambda row: (row.batch_size, row.order != "shuffled"))
    load = {"load_after": found[-1].environment["load_after"]}
    return replace(
        found[0],
        rows=tuple(rows),
        environment={**found[0].environment, **load},
        noisy=any(one.noisy for one in found),
    )
