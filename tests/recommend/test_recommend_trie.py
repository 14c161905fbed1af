"""The tree in arrays against a dictionary, on catalogues that hypothesis draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from recommend_toy_codes import catalogues

from retouch.errors import UserError
from retouch.recommend.trie import Trie


def by_dictionary(codes):
    """Children by prefix, the slow and obvious way."""
    found = {(): set()}
    for row in codes.tolist():
        for level, code in enumerate(row):
            found.setdefault(tuple(row[:level]), set()).add(code)
    return found


def walk(trie, level=0, node=0, prefix=()):
    """Yield each prefix with its codes and its items, by the arrays alone."""
    below = range(trie.start[level][node], trie.start[level][node + 1]) if level < trie.n_levels else ()
    leaves = range(trie.leaf[level][node], trie.leaf[level][node + 1])
    yield prefix, [int(trie.code[level][j]) for j in below], [int(trie.item[j]) for j in leaves]
    for child in below:
        yield from walk(trie, level + 1, child, (*prefix, int(trie.code[level][child])))


@given(catalogues())
def test_it_equals_a_dictionary(drawn):
    codes, _ = drawn
    trie, wanted = Trie.of(codes), by_dictionary(codes)
    nodes = list(walk(trie))
    assert sum(trie.n_nodes) == len(nodes)
    for prefix, children, items in nodes:
        assert children == sorted(wanted.get(prefix, ()))
        assert sorted(items) == [i for i, row in enumerate(codes.tolist(), 1) if tuple(row[: len(prefix)]) == prefix]


@given(catalogues())
def test_every_item_has_one_leaf(drawn):
    trie = Trie.of(drawn[0])
    assert sorted(trie.item.tolist()) == list(range(1, trie.n_items + 1))
    assert trie.item[trie.place[1:]].tolist() == list(range(1, trie.n_items + 1)) and trie.place[0] == -1


@given(catalogues())
def test_a_prefix_is_found_and_nothing_else_is(drawn):
    codes, sizes = drawn
    trie = Trie.of(codes)
    assert trie.find(codes).tolist() == trie.place[1:].tolist()
    grid = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    known = set(map(tuple, codes.tolist()))
    assert ((trie.find(grid) >= 0) == [tuple(row) in known for row in grid.tolist()]).all()
    assert trie.find(np.array([[99] * len(sizes), [-1] * len(sizes)])).tolist() == [-1, -1]


def test_all_arrays_are_small_integers():
    trie = Trie.of(np.array([[1, 0], [0, 3], [0, 2]]))
    assert {a.dtype for a in (*trie.start, *trie.code, *trie.leaf, trie.item, trie.place)} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([[0, 1], [2, 2], [0, 1]], r"Items 1 and 3 have the same codes \[0, 1\]"),
        ([[0, -1]], "from -1 to 0"),
        (np.zeros((0, 2)), r"shape \(0, 2\)"),
        ([1, 2], r"shape \(2,\)"),
    ],
)
def test_what_is_no_catalogue_is_refused(codes, said):
    with pytest.raises(UserError, match=said):
        Trie.of(np.array(codes))
