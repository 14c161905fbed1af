"""Three made-up sites with a few private facts each, for a demonstration that needs no data."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from ..model import Model
from .base import Adapter, Example
from .edge import EdgeSpec

__all__ = ["demo_edges", "recall"]

_SITES = {
    "clinic": ("The ward of patient {} is", ["Bell", "Birch", "Crane", "Dover", "Ellis", "Flint", "Grove", "Hale", "Ives", "Joyce", "Kemp", "Lowe"],
               ["north", "south", "east", "west"]),
    "garage": ("The colour of the van {} is", ["Atlas", "Bison", "Comet", "Delta", "Eagle", "Falcon", "Giant", "Hawk", "Iris", "Jaguar", "Kestrel", "Lynx"],
               ["red", "blue", "green", "white"]),
    "archive": ("The shelf of the folder {} is", ["Acorn", "Bridge", "Candle", "Desert", "Engine", "Forest", "Garden", "Harbor", "Island", "Jungle", "Kitchen", "Lantern"],
                ["one", "two", "three", "four"]),
}  # fmt: skip
_RATIOS = {"clinic": 0.25, "garage": 0.4, "archive": 0.0}


def demo_edges(folder: Path, seed: int = 0) -> list[EdgeSpec]:
    """Write each site's examples to a file and return the sites, each with another share of the model."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for site, (prompt, things, values) in _SITES.items():
        rows = [{"prompt": prompt.format(thing), "target": draw.choice(values)} for thing in things]
        (folder / f"{site}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return [EdgeSpec(site, folder / f"{site}.jsonl", ratio=_RATIOS[site]) for site in _SITES]


def recall(model: Model, adapter: Adapter | None, examples: Sequence[Example]) -> float:
    """Share of the examples whose answer is the likeliest of all answers that occur at its site."""
    from contextlib import nullcontext

    from .._likelihood import answers
    from ..change import side_by_side
    from ..tokens import Text
    from .asking import as_change

    values = sorted({e.target for e in examples})
    with nullcontext() if adapter is None else side_by_side(model, [as_change(adapter)]):
        found = answers(model, [Text(before=e.prompt, target=v) for e in examples for v in values])
    losses = [[a.nll for a in found[i : i + len(values)]] for i in range(0, len(found), len(values))]
    right = [values[row.index(min(row))] == e.target for row, e in zip(losses, examples)]
    return sum(right) / len(right)
