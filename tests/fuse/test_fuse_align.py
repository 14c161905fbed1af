from __future__ import annotations

from typing import Any

import pytest
import torch
from fuse_pruning import PRUNABLE, TEXT, logits, opened

from retouch.errors import UserError
from retouch.fuse._inputs import Text
from retouch.fuse._units import units_of
from retouch.fuse.align import aligned
from retouch.fuse.prune import plan_prune
from retouch.fuse.pruned import pruned
from retouch.trace import Trace


def planned(model: Any, align: str) -> Any:
    return plan_prune(model, ratio=0.5, score="wanda", align=align, text=TEXT)  # type: ignore[arg-type]


def streams(model: Any, name: str, side: str) -> torch.Tensor:
    """What flows into or out of a weight at the positions that moments count."""
    seen = []
    with torch.no_grad(), Trace(model) as trace:
        trace.read(name, side)  # type: ignore[arg-type]
        for row in TEXT.rows(model):
            batch = model.batch([row])
            trace.run(batch)
            special = torch.isin(batch.ids, torch.tensor(model.tokenizer.all_special_ids))
            seen.append(trace[name, side][(batch.positions > 0) | special].double())
    return torch.cat(seen)


def test_none_cuts_alone_and_the_hash_covers_the_choice(tiny: Any) -> None:
    model = opened(tiny, "llama")
    plans = [planned(model, a) for a in ("none", "bias", "lstsq", "distil")]
    assert len({p.hash for p in plans}) == 4
    with pytest.raises(UserError, match="same text"):
        aligned(model, plans[1], text=Text(text="another one", n_tokens=512, sequence_length=64))
    assert torch.equal(logits(aligned(model, plans[0])), logits(pruned(model, plans[0])))


@pytest.mark.parametrize("name", [*PRUNABLE, "gpt2"])
def test_bias_adds_the_mean_of_what_is_missing(tiny: Any, name: str) -> None:
    if name == "gpt2":
        from retouch.model import wrap

        model = wrap(*tiny("gpt2", n_blocks=4))
    else:
        model = opened(tiny, name)
    plan = planned(model, "bias")
    small = aligned(model, plan, text=TEXT)
    assert small.align == "bias" and small.plan == plan.hash
    kept = units_of(model).index("mlp.down", plan.kept[1])
    gone = [i for i in range(64) if i not in kept.tolist()]
    means = streams(model, "blocks.1.mlp.down", "input").mean(0)
    old = getattr(model.module("blocks.1.mlp.down"), "bias", None)
    expected = model.matrix("blocks.1.mlp.down").double()[:, gone] @ means[gone] + (0 if old is None else old)
    assert torch.allclose(small.module("blocks.1.mlp.down").bias.double(), expected, atol=1e-5)
    assert getattr(model.module("blocks.1.mlp.down"), "bias", None) is old
    assert (getattr(small.module("blocks.1.attention.out"), "bias", None) is not None) == (
        plan.attention or name == "gpt2"
    )


def test_lstsq_is_the_ridge_regression_on_the_kept_inputs_and_beats_bias(tiny: Any) -> None:
    model = opened(tiny, "qwen3")
    plan = planned(model, "lstsq")
    small = aligned(model, plan, text=TEXT)
    name, kept = "blocks.1.mlp.down", units_of(model).index("mlp.down", plan.kept[1])
    x = streams(model, name, "input")
    y = x @ model.matrix(name).double().T
    ones = torch.cat([x[:, kept], torch.ones(len(x), 1).double()], 1)
    gram = ones.T @ ones / len(x)
    mu = 1e-3 * gram.diagonal()[:-1].mean()
    solved = torch.linalg.solve(gram + mu * torch.eye(len(gram)).double(), ones.T @ y / len(x)).T
    assert torch.allclose(small.matrix(name).double(), solved[:, :-1], atol=1e-3)
    assert torch.allclose(small.module(name).bias.double(), solved[:, -1], atol=1e-3)
    by_bias = aligned(model, planned(model, "bias"), text=TEXT)

    def error(one: Any) -> float:
        out = x[:, kept] @ one.matrix(name).double().T + one.module(name).bias
        return float((out - y).square().mean())

    none = float((x[:, kept] @ model.matrix(name).double()[:, kept].T - y).square().mean())
    assert error(small) < error(by_bias) < none


def test_distil_comes_nearer_and_leaves_head_embeddings_and_the_base_alone(tiny: Any) -> None:
    model = opened(tiny, "llama")
    before, plan = model.fingerprint, planned(model, "distil")
    one = aligned(model, plan, text=TEXT, n_steps=15, learning_rate=3e-3)
    again = aligned(model, plan, text=TEXT, n_steps=15, learning_rate=3e-3)

    def objective(small: Any) -> float:
        total = 0.0
        for row in TEXT.rows(model):
            ids = torch.tensor([row])
            with torch.no_grad():
                wanted, got = (m.network(input_ids=ids).logits[0, :-1] for m in (model, small))
            p, q = (wanted / 2).softmax(-1), (got / 2).softmax(-1)
            total += float(
                4 * (p * (p / q).log()).sum(-1).mean() - got.log_softmax(-1)[range(len(got)), ids[0, 1:]].mean()
            )
        return total

    assert objective(one) < 0.85 * objective(pruned(model, plan))
    assert one.fingerprint == again.fingerprint
    assert one.weight("embed") is model.weight("embed") and one.weight("head") is model.weight("head")
    import dataclasses

    assert dataclasses.replace(model, known_digests={}).fingerprint == before
