"""What a slim model's certificate and its speed are worth, measured after `retouch slim` has trained it.

    python benchmarks/slim_claims.py --data ../shared/data/glue/SST-2 --work STAGES --json benchmarks/results/slim_claims.json

Stages that are in the folder STAGES are reused. Certificates: from calib and test together a calib is drawn with
replacement again and again; the pool's own risk at the threshold that it chooses is the truth. Speed: original and slim
model are called in turns on real texts, in PyTorch and as ONNX stages.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def joined(one: Any, other: Any) -> Any:
    """Return both tables as one."""
    return dataclasses.replace(
        one,
        logits=np.concatenate([one.logits, other.logits], axis=1),
        labels=np.concatenate([one.labels, other.labels]),
        lengths=np.concatenate([one.lengths, other.lengths]),
    )


def drawn(table: Any, rows: Any) -> Any:
    return dataclasses.replace(
        table, logits=table.logits[:, rows], labels=table.labels[rows], lengths=table.lengths[rows]
    )


def certificates(slim: Any, task: Any, limits: list[float], n_draws: int, seed: int = 0) -> list[dict[str, Any]]:
    """Count how often the true risk exceeds the limit that was certified."""
    from retouch.slim.readings import Tables
    from retouch.slim.risk import Risk, losses
    from retouch.slim.table import grid, leaving
    from retouch.slim.thresholds import choose

    tables = Tables(slim.fitted, slim.classifier.tokenizer, task, slim.classifier.max_tokens)
    pool = joined(tables.of("calib"), tables.of("test"))
    original = np.concatenate([tables.original(s).logits[-1] for s in ("calib", "test")])
    lambdas, n, chance = grid(tables.of("valid"), slim.rule), len(task.calib), np.random.default_rng(seed)
    where = leaving(pool, slim.rule, lambdas)
    found = []
    for loss in ("gap", "worse"):
        for limit in limits:
            risk = Risk(limit, loss)  # type: ignore[arg-type]
            truth = losses(pool, where, risk, original=original).mean(0)
            exceeded = reached = 0
            layers = []
            for _ in range(n_draws):
                rows = chance.integers(0, pool.n, n)
                at = choose(drawn(pool, rows), slim.rule, lambdas, risk=risk, original=original[rows])
                if at.reachable:
                    index = int(np.searchsorted(lambdas, at.value))
                    reached += 1
                    exceeded += bool(truth[index] > limit)
                    layers.append(float(where[:, index].mean() + 1))
            found.append({
                "loss": loss, "limit": limit, "delta": risk.delta, "draws": n_draws, "reached": reached / n_draws,
                "exceeded": exceeded / n_draws, "exit_layer": float(np.mean(layers)) if layers else None,
                "true_at_full_depth": float(truth[0]),
            })  # fmt: skip
            print(found[-1], file=sys.stderr)
    return found


def speed(slim: Any, task: Any, n_calls: int, threads: int) -> dict[str, Any]:
    """Time original and slim model side by side, in PyTorch and in onnxruntime."""
    from retouch.router import open_router
    from retouch.slim.encoded import encode
    from retouch.slim.export import export
    from retouch.slim.latency import call_network, call_router, measure

    tokenizer, network, original = slim.classifier.tokenizer, slim.classifier.network, slim.fitted.original
    encoded = encode(tokenizer, task.test, slim.classifier.max_tokens, token_types=network.size.token_types)
    how: dict[str, Any] = {"types": encoded.types, "n_calls": n_calls, "threads": threads}
    nets = {"original": call_network(original), "slim": call_network(network)}
    found = {"pytorch": measure(nets, encoded.ids, **how)}
    with tempfile.TemporaryDirectory() as place:
        shares = slim.point.leaves
        export(original, tokenizer, Path(place) / "original")
        made = export(network, tokenizer, Path(place) / "slim", shares=shares)
        routers = {name: call_router(open_router(Path(place) / name, threads=threads)) for name in ("original", "slim")}
        found["onnxruntime"] = measure(routers, encoded.ids, **how)
    told: dict[str, Any] = {"cuts": list(made.exits.cuts), "flops_speedup": 1 / slim.point.flops_ratio}
    for name, latency in found.items():
        told[name] = latency.to_dict() | {
            "speedup": {f"{b} {o}": latency.speedup("original", "slim", b, o) for b, o in
                        ((1, "shuffled"), (8, "shuffled"), (8, "by_length"), (32, "shuffled"), (32, "by_length"))}
        }  # fmt: skip
        print(name, told[name]["speedup"], file=sys.stderr)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", default="../shared/data/glue/SST-2")
    parser.add_argument("--max-train", type=int, default=20_000)
    parser.add_argument("--params", default="1/8")
    parser.add_argument("--flops", default="1/19")
    parser.add_argument("--length-factor", type=float, default=1.0)
    parser.add_argument("--work", default=None)
    parser.add_argument("--limits", default="0.03,0.05,0.08")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="benchmarks/results/slim_claims.json")
    args = parser.parse_args()
    from retouch import store
    from retouch.measure import environment
    from retouch.slim.api import fit
    from retouch.slim.base import Budget
    from retouch.slim.costeff import CostEff
    from retouch.slim.data import make_task

    task = make_task(args.data, max_train=args.max_train)
    method = CostEff(length_factor=args.length_factor)
    slim = fit(args.model, task, budget=Budget(args.params, args.flops), method=method, folder=args.work)
    limits = [float(x) for x in args.limits.split(",")]
    result = {
        "verb": "slim", "model": args.model, "data": task.name, "environment": environment(),
        "budget": slim.budget.to_dict(), "params_ratio": slim.plan.params_ratio, "point": slim.point.to_dict(),
        "quality_base": slim.quality_base, "threshold": slim.threshold.to_dict() if slim.threshold else None,
        "certificates": certificates(slim, task, limits, args.draws), "speed": speed(slim, task, args.calls, args.threads),
    }  # fmt: skip
    store.write_json_atomic(args.json, result)


if __name__ == "__main__":
    main()
