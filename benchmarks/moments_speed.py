"""Second moments of all of MEMIT's blocks in one pass: against the machine's rate and the obvious version.

python benchmarks/moments_speed.py --tokens 8192
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _peer
import torch
from torch import Tensor

from retouch import stats
from retouch.edit.base import down
from retouch.edit.memit import Memit
from retouch.measure import flops_per_token, watched
from retouch.model import Model, open_model
from retouch.trace import Trace

Rows = Sequence[tuple[int, ...]]
SAME_MOMENT = 1e-4
"""How far the two means may lie apart, as a share of their length."""


@torch.no_grad()
def obvious(model: Model, names: Sequence[str], rows: Rows) -> dict[str, Tensor]:
    """Take each weight's mean outer product as the equation reads: a pass of its own, row by row, in float64."""
    special = torch.tensor(model.tokenizer.all_special_ids)
    means = {}
    for name in names:
        width = model.matrix(name).shape[1]
        total, count = torch.zeros(width, width, dtype=torch.float64), 0
        for row in rows:
            batch = model.batch([row])
            with Trace(model) as trace:
                trace.read(name, "input")
                trace.run(batch, stop_after=name)
                keep = (batch.positions > 0) | torch.isin(batch.ids, special)
                keys = trace[name, "input"][keep].double()
            total += keys.T @ keys
            count += len(keys)
        means[name] = total / count
    return means


def work(model: Model, names: Sequence[str], rows: Rows, kept: int) -> dict[str, float]:
    """Count the FLOPs that one pass cannot leave out.

    Returns:
        ``pass``: the blocks up to the last wanted weight, which itself need not run. ``products``: the outer products
        of the `kept` tokens. ``attention_scores``: for information, queries by keys and weights by values over whole
        rows; not part of the limit.
    """
    a = model.anatomy
    last = max(map(a.block_of, names))
    per_token = flops_per_token(model, a.n_blocks - 1 - last, head=False)  # as many blocks as 0 ... last
    outputs, inputs = a.shape(down(last))
    return {
        "pass": sum(map(len, rows)) * (per_token - 2.0 * outputs * inputs),
        "products": sum(2.0 * kept * a.shape(name)[1] ** 2 for name in names),
        "attention_scores": (last + 1) * sum(4.0 * len(row) ** 2 for row in rows) * a.heads * a.head_dim,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in one process."""
    model = open_model(options.model, device="cpu")
    names = [down(block) for block in Memit().blocks_of(model)]
    longest = getattr(model.network.config, "max_position_embeddings", None) or 512
    rows = stats.sequences(model, stats.bundled_text(), options.tokens, min(512, longest))
    stats.observe(model, names, rows[:1])
    loaded = _peer.resident_mib()
    costs = []
    for _ in range(options.repeats):
        with watched() as cost:
            moments = stats.observe(model, names, rows)
        costs.append(cost)
    seconds = statistics.median(c.seconds for c in costs)
    with watched() as peer:
        means = obvious(model, names, rows)
    gap = max(float((moments[n].mean - means[n]).norm() / means[n].norm()) for n in names)
    flops = work(model, names, rows, moments[names[0]].count)
    rates = {k: v for n in (512, 2048, 8192) for k, v in _peer.rates(model, n).items()}
    limit = (flops["pass"] + flops["products"]) / 1e9 / max(rates.values())
    peak = max(c.peak_mib for c in costs)
    return {
        "benchmark": "moments_speed",
        "model": str(options.model),
        "weights": names,
        "tokens": sum(map(len, rows)),
        "tokens_in_the_moment": moments[names[0]].count,
        "environment": _peer.machine(),
        "seconds": seconds,
        "seconds_of_each_repeat": [c.seconds for c in costs],
        "tokens_per_second": sum(map(len, rows)) / seconds,
        "peak_mib_above_model": peak - loaded if loaded else None,
        "gflop": {k: v / 1e9 for k, v in flops.items()},
        "gflop_per_second_measured": max(rates.values()),
        "gflop_per_second_by_shape": rates,
        "limit_seconds": limit,
        "share_of_rate": limit / seconds,
        "obvious": {"seconds": peer.seconds, "peak_mib_above_model": peer.peak_mib - loaded if loaded else None},
        "ratio_to_obvious": peer.seconds / seconds,
        "largest_relative_gap_of_means": gap,
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    cells = [
        ["one pass a weight, float64", f"{result['obvious']['seconds']:.2f}", "1.0", ""],
        [
            "one pass for all",
            f"{result['seconds']:.2f}",
            f"{result['ratio_to_obvious']:.1f}",
            f"{result['share_of_rate']:.0%}",
        ],
        ["limit", f"{result['limit_seconds']:.2f}", "", "100%"],
    ]
    columns = ["", "seconds", "times faster", "share of the measured rate"]
    scores = result["gflop"]["attention_scores"] / (result["gflop"]["pass"] + result["gflop"]["products"])
    notes = [
        f"Rate: {result['gflop_per_second_measured']:.0f} GFLOP/s in float32, the fastest product of this model's shapes.",
        f"Attention scores, {scores:.0%} more arithmetic, are not in the limit.",
    ]
    title = f"Second moments of {len(result['weights'])} weights, {result['tokens']} tokens, {result['model']}"
    _peer.show(title, columns, cells, notes)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, bundled name or hub id")
    parser.add_argument("--tokens", default=8192, type=int, help="tokens of the bundled corpus")
    parser.add_argument("--repeats", default=3, type=int, help="passes of which the median is taken")
    parser.add_argument("--json", type=Path, default=_peer.RESULTS / "moments_speed.json", help="where the result goes")
    options = parser.parse_args(words)
    if options.tokens < 2 or options.repeats < 1:
        parser.error(f"--tokens takes 2 or more and --repeats 1 or more; got {options.tokens} and {options.repeats}.")
    return options


def main() -> None:
    """Measure, write, print; fail when the two versions do not agree."""
    options = parse()
    result = run(options)
    _peer.write(options.json, result)
    show(result)
    gap = result["largest_relative_gap_of_means"]
    if not gap <= SAME_MOMENT:
        raise SystemExit(f"The means lie {gap:.1e} of their length apart (at most {SAME_MOMENT:g}).")


if __name__ == "__main__":
    main()
