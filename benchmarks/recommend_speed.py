"""The search for items over a tree of codes: against transformers' beam search with a function of allowed tokens.

Our generator and a T5 of transformers hold the same weights. Beside the seconds stands what the products of matrices
alone would take on this core, which no search over this network can beat.

python benchmarks/recommend_speed.py --items 12000 --beams 20
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _peer
import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from retouch.measure import watched
from retouch.recommend.beam import Found, search
from retouch.recommend.generator import SIZES, Generator, Steps
from retouch.recommend.tokenise import Catalogue, assign

CODES = 256
HISTORY = 20
SAME_SCORE = 1e-4
"""How far the scores of the two versions may lie apart, in nats per item."""


def catalogue(n_items: int) -> Catalogue:
    """Draw codes on three levels, the digit behind them; frequent codes are more frequent than others, as in life."""
    random = np.random.default_rng(0)
    codes = np.minimum(random.gamma(2.0, 40.0, (n_items, 3)).astype(np.int64), CODES - 1)
    return assign(codes, (CODES,) * 3, np.arange(n_items), [str(i) for i in range(n_items)])


def network(size: str, levels: Sequence[int], seed: int = 0) -> T5ForConditionalGeneration:
    """Build an encoder-decoder with random weights, whose one vocabulary holds padding and the codes of all levels."""
    it = SIZES[size]
    config = T5Config(
        vocab_size=1 + sum(levels), d_model=it.d_model, d_kv=it.d_head, d_ff=it.d_ff, num_layers=it.n_blocks,
        num_heads=it.heads, pad_token_id=0, decoder_start_token_id=0, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    found = T5ForConditionalGeneration(config).eval()
    found.generation_config.eos_token_id = None
    torch.nn.init.normal_(found.lm_head.weight, std=0.3)  # so that items differ by more than the noise of a float
    return found


def offsets(levels: Sequence[int]) -> Tensor:
    """Return the first token of each level."""
    return torch.tensor([1, *levels[:-1]]).cumsum(0)


@torch.no_grad()
def copied(model: T5ForConditionalGeneration, size: str, items: Catalogue) -> Generator:
    """Give our generator the weights of the other network."""
    made = Generator(SIZES[size], torch.from_numpy(items.codes.copy()), items.sizes, HISTORY, "code").eval()
    made.first.copy_(model.shared.weight[0])
    made.embeddings.copy_(model.shared.weight[1:])
    made.heads.copy_(model.lm_head.weight[1:])
    for stack, blocks, bias, norm in (
        (model.encoder, made.encoder, made.encoder_bias, made.encoder_norm),
        (model.decoder, made.decoder, made.decoder_bias, made.decoder_norm),
    ):
        bias.weight.copy_(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
        norm.weight.copy_(stack.final_layer_norm.weight)
        for theirs, mine in zip(stack.block, blocks):
            parts = [(theirs.layer[0].SelfAttention, mine.attention)]
            if len(theirs.layer) == 3:
                parts.append((theirs.layer[1].EncDecAttention, mine.cross))
            for part, own in parts:
                own.query.weight.copy_(part.q.weight * SIZES[size].d_head ** 0.5)  # T5 does not divide by it
                own.key_value.weight.copy_(torch.cat([part.k.weight, part.v.weight]))
                own.out.weight.copy_(part.o.weight)
            for layer, norm in zip(theirs.layer, mine.norms):
                norm.weight.copy_(layer.layer_norm.weight)
            mine.feed_forward.up.weight.copy_(theirs.layer[-1].DenseReluDense.wi.weight)
            mine.feed_forward.down.weight.copy_(theirs.layer[-1].DenseReluDense.wo.weight)
    return made.requires_grad_(False)


class OfLevel(LogitsProcessor):
    """Divide the probability of a code by that of all codes of its level, as ours is; used for comparing, not timed."""

    def __init__(self, levels: Sequence[int]) -> None:
        self.spans = [slice(int(first), int(first) + n) for first, n in zip(offsets(levels), levels)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the log-probabilities of the level that comes next."""
        span = self.spans[input_ids.shape[1] - 1]
        found = torch.full_like(scores, -torch.inf)
        found[:, span] = scores[:, span].log_softmax(1)
        return found


