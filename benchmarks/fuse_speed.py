"""Seconds and memory of every way to fuse: ours from factors and in blocks of rows, PEFT's on whole matrices.

Both fuse the same random adapters in one run, for the weights of Qwen2.5-0.5B. Both keep all they make. mergekit joins as
a program of its own environment where one is named.

    python benchmarks/fuse_speed.py --blocks 2 --adapters 8,64 --mergekit ~/mergekit/bin/mergekit-yaml
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _mergekit
import _peer
import peft
import torch
from torch import Tensor, nn

from retouch import registry
from retouch.change import LowRank
from retouch.fuse._blocks import draws
from retouch.fuse.base import Adapter, FuseMethod, Module, modules, shares
from retouch.fuse.fusing import stream
from retouch.measure import watched

METHODS = "cat svd linear magnitude ties ties@core dare dare_ties della knots tsv iso"
PEERS = {
    "cat": "cat",
    "svd": "svd",
    "linear": "linear",
    "magnitude": "magnitude_prune_svd",
    "ties": "ties_svd",
    "dare": "dare_linear_svd",
    "dare_ties": "dare_ties_svd",
}
"""What PEFT calls the same rule."""
RANDOM = ("dare", "dare_ties", "della")
CUT = ("svd", "magnitude", "ties", "dare", "dare_ties", "della")
"""The rules whose result is cut to a rank."""
TRIMMED = ("magnitude", "ties", "knots")
TRUTH = ("attention.k", "attention.o")
"""The weights of the first block on which the errors are measured."""
CLOSE = 1e-5
"""How far our cat and svd may be from the float64 truth."""


# What both are given


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of every weight, by our names."""
    d, f, kv = options.width, options.ffn, options.kv
    block = {
        "attention.q": (d, d), "attention.k": (kv, d), "attention.v": (kv, d), "attention.o": (d, d),
        "mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f),
    }  # fmt: skip
    return {f"blocks.{i}.{name}": shape for i in range(options.blocks) for name, shape in block.items()}


def adapters(sizes: Mapping[str, tuple[int, int]], n: int, rank: int) -> list[Adapter]:
    """Make adapters of random factors."""
    make = torch.Generator().manual_seed(n)
    return [
        Adapter(
            f"edge{i}",
            {k: LowRank(torch.randn(o, rank, generator=make), torch.randn(rank, d, generator=make))
             for k, (o, d) in sizes.items()},
            "0" * 64,
        )
        for i in range(n)
    ]  # fmt: skip


def method(word: str, rank: int) -> FuseMethod:
    """Make a method by its name, of the rank that the peer is asked for too."""
    name, _, space = word.partition("@")
    settings: dict[str, Any] = {"space": space} if space else {}
    if name in CUT:
        settings["rank"] = rank
    if name == "linear":
        settings["form"] = "peft"
    made: FuseMethod = registry.make("fuse", name, **settings)
    return made


# The peer


def carried(sizes: Mapping[str, tuple[int, int]], given: Sequence[Adapter]) -> peft.LoraModel:
    """Put the adapters on a network whose own weights take no memory."""
    network = nn.Module()
    for name, (outputs, inputs) in sizes.items():
        layer = nn.Linear(1, 1, bias=False)
        layer.in_features, layer.out_features = inputs, outputs
        layer.weight = nn.Parameter(torch.zeros(1, 1).expand(outputs, inputs), requires_grad=False)
        network.add_module(name.replace(".", "_"), layer)
    model: Any = None
    targets = [name.replace(".", "_") for name in sizes]
    rank = next(iter(given[0].parts.values())).rank
    for adapter in given:
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
        if model is None:
            model = peft.LoraModel(network, config, adapter.name)
        else:
            model.peft_config[adapter.name] = config
            model.inject_adapter(network, adapter.name)
        for name, part in adapter.parts.items():  # shared with ours, not copied
            layer = getattr(network, name.replace(".", "_"))
            layer.lora_A[adapter.name].weight.data = part.right
            layer.lora_B[adapter.name].weight.data = part.left
    return model


