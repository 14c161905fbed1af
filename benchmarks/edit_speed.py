"""Seconds for one fact's value: our search, the obvious one, and what the arithmetic alone would take.

All three are measured in one run, on the same facts, with ROME's settings and without an early stop, so that every fact
takes all its steps and the work is equal.

    python benchmarks/edit_speed.py --batches 1,8,32 --obvious 4
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _peer
import torch
from torch import Tensor

from retouch.edit import facts as fact_sets
from retouch.edit.base import ValueEditMethod
from retouch.edit.contexts import contexts_for
from retouch.edit.facts import Fact
from retouch.edit.rome import Rome
from retouch.edit.rows import Problem, problems
from retouch.edit.value import Value, optimise
from retouch.measure import flops_per_token, watched
from retouch.model import Model, open_model
from retouch.trace import first_tensor

SAME_LOSS = 1e-4
"""How far our loss and the obvious one may lie apart at one and the same value, in nats: both sum some hundred float32
log-probabilities of size 1 to 20 in different orders."""
SAME_END = 5e-3
"""How far the last losses of the two searches may lie apart, in nats. Adam's first update has one size in every
coordinate and the sign of the gradient, and where the gradient is almost 0 rounding decides that sign: the two ways to
the minimum part there, though both walk down one function. Measured: 1.6e-3."""


# The obvious version


class Obvious:
    """The search as the equations read: whole passes of all rows, logits at every position."""

    def __init__(self, model: Model, problem: Problem, block: int, settings: ValueEditMethod) -> None:
        assert problem.kl is not None
        self.model, self.problem, self.block, self.s = model, problem, block, settings
        self.rows = [*(row.seen for row in problem.rows), problem.kl.ids]
        self.anchors = [*problem.anchors, problem.kl.subject or 0]
        self.batch = model.batch(self.rows)
        self.value: Tensor | None = None
        self.before: Tensor | None = None
        with torch.no_grad():
            self.loss(torch.zeros(model.anatomy.d_model))

    def loss(self, delta: Tensor) -> Tensor:
        """Add a value to every row and take the loss."""
        logp = self._logp(delta)
        drift = logp[-1, len(self.rows[-1]) - 1 if self.s.kl_position == "last" else self.anchors[-1]]
        self.before = drift.detach().clone() if self.before is None else self.before
        nll = torch.stack([_nll(logp[i], row.prompt, row.target) for i, row in enumerate(self.problem.rows)]).mean()
        kl = (drift.exp() * (drift - self.before)).sum()
        assert self.value is not None
        found: Tensor = nll + self.s.kl_factor * kl + self.s.weight_decay * delta.norm() / self.value.norm() ** 2
        return found

    def _logp(self, delta: Tensor) -> Tensor:
        number = torch.arange(len(self.rows))

        def add(_: Any, args: Any, output: Any) -> Any:
            state = first_tensor(output).clone()
            shaped = state.view(*self.batch.shape, -1)  # OPT flattens rows and columns in its MLP
            self.value = shaped[0, self.anchors[0]].detach().clone() if self.value is None else self.value
            shaped[number, self.anchors] += delta
            return (state, *output[1:]) if isinstance(output, tuple | list) else state

        handle = self.model.module(f"blocks.{self.block}.mlp.down").register_forward_hook(add)
        try:
            out: Any = self.model.network(**self.model.inputs(self.batch), use_cache=False)
            logp: Tensor = out.logits.float().log_softmax(-1)
            return logp
        finally:
            handle.remove()

    def search(self) -> float:
        """Take all steps; return the last loss."""
        assert self.value is not None
        delta = torch.zeros_like(self.value).requires_grad_(True)
        adam = torch.optim.Adam([delta], lr=self.s.learning_rate)
        longest = self.s.clamp * self.value.norm()
        for _ in range(self.s.n_steps - 1):
            adam.zero_grad()
            self.loss(delta).backward()  # type: ignore[no-untyped-call]
            adam.step()
            with torch.no_grad():
                delta *= (longest / delta.norm()).clamp(max=1)
        return float(self.loss(delta).detach())


def _nll(logp: Tensor, prompt: int, target: Sequence[int]) -> Tensor:
    places = torch.arange(prompt, prompt + len(target))
    return -logp[places, list(target)].mean()


# The computed limit


@dataclass(frozen=True)
class Work:
    """The multiply-adds that no implementation can leave out, as FLOPs; attention scores are not counted.

    Attributes:
        once: One pass of every row up to its last token that matters, before the first step.
        steps: Per step, blocks above the edited weight, from the edited token on, and the head where the loss reads;
            forward at each step, and the gradient of the activations at each but the last.
        step_tokens: Tokens of one such pass.
    """

    once: float
    steps: float
    step_tokens: int


def work(model: Model, found: Sequence[Problem], block: int, settings: ValueEditMethod) -> Work:
    """Count what must run for these facts."""
    reads = [(len(row.seen), p.anchor(row), len(row.target)) for p in found for row in p.rows]
    for p in found:
        if p.kl is not None:
            anchor = p.kl.subject or 0
            reads.append(((len(p.kl.ids) if settings.kl_position == "last" else anchor + 1), anchor, 1))
    tokens = sum(end - anchor for end, anchor, _ in reads)
    head = flops_per_token(model) - flops_per_token(model, head=False)
    one = tokens * flops_per_token(model, block + 1, head=False) + sum(n for *_, n in reads) * head
    once = sum(end for end, *_ in reads) * flops_per_token(model, head=False)
    return Work(once, one * (2 * settings.n_steps - 1), tokens)


# The comparison


def chosen_facts(data: Path | None, n: int) -> list[Fact]:
    """Take `n` facts in a fixed random order: of a file, or the sample facts with each other's subjects."""
    facts = fact_sets.load(data) if data else fact_sets.demo()
    facts = [f for f in facts if f.subject]
    if not data:
        turns = range(-(-n // len(facts)))
        facts = [replace(f, subject=facts[(i + t) % len(facts)].subject) for t in turns for i, f in enumerate(facts)]
    if len(facts) < n:
        raise SystemExit(f"{data} holds {len(facts)} facts with a subject; {n} are needed. Ask for smaller --batches.")
    return random.Random(0).sample(facts[: max(n, 512)], n)


def measure_batches(
    model: Model,
    found: Sequence[Problem],
    sizes: Sequence[int],
    n_facts: int,
    block: int,
    settings: Rome,
    loaded: float,
) -> tuple[list[dict[str, Any]], list[Value]]:
    """Time our search; batches smaller than `n_facts` are repeated until they cover as many facts.

    Returns:
        One row a size, and the values of the largest size's facts.
    """
    optimise(model, found[:1], block, "down", replace(settings, n_steps=2))
    rows, largest = [], list[Value]()
    for size in sizes:
        total = max(size, n_facts)
        groups = [found[i : min(i + size, total)] for i in range(0, total, size)]
        values, begin = list[Value](), time.process_time()
        with watched() as cost:
            for group in groups:
                values += optimise(model, group, block, "down", settings)
        cpu = time.process_time() - begin
        largest = values if size == max(sizes) else largest
        used = sum(map(len, groups))
        rows.append(
            {
                "batch": size,
                "facts": used,
                "seconds": cost.seconds,
                "seconds_per_fact": cost.seconds / used,
                "cpu_seconds_per_fact": cpu / used,
                "peak_mib": cost.peak_mib,
                "peak_mib_above_model": cost.peak_mib - loaded if loaded else None,
                **limit(model, groups, block, settings),
            }
        )
        rows[-1]["ratio_to_limit"] = rows[-1]["seconds_per_fact"] / rows[-1]["limit_seconds_per_fact"]
    return rows, largest


def limit(model: Model, groups: Sequence[Sequence[Problem]], block: int, settings: Rome) -> dict[str, Any]:
    """Return what the groups' arithmetic takes at the fastest rate that products of their size reach."""
    works = [work(model, group, block, settings) for group in groups]
    n_facts = sum(map(len, groups))
    rates = _peer.rates(model, max(1, min(4096, works[0].step_tokens)))
    rate = max(rates.values())
    gflop = sum(w.once + w.steps for w in works) / 1e9
    return {
        "step_tokens_per_fact": sum(w.step_tokens for w in works) / n_facts,
        "gflop_per_fact": gflop / n_facts,
        "gflop_per_fact_steps_alone": sum(w.steps for w in works) / 1e9 / n_facts,
        "gflop_per_second_measured": rate,
        "gflop_per_second_by_shape": rates,
        "limit_seconds_per_fact": gflop / rate / n_facts,
    }


@dataclass(frozen=True)
class Compared:
    """The obvious version beside ours.

    Attributes:
        seconds: Of one fact.
        cpu_seconds: Of all cores together.
        at_value: Largest distance of the two losses at our last values, nats.
        at_end: Largest distance of the two searches' last losses, nats.
    """

    seconds: float
    cpu_seconds: float
    at_value: float
    at_end: float


def measure_obvious(
    model: Model, found: Sequence[Problem], ours: Sequence[Value], block: int, settings: Rome
) -> Compared:
    """Time the obvious version, and let it judge our values by its own loss."""
    begin, cpu = time.perf_counter(), time.process_time()
    searches = [Obvious(model, problem, block, settings) for problem in found]
    losses = [search.search() for search in searches]
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    with torch.no_grad():
        judged = [float(search.loss(value.delta)) for search, value in zip(searches, ours)]
    last = [value.losses[-1] for value in ours]
    return Compared(seconds / len(found), cpu / len(found), _gap(judged, last), _gap(losses, last))


def _gap(one: Sequence[float], two: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in one process."""
    model = open_model(options.model, device="cpu")
    settings = Rome(n_steps=options.steps, stop_loss=0.0)
    block = settings.block_of(model)
    facts = chosen_facts(options.data, max(options.batches))
    found = problems(model, facts, contexts_for(model, settings.contexts, settings.seed), "subject", settings.bos)
    loaded = _peer.resident_mib()
    rows, ours = measure_batches(model, found, options.batches, options.obvious, block, settings, loaded)
    theirs = measure_obvious(model, found[: options.obvious], ours, block, settings)
    for row in rows:
        row["ratio_to_obvious"] = theirs.seconds / row["seconds_per_fact"]
        row["ratio_to_obvious_cpu"] = theirs.cpu_seconds / row["cpu_seconds_per_fact"]
    return {
        "benchmark": "edit_speed",
        "model": str(options.model),
        "data": options.data.name if options.data else "the sample facts, with each other's subjects",
        "block": block,
        "settings": settings.to_dict(),
        "rows_per_fact": sum(len(p.rows) + (p.kl is not None) for p in found) / len(found),
        "environment": _peer.machine(),
        "model_mib": loaded or None,
        "obvious": {
            "facts": options.obvious,
            "seconds_per_fact": theirs.seconds,
            "cpu_seconds_per_fact": theirs.cpu_seconds,
        },
        "largest_gap_at_one_value": theirs.at_value,
        "largest_gap_of_last_losses": theirs.at_end,
        "batches": rows,
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    columns = ["batch", "s per fact", "times faster than obvious", "times the limit", "peak MiB above model"]
    cells = [["obvious, one by one", f"{result['obvious']['seconds_per_fact']:.3f}", "1.0", "", ""]]
    for row in result["batches"]:
        peak = row["peak_mib_above_model"]
        cells.append(
            [
                str(row["batch"]),
                f"{row['seconds_per_fact']:.3f}",
                f"{row['ratio_to_obvious']:.1f}",
                f"{row['ratio_to_limit']:.2f}",
                "not known here" if peak is None else f"{peak:.0f}",
            ]
        )
    gap = (
        f"At one value the two losses are equal to {result['largest_gap_at_one_value']:.1e} nats; "
        f"the searches end {result['largest_gap_of_last_losses']:.1e} nats apart."
    )
    title = f"One value by gradient, {result['model']}, block {result['block']}, {result['settings']['n_steps']} steps"
    _peer.show(title, columns, cells, [gap])


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, bundled name or hub id")
    parser.add_argument("--batches", default="1,8,32", type=_counts, help="facts searched together")
    parser.add_argument("--obvious", default=4, type=int, help="facts that the obvious version edits")
    parser.add_argument("--steps", default=20, type=int, help="steps of the search")
    parser.add_argument("--data", type=Path, help="file of facts, e.g. CounterFact; without it the sample facts")
    parser.add_argument("--json", type=Path, default=_peer.RESULTS / "edit_speed.json", help="where the result goes")
    options = parser.parse_args(words)
    if options.obvious < 1 or options.steps < 2:
        parser.error(f"--obvious takes 1 or more and --steps 2 or more; got {options.obvious} and {options.steps}.")
    if options.obvious > max(options.batches):
        parser.error(f"--obvious takes at most the largest batch, {max(options.batches)}; got {options.obvious}.")
    return options


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"takes counts from 1 with commas between, e.g. 1,8,32; got {text!r}.")
    return [int(word) for word in words]


def main() -> None:
    """Measure, print; write unless the two versions do not minimise the same loss."""
    options = parse()
    result = run(options)
    show(result)
    for name, most in (("largest_gap_at_one_value", SAME_LOSS), ("largest_gap_of_last_losses", SAME_END)):
        if not result[name] <= most:
            raise SystemExit(f"{name}: {result[name]:.2e} nats (at most {most:g}): they do not do the same work.")
    _peer.write(options.json, result)


if __name__ == "__main__":
    main()
