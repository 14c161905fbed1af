"""Weights that are chosen by questions: where they are planted they are found, and a bound is kept where it costs."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random

import pytest
import torch

from retouch import registry
from retouch.change import Change, LowRank
from retouch.errors import ModelError, UserError
from retouch.fuse._weighing import Mixture
from retouch.fuse.asking import asked, likelihoods, right_by_domain
from retouch.fuse.base import Adapter, Ground, Question
from retouch.fuse.compose import Instance
from retouch.fuse.cr_subspace import CRSubspace
from retouch.fuse.fusing import stream
from retouch.fuse.suites import question_key
from retouch.fuse.tuning import tune, variants
from retouch.model import wrap

WORDING = "synth"
WEIGHTS = ("blocks.0.mlp.down", "blocks.1.attention.out")


@pytest.fixture(scope="module")
def model(tiny):
    """A tiny model, with letters that are one token behind a space."""
    _, words = tiny("llama")
    words.add_tokens([f" {letter}" for letter in "ABCD"])
    network, _ = tiny("llama", vocab_size=len(words), max_position_embeddings=256)
    return wrap(network, words)


def grounds(model, selection):
    return Ground(model, selection, wording=WORDING)


def question(domain, i, answer=None, n=3):
    draw = random.Random(f"{domain} {i}")
    stem = f"{domain} {i}" + " so" * draw.randint(0, 3)
    right = draw.randrange(n) if answer is None else answer
    return Question(domain, domain, stem, tuple("ABC"[:n]), right, question_key(stem, "a"))


@pytest.fixture(scope="module")
def law(model):
    """Questions that the base answers rightly, and surely."""
    free = [question("law", i, 0, 2 + i % 2) for i in range(40)]
    found = asked(model, None, [Instance(0, (q,)) for q in free], wording=WORDING)
    margins = [sorted(s[0])[-1] - sorted(s[0])[-2] for s in found.scores]
    sure = sorted(range(40), key=lambda i: -margins[i])[:8]
    return [question("law", i, found.chosen[i][0], 2 + i % 2) for i in sure]


@pytest.fixture(scope="module")
def film():
    """More questions, of which the base knows nothing."""
    return [question("film", i) for i in range(24)]


def steps(model, *wanted):
    """A low-rank difference that makes each group's answers likelier by about its number."""
    parts = dict.fromkeys(WEIGHTS, 0)
    for rows, size in wanted:
        weights = [model.weight(name).requires_grad_(True) for name in WEIGHTS]
        mixture = Mixture([nothing(model)], grounds(model, {"all": rows}), 100, 0)
        mixture.ask(torch.ones(1), lambda _, likely: likely.sum())
        for name, weight in zip(WEIGHTS, weights):
            parts[name] = parts[name] + size * weight.grad / weight.grad.norm()
            weight.grad = None
            weight.requires_grad_(False)
    return {name: cut(matrix) for name, matrix in parts.items()}


def cut(matrix, rank=6):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return LowRank(u[:, :rank] * s[:rank], vh[:rank])


def nothing(model):
    zero = LowRank(torch.zeros(32, 1), torch.zeros(1, 64))
    return Adapter("nothing", {WEIGHTS[0]: zero}, model.base_fingerprint)


def adapter(model, name, parts, size=1.0):
    return Adapter(name, {n: LowRank(p.left * size, p.right) for n, p in parts.items()}, model.base_fingerprint)


def make(name, **settings):
    return registry.make("fuse", name, **settings)


@pytest.fixture(scope="module")
def towards(model, film):
    return steps(model, (film, 0.5))


# ---------------------------------------------------------------- adapters beside the base