class Timed:
    """A stepper that remembers how long it took."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.seconds = steps, 0.0

    def step(self, level: int, rows: Tensor, prefix: Tensor, parents: Tensor) -> Tensor:
        """Pass on."""
        begin = time.perf_counter()
        found = self.steps.step(level, rows, prefix, parents)
        self.seconds += time.perf_counter() - begin
        return found


def floating(size: str, levels: Sequence[int], beams: int) -> dict[str, float]:
    """Count the MFLOP of one request that cannot be left out, products of matrices alone, by part."""
    it = SIZES[size]
    inner, places, rows = it.heads * it.d_head, HISTORY * len(levels), 1 + beams * (len(levels) - 1)
    around, wide = 2 * 4 * it.d_model * inner, 2 * 2 * it.d_model * it.d_ff
    encoder = it.n_blocks * places * (around + wide + 4 * places * inner)
    keys = it.n_blocks * places * 4 * it.d_model * inner
    block = around + around // 2 + 4 * places * inner + wide
    heads = 2 * it.d_model * (levels[0] + beams * sum(levels[1:]))
    return {"encoder": encoder / 1e6, "keys": keys / 1e6, "decoder": (rows * it.n_blocks * block + heads) / 1e6}


def gflops(size: str, rows: int) -> float:
    """Measure the products of this network's widest matrices: the best of several, GFLOP/s."""
    it = SIZES[size]
    x, up = torch.randn(rows, it.d_model), torch.randn(it.d_ff, it.d_model)
    best = torch.inf
    for _ in range(200):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, up)
        best = min(best, time.perf_counter() - begin)
    return 2e-9 * rows * it.d_model * it.d_ff / best


def allowed(codes: np.ndarray, levels: Sequence[int]) -> Callable[[int, Tensor], list[int]]:
    """Return what transformers asks: the tokens that may follow, from a dictionary of prefixes."""
    following: dict[tuple[int, ...], set[int]] = {}
    for row in (codes + offsets(levels).numpy()).tolist():
        for level, token in enumerate(row):
            following.setdefault(tuple(row[:level]), set()).add(token)
    lists = {prefix: sorted(tokens) for prefix, tokens in following.items()}
    return lambda _, ids: lists.get(tuple(ids.tolist()[1:]), [0])


@torch.no_grad()
def theirs(
    model: T5ForConditionalGeneration,
    inputs: Tensor,
    tokens: Any,
    levels: Sequence[int],
    beams: int,
    by_level: bool = False,
) -> Any:
    """Search with `generate`, scores summed over codes as ours are."""
    plain = {"prefix_allowed_tokens_fn": tokens}
    levelled = LogitsProcessorList([OfLevel(levels), PrefixConstrainedLogitsProcessor(tokens, beams)])
    return model.generate(
        inputs, num_beams=beams, num_return_sequences=beams, max_new_tokens=len(levels), do_sample=False,
        length_penalty=0.0, early_stopping=False, return_dict_in_generate=True, output_scores=True,
        **({"logits_processor": levelled} if by_level else plain),
    )  # fmt: skip


@torch.no_grad()
def ours(network: Generator, windows: Tensor, items: Catalogue, beams: int) -> tuple[Found, dict[str, float]]:
    """Search over the tree; also return the seconds of the parts."""
    begin = time.perf_counter()
    memory = network.encode(windows)
    read = time.perf_counter()
    steps = Timed(network.stepper(memory))
    asked = time.perf_counter()
    found = search(steps, items.trie, len(windows), beams=beams)
    tree = time.perf_counter() - asked - steps.seconds
    return found, {"encoder": read - begin, "keys": asked - read, "decoder": steps.seconds, "tree": tree}


def compare(items: Catalogue, found: Sequence[Found], answers: Sequence[Any], beams: int) -> dict[str, float]:
    """Compare the items and scores of the two versions over all requests."""
    tokens = torch.cat([answer.sequences[:, 1:] for answer in answers]).view(-1, beams, len(items.sizes))
    leaves = items.trie.find((tokens - offsets(items.sizes)).flatten(0, 1).numpy())
    numbers = torch.from_numpy(np.where(leaves < 0, 0, items.trie.item[leaves])).view(-1, beams)
    scores = torch.cat([answer.sequences_scores for answer in answers]).view(-1, beams)
    mine = torch.cat([part.items for part in found])
    return {
        "equal_first_items": float((mine[:, 0] == numbers[:, 0]).float().mean()),
        "equal_lists": float((mine == numbers).all(1).float().mean()),
        "equal_sets": float((mine.sort(1).values == numbers.sort(1).values).all(1).float().mean()),
        "invalid_of_generate": float((numbers == 0).float().mean()),
        "largest_gap_of_scores": float((torch.cat([part.scores for part in found]) - scores).abs().max()),
    }


