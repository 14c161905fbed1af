"""Composed prompts: what meets what, and how often."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import pytest

from retouch.errors import FactError, UserError
from retouch.fuse import compose
from retouch.fuse.base import Question
from retouch.fuse.suites import question_key
from retouch.fuse.templates import render, templates


def pools(*sizes, options=4):
    names = ["law", "film", "news", "birds", "stones", "tides"]
    return {
        d: [
            Question(d, d, f"{d} {i}?", tuple("wxyz"[:options]), i % options, question_key(f"{d} {i}", "ab"))
            for i in range(n)
        ]
        for d, n in zip(names, sizes)
    }


@pytest.mark.parametrize("k", [2, 3, 4])
def test_each_question_three_times_and_each_pair_once(k):
    found = compose.bundles(pools(*[20] * k), k)
    assert len(found) == 6 * 9
    times = Counter(q.key for i in found for q in i.parts)
    assert set(times.values()) == {3}
    met = Counter(pair for i in found for pair in combinations(sorted(q.key for q in i.parts), 2))
    assert set(met.values()) == {1}
    for instance in found:
        assert len({q.domain for q in instance.parts}) == k


def test_bundles_share_nothing():
    found = compose.bundles(pools(20, 11, 30), 3)
    of = {}
    for instance in found:
        for q in instance.parts:
            assert of.setdefault(q.key, instance.bundle) == instance.bundle
    assert {i.bundle for i in found} == {0, 1, 2}


@pytest.mark.parametrize("k", [2, 3, 4])
def test_domains_stand_equally_often_at_each_place(k):
    found = compose.bundles(pools(*[12] * k), k)  # four bundles, 36 instances
    places = Counter((q.domain, p) for i in found for p, q in enumerate(i.parts))
    assert set(places.values()) == {len(found) // k}


def test_bundles_go_round_the_choices_of_domains():
    found = compose.bundles(pools(*[18] * 4), 2, n_bundles=12)
    chosen = Counter(tuple(sorted({q.domain for q in i.parts})) for i in found)
    assert set(chosen.values()) == {18}
    assert len(chosen) == 6
    places = Counter((q.domain, p) for i in found for p, q in enumerate(i.parts))
    assert set(places.values()) == {27}


def test_once_asks_each_question_once():
    found = compose.bundles(pools(7, 5, 9), 3, once=True)
    assert [i.bundle for i in found] == list(range(5))
    assert max(Counter(q.key for i in found for q in i.parts).values()) == 1


def test_the_seed_draws_other_questions():
    own = pools(9, 30)
    assert compose.bundles(own, 2, seed=1) == compose.bundles(own, 2, seed=1) != compose.bundles(own, 2, seed=2)
    assert compose.bundles({d: q[::-1] for d, q in own.items()}, 2) == compose.bundles(own, 2)


def test_too_little_is_refused():
    with pytest.raises(UserError, match="film has 2"):
        compose.bundles(pools(9, 2), 2)
    with pytest.raises(UserError, match="2 to 4 questions here; got 5"):
        compose.bundles(pools(*[9] * 5), 5)
    with pytest.raises(UserError, match="got 3"):
        compose.bundles(pools(9, 9), 3)


def test_singles_ask_the_same_questions_and_keep_their_bundle():
    found = compose.bundles(pools(9, 9, 9), 3)
    alone = compose.singles(found)
    assert len(alone) == 27
    assert {(i.bundle, i.parts[0].key) for i in alone} == {(i.bundle, q.key) for i in found for q in i.parts}


def test_own_domain_takes_disjoint_groups():
    found = compose.own_domain(pools(11)["law"], 3)
    assert len(found) == 3
    assert len({q.key for i in found for q in i.parts}) == 9
    with pytest.raises(UserError, match="3 questions"):
        compose.own_domain(pools(2)["law"], 3)


def test_shots_are_drawn_from_all_domains():
    found = compose.shots(pools(2, 2, 2), 3, n=2)
    assert [len({q.domain for q in group}) for group in found] == [3, 3]
    assert len({q.key for group in found for q in group}) == 6
    with pytest.raises(UserError, match="2 questions are kept for them"):
        compose.shots(pools(1, 1), 2)


def test_a_recipe_holds_hashes_and_gives_the_instances_back(tmp_path):
    own = pools(9, 9)
    found = compose.bundles(own, 2)
    compose.write_recipe(tmp_path / "draw.json", "made", found, {"seed": 0})
    assert compose.read_recipe(tmp_path / "draw.json", own) == found
    text = (tmp_path / "draw.json").read_text()
    assert not any(q.stem in text for i in found for q in i.parts)
    with pytest.raises(FactError, match="questions that are not at hand, the first of film"):
        compose.read_recipe(tmp_path / "draw.json", {"law": own["law"]})
    with pytest.raises(FactError, match="order of options"):
        compose.read_recipe(tmp_path / "draw.json", pools(9, 9, options=3))
    (tmp_path / "other.json").write_text(json.dumps({"kind": "plan"}))
    with pytest.raises(FactError, match="not a recipe"):
        compose.read_recipe(tmp_path / "other.json", own)


def test_the_plain_prompt_reads_as_documented():
    law, film = pools(1, 1, options=2).values()
    shown = render([law[0], film[0]], "plain")
    assert shown.prompt == (
        "Answer all 2 questions. They come from different subjects.\n\n"
        "Question 1 (law):\nlaw 0?\nA. w\nB. x\n\nQuestion 2 (film):\nfilm 0?\nA. w\nB. x\n\n"
        "Answers (one letter per question, in order):"
    )
    assert shown.target([1, 0]) == " B, A"
    assert render([law[0]], "plain").prompt.endswith("Answer (one letter):")


def test_words_are_answered_with_the_options_themselves():
    law, film = pools(1, 1, options=2).values()
    shown = render([law[0], film[0]], "words")
    assert "Question 2 (film): film 0?\nOptions: w, x\n\nAnswers (one option per question, in order):" in shown.prompt
    assert shown.target([1, 0]) == " x, w"
    assert shown.labels == (("w", "x"),) * 2


@pytest.mark.parametrize("name", [n for n, t in templates().items() if t.labels == "letters"])
def test_every_template_asks_all_and_ends_bare(name):
    own = [q for qs in pools(1, 1, 1).values() for q in qs]
    words = templates()[name]
    for n in (1, 3):
        shown = render(own[:n], name, [own[:n]] * words.n_shots)
        text = shown.prompt + shown.target([0] * n)
        assert shown.prompt == shown.prompt.rstrip()
        assert shown.gaps[0][0] == " "
        assert all(q.stem in text for q in own[:n])
    if words.n_shots:
        with pytest.raises(UserError, match="2 answered examples"):
            render(own, name)
