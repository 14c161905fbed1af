"""The search for items over a tree of codes: against transformers' beam search with a function of allowed tokens.

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
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from retouch.measure import watched
from retouch.recommend.beam import Found, search
from retouch.recommend.tokenise import Catalogue, assign

SIZES = {"small": (64, 2, 4, 16, 256), "base": (128, 4, 6, 64, 1024)}
"""Width, blocks of each stack, heads, their width, neurons."""
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
    d_model, blocks, heads, width, d_ff = SIZES[size]
    config = T5Config(
        vocab_size=1 + sum(levels), d_model=d_model, d_kv=width, d_ff=d_ff, num_layers=blocks, num_heads=heads,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    found = T5ForConditionalGeneration(config).eval()
    found.generation_config.eos_token_id = None
    torch.nn.init.normal_(found.lm_head.weight, std=0.3)  # so that items differ by more than the noise of a float
    return found


def offsets(levels: Sequence[int]) -> Tensor:
    """Return the first token of each level."""
    return torch.tensor([1, *levels[:-1]]).cumsum(0)


class Stepper:
    """The same network for our search.

    All beams of a request ask one copy of the encoder's keys and values, side by side as queries, and each beam keeps
    those of its codes before. `generate` keeps them too, but a copy of the encoder's for each beam.
    """

    def __init__(self, model: T5ForConditionalGeneration, inputs: Tensor, levels: Sequence[int]) -> None:
        self.model, self.levels, self.first = model, levels, offsets(levels)
        self.seconds = 0.0
        memory = model.encoder(inputs).last_hidden_state
        cross = [block.layer[1].EncDecAttention for block in model.decoder.block]
        self.memory = [(heads(part, part.k(memory)), heads(part, part.v(memory))) for part in cross]
        self.past: list[tuple[Tensor, Tensor]] = []
        self.known = torch.zeros(0, dtype=torch.int64)

    def step(self, level: int, rows: Tensor, prefix: Tensor) -> Tensor:
        """Return the log-probabilities of a level's codes, over the whole vocabulary."""
        begin = time.perf_counter()
        parents = torch.searchsorted(self.known, self._keys(rows, prefix[:, :-1])) if level else rows
        past = [(keys[parents], values[parents]) for keys, values in self.past]
        tokens = prefix[:, -1] + self.first[level - 1] if level else torch.zeros_like(rows)
        states = self._decode(self.model.shared(tokens).unsqueeze(1), rows, past, level)
        span = slice(int(self.first[level]), int(self.first[level]) + self.levels[level])
        found = self.model.lm_head(states[:, 0]).log_softmax(1)[:, span]
        self.known = self._keys(rows, prefix)  # ascending, as beams stand in the order of their nodes
        self.seconds += time.perf_counter() - begin
        return found

    def _keys(self, rows: Tensor, prefix: Tensor) -> Tensor:
        for code in prefix.unbind(1):
            rows = rows * max(self.levels) + code
        return rows

    def _decode(self, states: Tensor, rows: Tensor, past: list[tuple[Tensor, Tensor]], level: int) -> Tensor:
        """Run the decoder's blocks over one position. Shapes: (n, 1, d_model) -> the same"""
        counts = rows.bincount()
        grid = torch.full((len(counts), int(counts.max())), -1)
        places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        grid[rows, places] = torch.arange(len(rows))
        self.past = []
        for i, block in enumerate(self.model.decoder.block):
            own, other = block.layer[0], block.layer[1]
            part, x = own.SelfAttention, own.layer_norm(states)
            keys, values = heads(part, part.k(x)), heads(part, part.v(x))
            if past:
                keys, values = torch.cat([past[i][0], keys], 2), torch.cat([past[i][1], values], 2)
            self.past.append((keys, values))
            if not i:
                bias = part.compute_bias(1, level + 1, past_seen_tokens=level)
            states = states + joined(part, attend(heads(part, part.q(x)), keys, values, bias, scale=part.scaling))
            part, x = other.EncDecAttention, other.layer_norm(states)
            queries = heads(part, part.q(x)[:, 0][grid])  # (requests, heads, beams, width); row -1 is never read back
            seen = joined(part, attend(queries, *self.memory[i], scale=part.scaling))
            states = states + seen[rows, places].unsqueeze(1)
            states = block.layer[2](states)
        return self.model.decoder.final_layer_norm(states)