def beam(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both searches over the same network, catalogue and requests."""
    with watched() as built:
        items = catalogue(options.items)
    model = network(options.size, items.sizes)
    mine = copied(model, options.size, items)
    tokens = allowed(items.codes, items.sizes)
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(1, options.items + 1, (options.requests, HISTORY), generator=generator)
    inputs = mine.codes[windows].flatten(1) + 1
    batches, asked = windows.split(options.batch), inputs.split(options.batch)
    seconds: dict[str, list[float]] = {"ours": [], "generate": []}
    parts: dict[str, list[float]] = {}
    ours(mine, batches[0], items, options.beams), theirs(model, asked[0], tokens, items.sizes, options.beams)
    for _ in range(options.repeats):
        with watched() as cost:
            told = [ours(mine, batch, items, options.beams) for batch in batches]
        with watched() as peer:
            for batch in asked:
                theirs(model, batch, tokens, items.sizes, options.beams)
        seconds["ours"].append(cost.seconds)
        seconds["generate"].append(peer.seconds)
        for name in told[0][1]:
            parts.setdefault(name, []).append(sum(part[name] for _, part in told))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    found = [part[0] for part in told]
    answers = [theirs(model, batch, tokens, items.sizes, options.beams, by_level=True) for batch in asked]
    work, rate = floating(options.size, items.sizes, options.beams), gflops(options.size, options.batch * options.beams)
    least = options.requests * sum(work.values()) * 1e-3 / rate
    return {
        "items": items.n_items,
        "sizes": list(items.sizes),
        "network": options.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "beams": options.beams,
        "requests": options.requests,
        "batch": options.batch,
        "history": HISTORY,
        "catalogue_seconds": built.seconds,
        "seconds": middle,
        "seconds_of_each_repeat": seconds,
        "requests_per_second": {name: options.requests / middle[name] for name in ("ours", "generate")},
        "ratio_to_generate": middle["generate"] / middle["ours"],
        "seconds_of_parts": {name: statistics.median(values) for name, values in parts.items()},
        "mflop_a_request": work,
        "gflops_of_this_core": rate,
        "seconds_of_the_products_alone": least,
        "ratio_at_the_limit": middle["generate"] / least,
        "proved_exact_at_1": float(torch.cat([part.exact(1) for part in found]).float().mean()),
        **compare(items, found, answers, options.beams),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything in one process."""
    return {"benchmark": "recommend_speed", "environment": _peer.machine(), "beam": beam(options)}


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    b = result["beam"]
    cells = [
        ["generate, allowed tokens", f"{b['seconds']['generate']:.2f}", f"{b['requests_per_second']['generate']:.1f}", "1.0"],
        ["search", f"{b['seconds']['ours']:.2f}", f"{b['requests_per_second']['ours']:.1f}", f"{b['ratio_to_generate']:.1f}"],
        *([f"of this {name}", f"{part:.2f}", "", ""] for name, part in b["seconds_of_parts"].items()),
        ["its products of matrices alone", f"{b['seconds_of_the_products_alone']:.2f}", "", f"{b['ratio_at_the_limit']:.1f}"],
    ]  # fmt: skip
    notes = [
        f"Equal lists {b['equal_lists']:.1%}, equal first items {b['equal_first_items']:.1%}; "
        f"scores lie at most {b['largest_gap_of_scores']:.1e} nats apart.",
        f"A request needs {sum(b['mflop_a_request'].values()):.0f} MFLOP, of which the encoder "
        f"{b['mflop_a_request']['encoder']:.0f} and the decoder {b['mflop_a_request']['decoder']:.0f}; this core does "
        f"{b['gflops_of_this_core']:.0f} GFLOP/s on matrices of this size.",
        f"The first item is proved to be the best of all for {b['proved_exact_at_1']:.0%} of the requests.",
    ]
    title = (
        f"{b['requests']} requests, {b['beams']} beams, {b['items']} items, {b['parameters'] / 1e6:.2f} M parameters"
    )
    _peer.show(title, ["", "seconds", "requests/s", "times faster"], cells, notes)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", default=12_000, type=int, help="items of the catalogue")
    parser.add_argument("--beams", default=20, type=int, help="beams of both searches")
    parser.add_argument("--requests", default=64, type=int, help="histories to search for")
    parser.add_argument("--batch", default=16, type=int, help="histories at once")
    parser.add_argument("--size", default="small", choices=sorted(SIZES), help="size of the network")
    parser.add_argument("--repeats", default=3, type=int, help="runs of which the median is taken")
    parser.add_argument(
        "--json", type=Path, default=_peer.RESULTS / "recommend_speed.json", help="where the result goes"
    )
    options = parser.parse_args(words)
    if min(options.items, options.beams, options.requests, options.batch, options.repeats) < 1:
        parser.error("All counts must be 1 or more.")
    return options


def main() -> None:
    """Measure, write, print; fail when the two versions do not find the same."""
    logging.set_verbosity_error()
    options = parse()
    torch.set_num_threads(1)
    result = run(options)
    _peer.write(options.json, result)
    show(result)
    b = result["beam"]
    if b["largest_gap_of_scores"] > SAME_SCORE or b["equal_sets"] < 0.95 or b["invalid_of_generate"]:
        raise SystemExit(
            f"The two searches differ: {b['equal_sets']:.1%} equal sets, gap {b['largest_gap_of_scores']:.1e}."
        )


if __name__ == "__main__":
    main()