def by_peer(model: peft.LoraModel, given: Sequence[Adapter], name: str, rank: int, density: float) -> None:
    """Fuse as PEFT does; its election divides by counts, so weights of 1 give there what shares give here."""
    kind = PEERS[name]
    more: dict[str, Any] = {"svd_rank": rank, "svd_full_matrices": False} if kind.endswith("svd") else {}
    if name not in ("cat", "svd", "linear"):
        more["density"] = density
    weight = 1.0 if "ties" in kind else 1 / len(given)
    model.add_weighted_adapter([a.name for a in given], [weight] * len(given), "fused", kind, **more)


# The truth


def truth(asked: Module, form: FuseMethod) -> Tensor | None:
    """Return the rule's result as a whole matrix in float64, before any cut; None where no rule of entries or mean is."""
    ds = [p.delta() for p in asked.parts]
    if form.name in ("cat", "svd", "linear"):
        return sum((d * w for d, w in zip(ds, asked.weights)), torch.zeros(()).double())
    if form.name not in CUT or form.name == "della":
        return None
    density: float = form.density  # type: ignore[attr-defined]
    if form.name in RANDOM:
        for d, name in zip(ds, asked.names):
            d.mul_(draws(form.seed, asked.name, name, 0, *asked.shape) < density).div_(density)
    else:
        for d in ds:
            n = max(1, round(density * d.numel()))
            d[d.abs() < d.abs().flatten().kthvalue(d.numel() - n + 1).values] = 0
    total = sum((d * w for d, w in zip(ds, asked.weights)), torch.zeros(()).double())
    if "ties" not in form.name:
        return total
    side = total.sign()
    top = sum((torch.where(d * side > 0, d * w, 0.0) for d, w in zip(ds, asked.weights)), torch.zeros(()).double())
    share = sum(((d * side > 0) * w for d, w in zip(ds, asked.weights)), torch.zeros(()).double())
    return top / share.masked_fill(share == 0, 1)