def test_a_mixture_answers_as_the_fused_change_does(model, law, film):
    parts = [steps(model, (law, 1.0)), steps(model, (film, -1.5))]
    given = [adapter(model, f"edge {i}", p) for i, p in enumerate(parts)]
    ground = grounds(model, {"law": law, "film": film})
    for w in ([0.7, -0.4], [0.0, 1.2]):
        found = Mixture(given, ground, 100, 0).ask(torch.tensor(w))
        change = dict(stream(make("cat", coverage=False), given, w))
        total = {n: sum(x * p[n].delta() for x, p in zip(w, parts)) for n in WEIGHTS}
        assert all(torch.allclose(change[n].delta(), total[n], atol=1e-5) for n in WEIGHTS)
        answers = asked(
            model,
            Change("cat", model.base_fingerprint, change),
            [Instance(0, (q,)) for q in (*law, *film)],
            wording=WORDING,
        )
        assert found.cross_entropy == pytest.approx(-likelihoods(answers).mean(), abs=1e-4)
        right = {d: float(r.mean()) for d, r in right_by_domain(answers).items()}
        assert Mixture(given, ground, 100, 0).mean(found.right).tolist() == pytest.approx([right["law"], right["film"]])


def test_the_gradient_of_a_mixture_is_that_of_differences(model, law, film):
    given = [adapter(model, "a", steps(model, (law, 1.0))), adapter(model, "b", steps(model, (film, 1.0)))]
    mixture = Mixture(given, grounds(model, {"law": law, "film": film}), 100, 0)
    w = torch.tensor([0.3, -0.2], requires_grad=True)
    mixture.ask(w, lambda rows, likely: -likely.sum() / len(mixture.domain))
    for i in range(2):
        up, down = w.detach().clone(), w.detach().clone()
        up[i], down[i] = up[i] + 1e-2, down[i] - 1e-2
        slope = (mixture.ask(up).cross_entropy - mixture.ask(down).cross_entropy) / 2e-2
        assert float(w.grad[i]) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_a_mixture_takes_so_many_questions_of_a_domain_whatever_their_order(model, law, film):
    mixtures = [Mixture([nothing(model)], grounds(model, {"law": own, "film": film}), 5, 0) for own in (law, law[::-1])]
    assert mixtures[0].sizes.tolist() == [5, 5]
    assert mixtures[0].ask(torch.ones(1)).cross_entropy == mixtures[1].ask(torch.ones(1)).cross_entropy


def test_a_mixture_of_an_encoder_and_of_too_large_adapters_is_refused(model, tiny, film, towards):
    bert = wrap(*tiny("bert"))
    with pytest.raises(ModelError, match="next token"):
        Mixture([nothing(bert)], grounds(bert, {"film": film}), 5, 0)
    with pytest.raises(UserError, match="no selection question"):
        Mixture([nothing(model)], grounds(model, {"film": []}), 5, 0)
    huge = Mixture([adapter(model, "huge", towards, math.inf)], grounds(model, {"film": film}), 5, 0)
    with pytest.raises(UserError, match="too large"):
        huge.ask(torch.ones(1))


# ---------------------------------------------------------------- lorahub


@pytest.fixture(scope="module")
def opposed(model, film, towards):
    """One adapter that leads to the answers and one that leads away."""
    away = {n: LowRank(-p.left, p.right) for n, p in steps(model, (film[:8], 0.3)).items()}
    return [adapter(model, "to", towards), adapter(model, "away", away)]


def test_lorahub_finds_the_planted_weights(model, film, opposed):
    ground = grounds(model, {"film": film})
    change = make("lorahub").plan(opposed, ground=ground)
    to, away = change.notes["weights"]
    assert to > 0.5 > 0 > away  # a mean could never subtract
    told = change.notes["weighing"]
    mixture = Mixture(opposed, ground, 100, 0)
    grid = [x / 4 for x in range(-6, 7)]
    best = min(
        mixture.ask(torch.tensor(w)).cross_entropy + 0.05 * (abs(w[0]) + abs(w[1])) / 2
        for w in itertools.product(grid, grid)
    )
    assert told["objective"] <= best + 0.01
    assert told["objective"] < told["objective_before"] - 0.05
    assert told["n_evaluations"] <= 40
    json.dumps(change.notes)


def test_lorahub_fuses_as_cat_with_its_weights(model, film, opposed):
    change = make("lorahub", lam=2.0).plan(opposed, ground=grounds(model, {"film": film}))
    weights = change.notes["weights"]
    for name in WEIGHTS:
        wanted = 2 * sum(w * a.parts[name].delta() for w, a in zip(weights, opposed))
        assert torch.allclose(change.parts[name].delta(), wanted, atol=1e-5)
    assert change.method == "lorahub"


