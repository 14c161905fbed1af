"""What fusing loses, what of it is the format's fault, and whether resolving conflict helps, on the synthetic suite.

    python benchmarks/fuse_claims.py --seeds 0,1,2 --json benchmarks/results/fuse_claims-synth.json

Four private domains, one an edge; edges see composed prompts of their own domain (aware) or single questions (blind). All
methods with and without each resolver, the scale tuned in every cell on selection. A resolver counts as better only if
its paired interval over bundles and seeds lies above 0, and above that of the same fusion with its own tuned scale.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = (
    "cat,linear:form=fedit,ties:density=0.5,dare_ties:density=0.5,knots:density=0.5,tsv,iso,ties:space=core:density=0.5"
)
RESOLVERS = "cr-sign,cr-sign:beta=0.5,cr-sign:space=core,cr-subspace,cr-subspace:beta=0.5,cr-subspace:kappa=0.5"


def one(seed: int, form: str, overlap: float, asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the harness once."""
    from retouch import registry
    from retouch.cli._fuse_flags import parse_resolvers
    from retouch.fuse import _synth, bench
    from retouch.fuse.suites import lessons
    from retouch.fuse.train import LoraSettings

    model, suite = _synth.base(asked.base_seed), _synth.synth_cd(asked.edges, overlap, asked.base_seed)
    most = 1 if form == "blind" else _synth.MOST
    replay = tuple(lessons(_synth.public(asked.base_seed), most, f"{seed} replay", n=2000, how="synth"))
    wanted = bench.Bench(
        registry.parse("fuse", asked.methods, seed=seed), parse_resolvers(asked.resolvers), 4, form, 2000, (asked.ratio,),
        lora=LoraSettings(learning_rate=2e-3, n_steps=400, batch=32, dropout=0.0), n_selection=6, n_test=asked.n_test,
        first=54, seed=seed, replay=replay,
    )  # fmt: skip
    place = work / f"{form}-{overlap:g}-{asked.ratio:g}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    return bench.run(model, suite, wanted, place / "result.json", place / "work")


def told(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each system's numbers over seeds, and each resolver's gain over the same fusion without it."""
    rows = {}
    for name in results[0]["methods"]:
        found = [r["methods"][name] for r in results if name in r["methods"]]
        keys = (
            "all_correct",
            "part_correct",
            "single_correct",
            "worst_domain",
            "composition_cost",
            "ppl",
            "lam",
            "seconds",
        )
        rows[name] = {k: [f[k] for f in found] for k in keys if all(f.get(k) is not None for f in found)}
    gains = {
        name: [r["contrasts"][name][name.partition(">")[2]] for r in results]
        for name in results[0]["contrasts"]
        if ">" in name
    }
    return {"methods": rows, "gain_of_resolver": gains, "best_plain": [r["best_plain"] for r in results]}


def main() -> int:
    """Run all cells, write one JSON object, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--forms", default="aware,blind")
    parser.add_argument("--overlaps", default="0")
    parser.add_argument("--edges", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.0)
    parser.add_argument("--base-seed", type=int, default=0)
    parser.add_argument("--n-test", type=int, default=60, help="Bundles of 9 composed prompts.")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--resolvers", default=RESOLVERS)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp())
    cells: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    for form in asked.forms.split(","):
        for overlap in map(float, asked.overlaps.split(",")):
            results = [one(int(s), form, overlap, asked, work) for s in asked.seeds.split(",")]
            cells[f"{form}, overlap {overlap:g}"] = told(results)
            environment = {k: v for k, v in results[0]["environment"].items() if k not in ("settings", "suite")}
            print(f"\n{form}, overlap {overlap:g}: seeds {asked.seeds}, {results[0]['n']} prompts of 4 questions each")
            for name, row in cells[f"{form}, overlap {overlap:g}"]["methods"].items():
                means = {k: sum(v) / len(v) for k, v in row.items()}
                print(f"  {name:40s} " + "  ".join(f"{k} {v:.3f}" for k, v in means.items() if k != "seconds"))
    if asked.json:
        kept = {k: v for k, v in vars(asked).items() if k not in ("json", "work")}
        asked.json.write_text(json.dumps({"verb": "fuse", "suite": "synth-cd", "asked": kept, "environment": environment,
                                          "cells": cells}, indent=1) + "\n", encoding="utf-8")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
