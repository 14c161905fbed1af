"""Rows laid side by side compute what they compute alone, and nothing twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import DECODERS
from retouch._packing import Strip, lay_out
from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.rome import Rome
from retouch.edit.rows import problems
from retouch.edit.value import Bystander, Search
from retouch.errors import ModelError
from retouch.tokens import Text, encode
from retouch.trace import Suffix

ROWS = [
    ((11, 57, 102, 13, 240, 31, 8), 2),
    ((11, 57, 102, 13, 17), 2),  # begins like the first, also beyond its edited token
    ((11, 57, 102, 13, 240, 9), 2),
    ((90, 14, 333), 2),
    ((21, 77, 210, 401, 5), 0),
]


def strips(owners=(0, 0, 0, 0, 0), rows=ROWS):
    return [Strip(i, ids, anchor, owner) for i, ((ids, anchor), owner) in enumerate(zip(rows, owners))]


@pytest.mark.parametrize("key_cost", [0.0, 0.01, 10.0])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_rows_are_the_rows(open_tiny, family, key_cost):
    suffix = Suffix.of(open_tiny(family), [ids for ids, _ in ROWS], [a for _, a in ROWS], 1)
    layout = lay_out(strips(), key_cost)
    alone, packed = suffix.run(), suffix.pack(layout).run().flatten(0, 1)
    for i, ((ids, anchor), places) in enumerate(zip(ROWS, layout.places)):
        assert len(places) == len(ids) - anchor
        torch.testing.assert_close(packed[list(places)], alone[i, : len(places)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "fields"), [("mistral", {"sliding_window": 3}), ("gemma2", {"sliding_window": 3})])
def test_packed_rows_look_back_no_farther_than_a_sliding_window(tiny, family, fields):
    from retouch.model import wrap

    model = wrap(*tiny(family, n_blocks=3, **fields))
    suffix = Suffix.of(model, [ids for ids, _ in ROWS], [a for _, a in ROWS], 1)
    layout = lay_out(strips(), 0.0)
    alone, packed = suffix.run(), suffix.pack(layout).run().flatten(0, 1)
    for i, places in enumerate(layout.places):
        torch.testing.assert_close(packed[list(places)], alone[i, : len(places)], atol=1e-5, rtol=1e-5)


def test_what_rows_share_is_computed_once_and_only_for_one_owner():
    together, apart = lay_out(strips(), 0.0), lay_out(strips((0, 1, 2, 3, 4)), 0.0)
    assert together.places[0][:2] == together.places[1][:2] and together.places[0][:3] == together.places[2][:3]
    n_tokens = [len({p for places in layout.places for p in places}) for layout in (together, apart)]
    assert n_tokens == [13, 18]  # 5 + 1 + 1 + 1 + 5 of 5 + 3 + 4 + 1 + 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 8)), min_size=1, max_size=12
    ),
    st.sampled_from([0.0, 0.01, 1.0]),
)
def test_a_place_sees_its_own_row_and_nothing_else(drawn, key_cost):
    rows = [(tuple(ids), min(anchor, len(ids) - 1)) for ids, anchor in drawn]
    layout = lay_out(strips(range(len(rows)), rows), key_cost)
    width, before = layout.row.shape[1], layout.before_row.shape[1]
    taken = [p for places in layout.places for p in places]
    assert len(set(taken)) == len(taken)  # owners differ: nothing is shared
    for i, ((_, anchor), places) in enumerate(zip(rows, layout.places)):
        for step, place in enumerate(places):
            b, at = divmod(place, width)
            assert (int(layout.row[b, at]), int(layout.column[b, at])) == (i, step)
            seen = layout.sees[b, at].nonzero()[:, 0].tolist()
            front = [k for k in seen if k < before]
            assert {int(layout.before_row[b, k]) for k in front} <= {i}
            assert [int(layout.before_column[b, k]) for k in front] == list(range(-anchor, 0))
            assert [b * width + k - before for k in seen if k >= before] == list(places[: step + 1])
    filling = set(range(layout.row.numel())) - set(taken)
    assert all(int(layout.sees.view(-1, before + width)[f].sum()) == 1 for f in filling)


def test_an_argument_that_belongs_to_no_token_is_named(llama):
    suffix = Suffix.of(llama, [ids for ids, _ in ROWS], [a for _, a in ROWS], 1)
    call = suffix._calls[0]
    call.kwargs["odd"] = torch.zeros(7, 9, 2)
    with pytest.raises(ModelError, match=r"\(7, 9, 2\)"):
        suffix.pack(lay_out(strips(), 0.0))


def test_facts_of_one_value_share_their_beginnings_and_bystanders_nothing(llama):
    facts = [Fact("The capital of {} is", "France", "Lyon"), Fact("The capital of {} is", "France", "the port")]
    found = problems(llama, facts, [Context("", 0.5), Context("Because. ", 0.5)], "subject")
    (row,) = encode(llama.tokenizer, [Text(facts[0].filled)])
    heard = [Bystander(0, row, torch.full((len(row.ids),), h)) for h in (0.0, 1.0)]
    joint = Search(llama, found, 1, "down", Rome(), groups=[[0, 1]])
    apart = Search(llama, found, 1, "down", Rome())
    places = [set((s.now["target"].place).tolist()) for s in (joint, apart)]
    assert len(places[0]) < len(places[1])
    limited = Search(llama, found, 1, "down", Rome(max_drift=1.0), groups=[[0, 1]], bystanders=heard)
    one, other = limited.now["drift"].place.tolist()
    assert one != other
    delta = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drift = limited.terms(delta).drift
    quiet = Search(llama, found, 1, "down", Rome(max_drift=1.0), groups=[[0, 1]], bystanders=heard[:1])
    with torch.no_grad():
        still = float(quiet.terms(delta).drift)
    assert still == pytest.approx(0, abs=1e-6)
    assert still < float(drift)