@pytest.mark.parametrize("name, quick", [("lorahub", {}), ("bounded", {"n_steps": 8, "n_rounds": 2})])
def test_weighing_is_deterministic_and_streams_what_it_plans(model, law, film, opposed, name, quick):
    ground = grounds(model, {"law": law, "film": film})
    first, second = (make(name, **quick).plan(opposed, ground=ground) for _ in range(2))
    assert first.notes == second.notes
    assert all(torch.equal(first.parts[n].left, second.parts[n].left) for n in WEIGHTS)
    streamed = dict(stream(make(name, **quick), opposed, (0.5, 0.5), ground))
    assert all(torch.equal(first.parts[n].left, streamed[n].left) for n in WEIGHTS)


def test_a_larger_penalty_gives_smaller_weights(model, film, opposed):
    ground = grounds(model, {"film": film})
    sizes = [
        sum(map(abs, make("lorahub", penalty=p).plan(opposed, ground=ground).notes["weights"])) for p in (0.0, 3.0)
    ]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("name", ["lorahub", "bounded"])
def test_weighing_needs_questions_and_lets_no_resolver_before_it(model, film, opposed, name):
    with pytest.raises(UserError, match=f"{name} needs questions of the selection split"):
        make(name).plan(opposed)
    with pytest.raises(UserError, match=f"{name} chooses weights"):
        make(name).plan(opposed, ground=grounds(model, {"film": film}), resolver=CRSubspace())
    elsewhere = [opposed[0], Adapter("other", opposed[1].parts, "1" * 64)]
    with pytest.raises(UserError, match="different base models"):
        make(name).plan(elsewhere, ground=grounds(model, {"film": film}))


def test_a_method_that_chooses_its_weights_is_not_tuned(model, film, opposed):
    ground = grounds(model, {"film": film})
    method = make("lorahub", n_evaluations=5)
    rows = torch.zeros(3).numpy()
    found = tune(variants(method), lambda form: form.plan(opposed, ground=ground), lambda change, _: rows, 3)
    assert [t.lam for t in found.tried] == [1.0]


# ---------------------------------------------------------------- bounded


@pytest.fixture(scope="module")
def costly(model, law, film):
    """An adapter that teaches film and takes law, and one that teaches a little of film alone."""
    return [
        adapter(model, "costly", steps(model, (film, 2.0), (law, -1.5))),
        adapter(model, "cheap", steps(model, (film, 0.1))),
    ]


def held(**settings):
    return make("bounded", **{"max_drop": 0.1, "reference": "base", "n_steps": 40} | settings)


def test_bounded_keeps_a_limit_that_the_best_weights_break(model, law, film, costly):
    ground = grounds(model, {"law": law, "film": film})
    free = held(max_drop=1, harm=100, n_rounds=1).plan(costly, ground=ground).notes["weighing"]
    assert free["drop"]["law"] > 0.1
    assert not any(free["multipliers"].values())
    assert free["paying_for"] is None
    change = held().plan(costly, ground=ground)
    told = change.notes["weighing"]
    assert told["holds_on_selection"]
    assert max(told["drop"].values()) <= 0.05
    assert all(told["harm"][d] <= told["harm_allowed"][d] for d in ("law", "film"))
    assert told["cross_entropy"] > free["cross_entropy"]  # the bound has its price
    assert told["paying_for"] == "law" and told["multipliers"]["law"] > 0
    assert told["reference"] == {"law": "base", "film": "base"}
    assert "price" in told["meaning"]
    json.dumps(change.notes)
    alone = [Instance(0, (q,)) for q in (*law, *film)]  # and so says who asks the fused model
    before, after = (right_by_domain(asked(model, c, alone, wording=WORDING)) for c in (None, change))
    for domain, drop in told["drop"].items():
        assert before[domain].mean() - after[domain].mean() == pytest.approx(drop, abs=1e-6)


