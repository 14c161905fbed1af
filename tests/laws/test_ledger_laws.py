"""Whatever is applied and undone, in whatever order: the weights depend on what is in force and on nothing else."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retouch.change import Change, Dense, LowRank
from retouch.ledger import Ledger
from retouch.linalg import Identity, solve
from retouch.model import wrap

N_CHANGES = 3
NAMES = ("blocks.0.mlp.down", "blocks.0.attention.out")


def _change(model, number):
    """Changes that overlap: low rank on the first weight, low rank on both, the whole of the second."""
    make = torch.Generator().manual_seed(number)

    def part(name, dense):
        out, into = model.anatomy.shape(name)
        if dense:
            return Dense(0.1 * torch.randn(out, into, generator=make))
        return LowRank(0.1 * torch.randn(out, 2, generator=make), torch.randn(2, into, generator=make))

    touched = (NAMES[:1], NAMES, NAMES[1:])[number]
    parts = {name: part(name, dense=number == 2) for name in touched}
    return Change("test", model.base_fingerprint, parts, settings={"seed": number})


def _sum(parts):
    """Differences of one weight, in the order of the changes: low-rank ones as one product, then whole ones."""
    low = [p for p in parts if isinstance(p, LowRank)]
    whole = [p.difference.double() for p in parts if not isinstance(p, LowRank)]
    if not low:
        return whole
    return [torch.cat([p.left for p in low], 1).double() @ torch.cat([p.right for p in low]).double(), *whole]


class World:
    """A base model, its changes, and every ledger that was reached so far: ledgers never change, so they are shared."""

    def __init__(self, network, tokenizer):
        self.base = wrap(network, tokenizer)
        self.changes = [_change(self.base, i) for i in range(N_CHANGES)]
        self.after = functools.cache(self._after)
        self.direct = functools.cache(self._direct)

    def _after(self, moves):
        """Each move applies a change, or takes it out when it is in force."""
        if not moves:
            return Ledger(self.base)
        before, change = self.after(moves[:-1]), self.changes[moves[-1]]
        number = next((e.number for e in before.entries if e.active and e.change.id == change.id), None)
        return before.apply(change) if number is None else before.undo(number)

    def _direct(self, in_force):
        """The obvious arithmetic: the base in float64 plus every difference, then one cast."""
        ordered = sorted((self.changes[i] for i in in_force), key=lambda c: c.id)
        weights = {name: self.base.matrix(name).double() for name in NAMES}
        for name in NAMES:
            for delta in _sum([c.parts[name] for c in ordered if name in c.parts]):
                weights[name] = weights[name] + delta
        return {name: weight.float() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def worlds(tiny):
    return {family: World(*tiny(family, n_blocks=1)) for family in ("llama", "gpt2")}


@settings(max_examples=1000, deadline=None)
@given(family=st.sampled_from(["llama", "gpt2"]), moves=st.lists(st.integers(0, N_CHANGES - 1), max_size=5))
@example(family="llama", moves=[0, 1, 2, 0, 1, 2, 2, 1, 0])
@example(family="gpt2", moves=[2, 1, 0, 1, 1, 2, 0, 1])
def test_the_weights_are_those_of_the_changes_in_force(worlds, family, moves):
    world = worlds[family]
    ledger = world.after(tuple(moves))
    in_force = frozenset(i for i in range(N_CHANGES) if moves.count(i) % 2)

    assert {c.id for c in ledger.active} == {world.changes[i].id for i in in_force}
    assert [e.number for e in ledger.entries] == list(range(1, len(ledger.entries) + 1))
    wanted = world.direct(in_force)
    assert all(torch.equal(ledger.model.matrix(name), wanted[name]) for name in NAMES)
    assert (ledger.model.fingerprint == world.base.fingerprint) == (not in_force)
    assert ledger.model.base_fingerprint == world.base.fingerprint
    if not in_force:
        assert ledger.model.base is None


def test_no_sequence_has_written_to_the_base(worlds, tiny):
    for family, world in worlds.items():
        world.after((0, 1, 2, 1))
        fresh = tiny(family, n_blocks=1)[0]
        assert all(torch.equal(p, fresh.get_parameter(n)) for n, p in world.base.network.named_parameters())


def test_every_order_of_application_gives_the_same_bits(worlds):
    from itertools import permutations

    for world in worlds.values():
        prints = {world.after(order).model.fingerprint for order in permutations(range(N_CHANGES))}
        assert len(prints) == 1


FACTS = 3
WRITES = ("least_squares", "equality")


def _batch(model, mode, seed):
    make = torch.Generator().manual_seed(seed)
    out, into = model.anatomy.shape(NAMES[0])
    keys, targets = torch.randn(into, FACTS, generator=make), torch.randn(out, FACTS, generator=make)
    solved = solve(keys, targets, Identity(3.0), mode=mode)
    facts = tuple({"prompt": "The capital of {} is", "subject": f"{mode} {i}", "target": "x"} for i in range(FACTS))
    part = LowRank(solved.left.float(), solved.right.float())
    return Change(
        mode, model.base_fingerprint, {NAMES[0]: part}, facts=facts, keys={NAMES[0]: keys}, targets={NAMES[0]: targets}
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data(), family=st.sampled_from(["llama", "gpt2"]))
def test_facts_taken_out_in_any_order_leave_the_same_bits(worlds, data, family):
    base = worlds[family].base
    batches = [_batch(base, mode, n) for n, mode in enumerate(WRITES)]
    gone = data.draw(st.sets(st.tuples(st.sampled_from([1, 2]), st.integers(0, FACTS - 1))))
    results = []
    for _ in range(2):
        ledger = functools.reduce(Ledger.apply, batches, Ledger(base))
        for number, fact in data.draw(st.permutations(sorted(gone))):
            ledger = ledger.undo(number, fact)
        results.append(ledger)
    one, two = results
    assert one.model.fingerprint == two.model.fingerprint
    keys = one.keys(NAMES[0])
    assert (0 if keys is None else keys.shape[1]) == len(WRITES) * FACTS - len(gone)
    assert (one.model.fingerprint == base.fingerprint) == (len(gone) == len(WRITES) * FACTS)
    for number in (1, 2):
        if one.entries[number - 1].active:
            one = one.undo(number)
    assert one.model.fingerprint == base.fingerprint and one.model.base is None
