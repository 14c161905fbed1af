"""What may be shown, and the rules that move a list after the search."""

from __future__ import annotations

import pytest

from retouch.errors import UserError
from retouch.recommend.base import Item
from retouch.recommend.filters import Rules, allowed, rerank

ITEMS = (
    Item("a", "", "A", ("crime", "noir")),
    Item("b", "", "B", ("children",)),
    Item("c", "", "C"),
    Item("d", "", "D", ("noir",)),
)


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({}, "abcd"),
        ({"categories": ["noir"]}, "ad"),
        ({"allow": ["b", "d"], "deny": ["d"]}, "b"),
        ({"allow": []}, ""),
        ({"deny": ["a"], "categories": ["noir", "children"]}, "bd"),
    ],
)
def test_lists_and_categories(rules, wanted):
    found = allowed(ITEMS, **rules)
    assert not found[0] and [i.id for i, ok in zip(ITEMS, found[1:]) if ok] == list(wanted)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="category 'noire'"):
        allowed(ITEMS, categories=["noire"])
    with pytest.raises(UserError, match="'1', '2', '3' and 1 more"):
        allowed(ITEMS, deny=["1", "2", "3", "4"])


FOUND = ([1, 2, 3, 4, 5, 0], [-1.0, -2.0, -3.0, -4.0, -5.0, float("-inf")])


def test_without_rules_nothing_moves():
    ranked = rerank(*FOUND, 3, Rules())
    assert ranked.items == (1, 2, 3) and ranked.scores == (-1.0, -2.0, -3.0) and not any(ranked.moved)
    assert rerank(*FOUND, 9, Rules()).items == (1, 2, 3, 4, 5)


def test_a_category_is_held_to_its_number():
    categories = {1: ("x",), 2: ("x", "y"), 3: ("y",), 4: ("x",), 5: ()}
    ranked = rerank(*FOUND, 3, Rules(per_category=1), categories=categories)
    assert ranked.items == (1, 3, 5) and ranked.moved == (False, True, True)


def test_new_items_get_their_places_only_when_they_need_them():
    assert rerank(*FOUND, 3, Rules(reserved_for_new=1), new={5}).items == (1, 2, 5)
    assert rerank(*FOUND, 3, Rules(reserved_for_new=1), new={2, 5}).items == (1, 2, 3)
    assert rerank(*FOUND, 3, Rules(reserved_for_new=2), new={5}).items == (1, 2, 5)
    assert rerank(*FOUND, 2, Rules(reserved_for_new=2), new={4, 5}).items == (4, 5)
    assert rerank(*FOUND, 3, Rules(reserved_for_new=2), new={9}).items == (1, 2, 3)


def test_boosts_move_and_scores_stay_true():
    ranked = rerank(*FOUND, 2, Rules(), boosts={4: 3.5})
    assert ranked.items == (4, 1) and ranked.scores == (-4.0, -1.0) and ranked.moved == (True, True)
