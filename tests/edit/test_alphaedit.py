"""AlphaEdit is its direct formula, and reads nothing outside of the directions that text leaves free."""

from __future__ import annotations

import pytest
import torch
from spread_oracle import APART, QUICK, close, down, found_for, moment, null_projector, slow

from retouch.edit.alphaedit import AlphaEdit
from retouch.edit.value import optimise
from retouch.errors import SolveError

N_BLOCKS = 4


def alphaedit(**settings):
    return AlphaEdit(**QUICK | {"blocks": (0, 2)} | settings)


def formula(projector, lam, earlier=None):
    def solve(block, k, r):
        p = projector(block)
        size = lam or 0.01 * float(((p @ k) ** 2).sum(0).mean())
        every = k if earlier is None else torch.cat([k, earlier[down(block)].double()], 1)
        return torch.linalg.solve(p @ every @ every.T + size * torch.eye(len(k)).double(), p @ k @ r.T).T

    return solve


def states(model, method):
    found = found_for(model, APART)
    return found, torch.stack([v.target for v in optimise(model, found, 2, "residual", method)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_the_write_is_the_direct_formula_with_written_weights(open_tiny, family, strength):
    model, method = open_tiny(family), alphaedit(strength=strength)
    found, z = states(model, method)
    wanted = slow(model, found, [[0], [1], [2]], z, (0, 2), formula(lambda b: null_projector(model, b), strength))
    for name, part in method.plan(model, APART).parts.items():
        close(part.delta(), wanted[name], 2e-3)


def test_earlier_keys_stand_beside_the_new_ones(llama):
    method = alphaedit()
    earlier = {down(b): torch.randn(64, 5, generator=torch.Generator().manual_seed(b)) for b in (0, 2)}
    found, z = states(llama, method)
    wanted = slow(llama, found, [[0], [1], [2]], z, (0, 2), formula(lambda b: null_projector(llama, b), 0, earlier))
    free = method.plan(llama, APART)
    for name, part in method.plan(llama, APART, previous=earlier).parts.items():
        close(part.delta(), wanted[name], 2e-3)
        key = earlier[name].double()
        assert float((part.delta() @ key).norm()) < 0.5 * float((free.parts[name].delta() @ key).norm())


@pytest.mark.parametrize("settings", [{}, {"energy": 0.2}])
def test_a_write_reads_the_free_directions_only(llama, settings):
    for name, part in alphaedit(**settings).plan(llama, APART).parts.items():
        p = null_projector(llama, int(name.split(".")[1]), settings.get("energy", 0.02))
        close(p @ p, p, 1e-10)
        assert 0 < round(float(p.trace())) < 64
        right = part.right.double()
        assert float((right - right @ p).norm()) < 1e-5 * float(right.norm())


def test_more_energy_leaves_more_directions_and_a_smaller_write(llama):
    sizes = [
        float(alphaedit(energy=e, blocks=(2,)).plan(llama, APART[:1]).parts[down(2)].delta().norm())
        for e in (0.02, 0.3, 1.0)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.05 * sizes[2]


def test_faithful_takes_the_absolute_threshold_and_the_published_strength(llama):
    up = "blocks.2.mlp.up"  # with shorter keys some of the tiny model's directions fall below the threshold
    llama = llama.with_weights({llama.anatomy.weight(up): 0.2 * llama.matrix(up)})
    assert 0 < int((torch.linalg.eigvalsh(moment(llama, 2)) < 2e-2).sum()) < 64
    method = alphaedit(faithful=True, blocks=(2,))
    found, z = states(llama, method)
    wanted = slow(
        llama, found, [[0], [1], [2]], z, (2,), formula(lambda b: null_projector(llama, b, threshold=2e-2), 10.0)
    )[down(2)]
    close(method.plan(llama, APART).parts[down(2)].delta(), wanted)
    ours = alphaedit(blocks=(2,)).plan(llama, APART).parts[down(2)].delta()
    assert float((ours - wanted).norm()) > 0.1 * float(ours.norm())


def test_a_lone_fact_takes_all_but_a_hundredth_by_default(llama):
    change = alphaedit(blocks=(1, 2)).plan(llama, APART[:1])
    assert change.notes["facts"][0]["delivered"] == pytest.approx([100 / 101] * 2, rel=1e-6)


def test_no_free_direction_is_an_error_that_says_what_to_do(llama):
    with pytest.raises(SolveError, match="No direction of this second moment"):
        alphaedit(energy=1e-12).plan(llama, APART)