def cut(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return best


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the distance as a share of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


def errors(
    given: Sequence[Adapter], word: str, rank: int, ours: Mapping[str, LowRank], theirs: Callable[[str], Tensor] | None
) -> dict[str, float | None]:
    """Compare both with the truth on some weights; a cut rule also with the best that any factors of the rank could do."""
    form = method(word, rank)
    rows: dict[str, list[float]] = {"error": [], "peer_error": [], "least_error": []}
    few = [Adapter(a.name, {f"blocks.0.{n}": a.parts[f"blocks.0.{n}"] for n in TRUTH}, a.base) for a in given]
    for asked in modules(few, shares(few)):
        wanted = truth(asked, form) if "@" not in word else None
        if wanted is None:
            continue
        if word == "svd":  # its truth is the cut itself
            wanted = cut(wanted, rank)
        rows["error"].append(error(ours[asked.name].delta(), wanted))
        rows["least_error"].append(error(cut(wanted, rank), wanted) if word in CUT else 0.0)
        if theirs is not None and word not in RANDOM:  # its masks are not ours
            rows["peer_error"].append(error(theirs(asked.name).double(), wanted))
    return {k: max(v) if v else None for k, v in rows.items()}


# The arithmetic


def gflop(sizes: Mapping[str, tuple[int, int]], n: int, r: int, k: int, word: str) -> float | None:
    """Count the leading terms of our arithmetic; decompositions of R x R by their usual constants.

    Args:
        sizes: Of the weights.
        n: Adapters.
        r: Rank of each.
        k: Rank of the result.
        word: The method.
    """
    total = 0.0
    for outputs, inputs in sizes.values():
        both, area, R = outputs + inputs, outputs * inputs, n * r
        core = min(R, outputs), min(R, inputs)
        small = 4 * both * R * min(R, outputs, inputs) + 22 * min(core) ** 2 * max(core)
        passes = 2 * area * R
        name = word.partition("@")[0]
        if word == "cat":
            total += area * 2 * R if min(outputs, inputs) < R else outputs * R
        elif word == "linear":
            total += both * R
        elif word in ("svd", "iso"):
            total += small + 2 * both * R * min(core)
        elif word == "tsv":
            total += 2 * small + n * 4 * both * r * r
        elif "@" in word:
            total += small + 44 * n * core[0] * core[1] * min(core) + 4 * passes * core[0] / outputs
        elif name == "knots":
            total += small + 4 * 2 * core[0] * inputs * R
        else:
            width = max(k, min(R, 4 * k)) + 8
            dense = width >= min(outputs, inputs)
            factors = 14 * area * min(outputs, inputs) if dense else 6 * area * width
            total += passes * ((1 if dense else 2) + 3 * (word in TRIMMED)) + factors
    return total / 1e9


def peer_gflop(sizes: Mapping[str, tuple[int, int]], n: int, r: int, word: str) -> float | None:
    """Count the leading terms of the peer's arithmetic: whole differences, and one thin decomposition of their fusion."""
    if word not in PEERS:
        return None
    if not PEERS[word].endswith("svd"):
        return sum((o + i) * n * r for o, i in sizes.values()) / 1e9
    return sum(2 * o * i * n * r + 14 * o * i * min(o, i) for o, i in sizes.values()) / 1e9


# One run


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float | None]]:
    """Run something and say what it took above what the process held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # give back what earlier work has freed, so that it is counted
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with watched() as cost:
        result = work()
    above = cost.peak_mib - cost.start_mib if cost.start_mib else None
    return result, {"seconds": cost.seconds, "peak_mib_over_start": above}


def rows_of(options: argparse.Namespace, n: int) -> Iterator[dict[str, Any]]:
    """Measure every method with `n` adapters."""
    sizes = shapes(options)
    given = adapters(sizes, n, options.rank)
    model = carried(sizes, given) if options.peers else None
    out_rank = options.out_rank or options.rank
    for word in options.methods:
        form = method(word, out_rank)
        ours, cost = measured(lambda form=form: dict(stream(form, given, shares(given))))
        row: dict[str, Any] = {
            "method": word,
            "adapters": n,
            **cost,
            "gflop": gflop(sizes, n, options.rank, out_rank, word),
        }
        row["rank"] = max(part.rank for part in ours.values())
        theirs = None
        if model is not None and word in options.peers and word in PEERS:
            density = getattr(form, "density", 1.0)
            _, cost = measured(lambda word=word, density=density: by_peer(model, given, word, out_rank, density))
            row["peer"] = {**cost, "gflop": peer_gflop(sizes, n, options.rank, word), "type": PEERS[word]}
            row["ratio_to_peer"] = row["peer"]["seconds"] / row["seconds"]
            theirs = lambda name: getattr(model.model, name.replace(".", "_")).get_delta_weight("fused").detach()  # noqa: E731
        row |= errors(given, word, out_rank, ours, theirs)
        if theirs is not None and model is not None:
            model.delete_adapter("fused")
        yield row


def by_mergekit(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure mergekit on the smallest number of adapters: it needs a whole model for each."""
    given = adapters(shapes(options), min(options.adapters), options.rank)
    forms = {word: method(word, options.rank) for word in options.methods}

    def off(word: str, change: Callable[[str], Tensor]) -> float | None:
        few = [Adapter(a.name, {f"blocks.0.{n}": a.parts[f"blocks.0.{n}"] for n in TRUTH}, a.base) for a in given]
        found = (
            [(change(m.name), truth(m, forms[word])) for m in modules(few, shares(few))] if word not in RANDOM else []
        )
        return max((error(a, b) for a, b in found if b is not None), default=None)

    size = {name: getattr(options, name) for name in ("width", "ffn", "kv", "blocks")}
    densities = {word: form.density for word, form in forms.items() if hasattr(form, "density")}
    return list(_mergekit.rows(options.mergekit, options.methods, given, size, densities, options.threads, off))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in one process, and mergekit in its own."""
    torch.set_num_threads(options.threads)
    tiny = adapters({"a": (64, 64)}, 2, 4)
    for word in options.methods:  # the first call of a decomposition makes threads and buffers
        list(stream(method(word, 4), tiny, shares(tiny)))
    rows = list(itertools.chain.from_iterable(rows_of(options, n) for n in options.adapters))
    return {
        "benchmark": "fuse_speed",
        "blocks": options.blocks,
        "shapes": {k.removeprefix("blocks.0."): v for k, v in shapes(options).items() if k.startswith("blocks.0.")},
        "threads": options.threads,
        "rank": options.rank,
        "rank_of_cut_rules": options.out_rank or options.rank,
        "truth_measured_on": list(TRUTH),
        "environment": {**_peer.machine(), "peft": peft.__version__},
        "rows": rows,
        "mergekit": by_mergekit(options),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    costs, ends = [], []
    for row in result["rows"]:
        peer, name = row.get("peer", {}), f"{row['adapters']} {row['method']}"
        costs.append([
            name, number(row["seconds"], ".2f"), number(peer.get("seconds"), ".2f"),
            number(row.get("ratio_to_peer"), ".1f"), number(row["peak_mib_over_start"], ".0f"),
            number(peer.get("peak_mib_over_start"), ".0f"),
        ])  # fmt: skip
        ends.append([
            name, number(row["error"], ".1e"), number(row["peer_error"], ".1e"), number(row["least_error"], ".1e"),
            number(row["gflop"], ".1f"), number(peer.get("gflop"), ".1f"),
        ])  # fmt: skip
    title = f"Fusing adapters of rank {result['rank']} on {result['blocks']} blocks of Qwen2.5-0.5B's shapes"
    _peer.show(title, ["N, method", "seconds", "PEFT", "times faster", "peak MiB", "PEFT"], costs)
    notes = [
        "Errors are to the float64 rule on whole matrices, before it is cut to a rank (svd: after); least is the best cut.",
        "PEFT decomposes with full_matrices=False, which is faster than its default.",
    ]
    theirs = [
        [f"{row['adapters']} {row['method']}", row["status"], number(row.get("seconds"), ".2f"),
         number(row.get("prepare_seconds"), ".2f"), number(row.get("peak_mib"), ".0f"), number(row.get("disk_mib"), ".0f"),
         number(row.get("error"), ".1e")]
        for row in result["mergekit"]
    ]  # fmt: skip
    heads = ["N, method", "", "seconds", "to merge first", "peak MiB of its process", "MiB on disk", "error"]
    _peer.show("mergekit, on whole models", heads, theirs)
    _peer.show("Errors and arithmetic", ["N, method", "error", "PEFT", "least", "GFLOP", "PEFT"], ends, notes)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", default=24, type=int, help="blocks of the model")
    parser.add_argument("--adapters", default="8,64", help="numbers of adapters, commas between")
    parser.add_argument("--rank", default=16, type=int, help="of each adapter")
    parser.add_argument("--out-rank", type=int, help="of rules whose result is cut; by default that of an adapter")
    parser.add_argument("--methods", default=",".join(METHODS.split()), help="ours, commas between")
    parser.add_argument(
        "--peers", default="cat,svd,linear,ties,dare_ties", help="those measured in PEFT too; empty: none"
    )
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment of its own")
    parser.add_argument("--width", default=896, type=int, help="of the model")
    parser.add_argument("--ffn", default=4864, type=int, help="inner width of the feed-forward part")
    parser.add_argument("--kv", default=128, type=int, help="outputs of keys and of values")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int, help="of both; 1 on a busy machine")
    parser.add_argument("--json", type=Path, default=_peer.RESULTS / "fuse_speed.json", help="where the result goes")
    options = parser.parse_args(words)
    options.adapters = [int(n) for n in options.adapters.split(",")]
    options.methods = [m for m in options.methods.split(",") if m]
    options.peers = [m for m in options.peers.split(",") if m]
    if options.mergekit and not options.mergekit.is_file():
        parser.error(f"--mergekit: {options.mergekit} does not exist.")
    if min(*options.adapters, options.blocks, options.rank) < 1:
        parser.error("--blocks, --rank and each of --adapters take 1 or more.")
    return options


def main() -> None:
    """Measure, write, print; fail when ours is not what the formula says."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers by an old name
    options = parse()
    result = run(options)
    _peer.write(options.json, result)
    show(result)
    for row in result["rows"]:
        if row["method"] in ("cat", "svd") and not row["error"] <= CLOSE:
            raise SystemExit(f"{row['method']} of {row['adapters']} adapters is {row['error']:.1e} off the truth.")


if __name__ == "__main__":
    main()
