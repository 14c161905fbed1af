"""How much of a LoRA's gain is left when the edge trains on a pruned model and the cloud recovers; which units to prune.

    python benchmarks/fuse_pruning.py --data text-cd:trec,sst2 --plans 80%:wanda,70%:wanda,70%:random --json pruning.json

For each domain: the whole model, the whole model with an adapter trained on it (the most that recovery can reach), and for
each plan the edge's model before and after training, and the whole model with the recovered adapter. Every adapter sees the
same examples in the same order. A plan is BUDGET:SCORE[:ALIGN]; the budget is a share of the memory that training the whole
model takes. Finished parts stay in --work, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def _kept(place: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from retouch import store

    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        store.write_json_atomic(place, make())
    return store.read_json(place)


class Domain:
    """One private domain: its examples, its test questions, and what each model answers to them."""

    def __init__(self, model: Any, suite: Any, name: str, asked: argparse.Namespace, work: Path) -> None:
        from retouch.fuse.compose import Instance
        from retouch.fuse.memory import Load
        from retouch.fuse.suites import answered, examples
        from retouch.fuse.train import LoraSettings

        self.model, self.name, self.seed = model, name, asked.seed
        self.work = work / f"{name}-{asked.seed}-{asked.learning_rate:g}"
        settings = {k: v for k, v in vars(asked).items() if k not in ("plans", "only", "work", "json")}
        if _kept(self.work / "asked.json", lambda: settings) != settings:
            raise SystemExit(f"{self.work} holds parts of a run with other settings. Name another --work.")
        questions = random.Random(asked.seed).sample(suite.test[name], min(asked.n_test, len(suite.test[name])))
        self.test = [Instance(i, (q,)) for i, q in enumerate(questions)]
        self.how = {"wording": suite.template, "shots": answered(suite, 1)}
        self.rows = examples(suite, name, "blind", asked.per_edge, asked.seed)
        self.load = Load(rank=asked.rank, batch=asked.batch)
        self.lora = LoraSettings(
            rank=asked.rank, alpha=2.0 * asked.rank, batch=asked.batch, learning_rate=asked.learning_rate,
            epochs=asked.epochs, seed=asked.seed * 1000, a_seed=asked.seed, lean=False,
        )  # fmt: skip

    def ask(self, step: str, model: Any, change: Any = None) -> Any:
        """Return the answers of a model, with a change beside its weights."""
        from retouch.fuse.asking import asked
        from retouch.fuse.compose import Answers

        def make() -> dict[str, Any]:
            found = asked(model, change, self.test, **self.how)
            return {"how": found.how, "chosen": found.chosen, "scores": found.scores}

        raw = _kept(self.work / f"{step}.json", make)
        scores = tuple(tuple(tuple(part) for part in row) for row in raw["scores"])
        return Answers(tuple(self.test), tuple(tuple(c) for c in raw["chosen"]), raw["how"], scores)

    def trained(self, step: str, model: Any, plan: Any = None) -> Any:
        """Train an adapter on a model."""
        from retouch.fuse.train import initial_a, train

        first = initial_a(self.model, plan, self.lora, edge=0, n_edges=1)
        return train(model, self.rows, self.lora, self.work / f"{step}-training", initial=first, name=self.name)

    def plan(self, text: str) -> dict[str, Any]:
        """Prune, train, recover, and ask at each step."""
        from retouch.fuse._units import units_of
        from retouch.fuse.align import aligned
        from retouch.fuse.asking import as_change
        from retouch.fuse.memory import predicted
        from retouch.fuse.prune import plan_prune
        from retouch.fuse.recover import recover
        from retouch.fuse.transfer import transfer

        budget, score, *align = text.split(":")
        whole = predicted(self.model, units_of(self.model), {}, self.load).mib
        plan = plan_prune(
            self.model, budget_mib=float(budget.rstrip("%")) / 100 * whole, score=score, align=(*align, "bias")[0],
            load=self.load, seed=self.seed,
        )  # fmt: skip
        name = text.replace("%", "").replace(":", "-")
        small = aligned(self.model, plan)
        steps = {"base": self.ask("base", self.model), "pruned": self.ask(f"{name}-pruned", small)}
        edge = self.trained(name, small, plan)
        steps["trained"] = self.ask(f"{name}-trained", small, as_change(edge))
        steps["recovered"] = self.ask(f"{name}-recovered", self.model, as_change(recover(edge, plan, self.model)))
        dense = self.trained("unpruned", self.model)
        steps["unpruned"] = self.ask("unpruned", self.model, as_change(dense))
        sizes = {"ratio": plan.ratio, "edge_mib": plan.peak["total"], "whole_mib": round(whole, 3)}
        seconds = {"edge_seconds": edge.notes["seconds"], "unpruned_seconds": dense.notes["seconds"]}
        return sizes | seconds | transfer(steps)


def told(name: str, rows: dict[str, Any]) -> None:
    """Print a domain's table."""
    columns = ("base", "pruned", "trained", "recovered", "unpruned", "kept", "edge_mib", "whole_mib")
    print(f"\n{name:24s} " + " ".join(f"{c:>9s}" for c in columns))
    for plan, row in rows.items():
        shown = ("-" if row[c] is None else f"{row[c]:.0f}" if c.endswith("mib") else f"{row[c]:.3f}" for c in columns)
        print(f"{plan:24s} " + " ".join(f"{s:>9s}" for s in shown))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all plans on all domains, write one JSON object, print a table for each domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="text-cd:trec,sst2", help="As for `retouch bench fuse`.")
    parser.add_argument("--only", default="", help="Domains, commas between; all if not given.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--plans", default="95%:wanda,90%:wanda,80%:wanda,80%:wanda:lstsq,70%:wanda,70%:random")
    parser.add_argument("--template", default="words")
    parser.add_argument("--per-edge", type=int, default=400)
    parser.add_argument("--n-test", type=int, default=300, help="Questions of a domain.")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args(arguments)

    from retouch.cli._fuse_flags import parse_suite
    from retouch.measure import environment
    from retouch.model import open_model

    model, suite = open_model(asked.model), parse_suite(asked.data, asked.seed, asked.template)
    work = asked.work or Path(tempfile.mkdtemp())
    found: dict[str, dict[str, Any]] = {}
    for name in asked.only.split(",") if asked.only else suite.domains:
        domain = Domain(model, suite, name, asked, work)
        found[name] = {plan: domain.plan(plan) for plan in asked.plans.split(",")}
        told(name, found[name])
    if asked.json:
        settings = {k: v for k, v in vars(asked).items() if k not in ("json", "work")}
        result = {"verb": "fuse", "model": model.source, "data": suite.name, "asked": settings,
                  "environment": environment(model), "domains": found}  # fmt: skip
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