attend = torch.nn.functional.scaled_dot_product_attention


def heads(part: Any, states: Tensor) -> Tensor:
    """Cut states into heads. Shapes: (rows, positions, all) -> (rows, heads, positions, width)"""
    return states.unflatten(2, (-1, part.key_value_proj_dim)).transpose(1, 2)


def joined(part: Any, states: Tensor) -> Tensor:
    """Put heads together and send them out. Shapes: (rows, heads, positions, width) -> (rows, positions, d_model)"""
    return part.o(states.transpose(1, 2).flatten(2))


def allowed(codes: np.ndarray, levels: Sequence[int]) -> Callable[[int, Tensor], list[int]]:
    """Return what transformers asks: the tokens that may follow, from a dictionary of prefixes."""
    following: dict[tuple[int, ...], set[int]] = {}
    for row in (codes + offsets(levels).numpy()).tolist():
        for level, token in enumerate(row):
            following.setdefault(tuple(row[:level]), set()).add(token)
    lists = {prefix: sorted(tokens) for prefix, tokens in following.items()}
    return lambda _, ids: lists.get(tuple(ids.tolist()[1:]), [0])


@torch.no_grad()
def theirs(model: T5ForConditionalGeneration, inputs: Tensor, tokens: Any, levels: int, beams: int) -> Any:
    """Search with `generate`, scores summed over codes as ours are."""
    return model.generate(
        inputs, num_beams=beams, num_return_sequences=beams, max_new_tokens=levels, do_sample=False, length_penalty=0.0,
        early_stopping=False, prefix_allowed_tokens_fn=tokens, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip


@torch.no_grad()
def ours(model: T5ForConditionalGeneration, inputs: Tensor, items: Catalogue, beams: int) -> tuple[Found, float]:
    """Search over the tree; also return the seconds inside the decoder."""
    stepper = Stepper(model, inputs, items.sizes)
    found = search(stepper, items.trie, len(inputs), beams=beams)
    return found, stepper.seconds


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
    tokens = allowed(items.codes, items.sizes)
    generator = torch.Generator().manual_seed(1)
    picked = torch.randint(options.items, (options.requests, HISTORY), generator=generator)
    inputs = (torch.from_numpy(items.codes.astype(np.int64))[picked] + offsets(items.sizes)).flatten(1)
    batches = inputs.split(options.batch)
    ours(model, batches[0], items, options.beams), theirs(model, batches[0], tokens, len(items.sizes), options.beams)
    seconds: dict[str, list[float]] = {"ours": [], "decoder": [], "generate": []}
    for _ in range(options.repeats):
        with watched() as cost:
            mine = [ours(model, batch, items, options.beams) for batch in batches]
        with watched() as peer:
            answers = [theirs(model, batch, tokens, len(items.sizes), options.beams) for batch in batches]
        seconds["ours"].append(cost.seconds)
        seconds["decoder"].append(sum(part[1] for part in mine))
        seconds["generate"].append(peer.seconds)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    found = [part[0] for part in mine]
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
        "share_in_the_decoder": middle["decoder"] / middle["ours"],
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
        ["of this the decoder", f"{b['seconds']['decoder']:.2f}", "", ""],
    ]  # fmt: skip
    notes = [
        f"Equal lists {b['equal_lists']:.1%}, equal first items {b['equal_first_items']:.1%}; "
        f"scores lie at most {b['largest_gap_of_scores']:.1e} nats apart.",
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
    parser.add_argument("--size", default="small", choices=SIZES, help="size of the network")
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