def test_allowed_harms_are_halved_until_the_drop_is_small(model, law, film, costly):
    told = held(harm=1.0).plan(costly, ground=grounds(model, {"law": law, "film": film})).notes["weighing"]
    assert told["n_rounds"] == 2  # the first is stuck where the law is lost, the second begins nearer the base
    assert told["harm_allowed"]["law"] == 0.5
    assert told["harm"]["law"] <= 0.5 and told["holds_on_selection"]


def test_bounded_says_where_no_weights_keep_the_limit(model, law, film, costly, caplog):
    """The best single adapter is the measure, and no single weighting is as good on both as each alone."""
    sharp = [adapter(model, "film", steps(model, (film, 0.25), (law, -0.5))),
             adapter(model, "law", steps(model, (law, 0.25), (film, -0.5)))]  # fmt: skip
    ground = grounds(model, {"law": law, "film": film})
    with caplog.at_level(logging.WARNING, logger="retouch"):
        told = make("bounded", max_drop=0.01, n_rounds=2, n_steps=10).plan(sharp, ground=ground).notes["weighing"]
    assert told["reference"]["film"] == "adapter film"
    assert not told["holds_on_selection"]
    assert told["n_rounds"] == 2
    assert "found no weights that keep" in caplog.text
    assert max(told["multipliers"].values()) > 0


def test_weights_stay_in_their_box(model, film, opposed):
    change = make("bounded", box=0.4, n_steps=15, reference="base").plan(opposed, ground=grounds(model, {"film": film}))
    assert max(map(abs, change.notes["weights"])) <= 0.4


def test_a_weight_for_each_module_undoes_what_one_weight_cannot(model, film, towards):
    """An adapter that helps in one matrix and harms in another."""
    helps, harms = WEIGHTS
    parts = {helps: towards[helps], harms: LowRank(-towards[harms].left, towards[harms].right)}
    other = {helps: towards[helps]}  # changes one of the two alone
    given = [adapter(model, "mixed", parts), adapter(model, "half", other, 0.1)]
    ground, how = grounds(model, {"film": film}), {"max_drop": 1.0, "reference": "base", "n_steps": 20, "n_rounds": 1}
    one = make("bounded", **how).plan(given, ground=ground)
    each = make("bounded", per="module", **how).plan(given, ground=ground)
    assert "weights_of" not in one.notes
    assert each.notes["weighing"]["cross_entropy"] < one.notes["weighing"]["cross_entropy"] - 0.01
    own = each.notes["weights_of"]
    assert set(own) == set(WEIGHTS) and own[helps][0] > 0.5 > 0 > own[harms][0]
    assert each.notes["weights"] == pytest.approx([sum(column) / 2 for column in zip(*own.values())])
    json.dumps(each.notes)
    wanted = sum(w * a.parts[helps].delta() for w, a in zip(own[helps], given))
    assert torch.allclose(each.parts[helps].delta(), wanted, atol=1e-5)
    assert torch.allclose(each.parts[harms].delta(), own[harms][0] * parts[harms].delta(), atol=1e-5)
    streamed = dict(make("bounded", per="module", **how).stream(given, [0.5, 0.5], ground))
    assert torch.equal(streamed[harms].delta(), each.parts[harms].delta())


def test_equal_weights_in_all_modules_are_one_weight(model, law, film):
    given = [adapter(model, "law", steps(model, (law, 1.0))), adapter(model, "film", steps(model, (film, -1.5)))]
    mixture, w = Mixture(given, grounds(model, {"law": law, "film": film}), 100, 0), torch.tensor([0.7, -0.4])
    assert set(mixture.modules) == set(WEIGHTS)
    assert torch.equal(mixture.ask(w).likely, mixture.ask(w.expand(2, -1)).likely)
    uneven = mixture.ask(torch.tensor([[0.7, -0.4], [0.0, 0.0]])).likely
    first = [adapter(model, a.name, {n: p for n, p in a.parts.items() if n == mixture.modules[0]}) for a in given]
    assert torch.allclose(
        uneven, Mixture(first, grounds(model, {"law": law, "film": film}), 100, 0).ask(w).likely, atol=1e-5
    )
