import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch

from retouch.bound import Multiplier
from retouch.errors import SettingsError, UserError
from retouch.model import wrap
from retouch.recommend import harm
from retouch.recommend._draws import LAGS, Asked, Epoch, Pool, partners
from retouch.recommend._duality import Duality
from retouch.recommend._fitting import _plan, _pool, build
from retouch.recommend._watch import SILENT, Watch
from retouch.recommend.base import Item, Run
from retouch.recommend.continued import Continued
from retouch.recommend.data import Interactions
from retouch.recommend.generator import SIZES, Generator
from retouch.recommend.kar import KAR
from retouch.recommend.lwgr import LWGR
from retouch.recommend.scorer import GenerativeScorer
from retouch.recommend.splits import CERTIFICATE, Samples, split, targets
from retouch.recommend.tokenise import Catalogue
from retouch.registry import find

N_ITEMS, N_HISTORY = 24, 6
SMALL = {
    "n_books": 2, "n_codewords": 4, "d_code": 8, "n_alone": 1, "n_epochs": 2, "batch_size": 64, "warm_up_steps": 2,
    "learning_rate": 3e-3, "learning_rate_new": 1e-2, "cuts_per_epoch": 1, "text_cache_mib": 4, "n_validation": 40,
    "validation_beams": 10, "beams": 24,
}  # fmt: skip


def interactions(seed=0, n_users=130, lengths=None):
    g = np.random.default_rng(seed)
    histories = []
    n_users = n_users if lengths is None else len(lengths)
    for user in range(n_users):
        length = int(g.integers(5, 15)) if lengths is None else lengths[user]
        near = (user % 4) * 6 + 1 + g.integers(0, 6, size=length)
        stray = g.integers(1, N_ITEMS + 1, size=len(near))
        histories.append(np.where(g.random(len(near)) < 0.7, near, stray).astype(np.int32))
    items = tuple(Item(f"i{i}", f"Title {i} of kind {(i - 1) // 6}", f"Title {i}") for i in range(1, N_ITEMS + 1))
    users = tuple(f"u{u}" for u in range(n_users))
    return Interactions("toy", users, items, tuple(histories), None, f"toy-{seed}")


@pytest.fixture(scope="module")
def world(tiny):
    data = interactions()
    codes = np.stack([(np.arange(N_ITEMS) // 6), np.arange(N_ITEMS) % 6 // 2, np.arange(N_ITEMS) % 2], 1)
    catalogue = Catalogue.of(codes, (4, 4, 4))
    torch.manual_seed(5)
    reference = Generator(SIZES["tiny"], torch.from_numpy(catalogue.codes.copy()), catalogue.sizes, N_HISTORY).eval()
    return Run(data, split(data), catalogue, None, reference.requires_grad_(False), wrap(*tiny("llama")), N_HISTORY)


def training(run, method, place=None, **changes):
    """What `LWGR.fit` builds, one part at a time; all is trained at once unless `n_alone` is among the changes."""
    settled = method.settled()
    torch.manual_seed(0)
    policy = build(method, run)
    pool = _pool(method, settled, run)
    asked = Asked(run.data, run.splits, N_HISTORY)
    rest = (run.reference, run.data, run.catalogue, method.harm, settled.slack)
    watched = Watch(pool.samples if settled.constraint == "batch" else run.splits.constraint, *rest)
    plan = dataclasses.replace(_plan(method, settled, run, pool), **{"n_alone": 0} | changes)
    judges = Watch(run.splits.valid.take(slice(0, 40)), *rest)
    return Duality(policy, plan, pool, asked, watched, judges, run.catalogue, place, "key")


def batch_of(duality, n=40, silent=False):
    rows = np.arange(min(n, len(duality.pool)))
    return Epoch(rows, np.zeros(len(rows), np.int64), np.full(len(rows), silent))


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def shaken(policy, by=0.3, seed=1):
    """Let knowledge say something, and move the generator a little."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (policy.fusion.out.weight, policy.generator.heads):
            p += by * torch.randn(p.shape, generator=g) * (1.0 if p.shape[0] == p.shape[1] else 0.3)
    return policy


# ------------------------------------------------ the start


@pytest.mark.parametrize(
    "method",
    [
        LWGR(**SMALL), LWGR(instruction="continuous", **SMALL), LWGR(instruction="global", **SMALL),
        LWGR(instruction="prompt", **SMALL), LWGR(order="prefix", titles="tokens", **SMALL), KAR(**SMALL),
        Continued(**SMALL),
    ],
    ids=["codebooks", "continuous", "global", "prompt", "prefix", "kar", "continued"],
)  # fmt: skip
def test_the_first_policy_is_the_reference_and_harms_nobody(world, method):
    duality = training(world, method)
    samples = world.splits.test
    residual = duality.policy.residuals(duality.asked.windows(samples))
    assert residual.shape == (len(samples), 32) and not residual.any()
    for knows in (residual, None):
        assert not duality.judges.measure(duality.policy.generator, knows).any(), "exactly zero"
    policy = GenerativeScorer(duality.policy.generator, world.catalogue, world.data)
    reference = GenerativeScorer(world.reference, world.catalogue, world.data)
    np.testing.assert_array_equal(policy.log_likelihood(samples), reference.log_likelihood(samples))


def test_the_published_form_begins_away_from_the_reference(world):
    duality = training(world, LWGR(preset="paper", **SMALL))
    residual = duality.policy.residuals(duality.asked.windows(world.splits.valid.take(slice(0, 40))))
    assert duality.judges.measure(duality.policy.generator, residual).mean() > 1e-3


def test_gradients_reach_all_that_is_trained_and_no_more(world):
    duality = training(world, LWGR(**SMALL))
    shaken(duality.policy)
    loss, *_ = duality.objective(batch_of(duality), duality._constrained(batch_of(duality), np.random.default_rng(0)))
    loss.backward()
    without = {n for n, p in duality.policy.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert without == set()
    assert all(p.grad is None for p in world.reference.parameters())
    assert all(p.grad is None for p in world.model.network.parameters())


# ------------------------------------------------ the Lagrangian


def test_the_constraint_on_the_batch_is_a_weight_on_violated_targets(world):
    """The Lagrangian's gradient is that of cross-entropy with weights (L + price [h > 0]) / L."""
    method = LWGR(preset="paper", slack=0.0, price=0.7, knowledge="none", **SMALL)
    duality = training(world, method)
    for module in duality.policy.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    with torch.no_grad():
        duality.policy.generator.heads += 0.5 * torch.randn(
            duality.policy.generator.heads.shape, generator=torch.Generator().manual_seed(2)
        )
    batch = batch_of(duality)
    loss, harms, _, _ = duality.objective(batch, {"all": batch.rows})
    loss.backward()
    fast = {n: p.grad.clone() for n, p in duality.policy.named_parameters()}
    duality.policy.zero_grad()
    watch, levels = duality.watched, world.reference.n_levels
    rows = torch.from_numpy(batch.rows)
    scores = duality.policy.code_log_probs(watch.windows[rows], watch.targets[rows])
    violated = (watch.before[rows, 0] - scores.sum(1)).detach() / levels > 0
    assert 0.2 < violated.float().mean() < 0.9 and harms["all"] > 0.01
    weights = (levels + 0.7 * violated) / levels
    (-(weights * scores.sum(1)).mean()).backward()
    for name, p in duality.policy.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, rtol=2e-3, atol=2e-5)


def test_the_constraint_is_measured_without_dropout(world):
    duality = training(world, LWGR(**SMALL))
    shaken(duality.policy)
    duality.policy.train()
    drawn = duality._constrained(batch_of(duality), np.random.default_rng(0))
    one, two = (duality.objective(batch_of(duality), drawn) for _ in range(2))
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1]) and set(one[1]) == {
        "sparse",
        "active",
        SILENT,
    }
    assert one[3] != two[3], "cross-entropy has dropout"
    with_dropout = duality.watched
    duality.policy.train()
    with torch.no_grad():
        harms = [float(with_dropout.harm(duality.policy.generator, torch.arange(5), None).mean()) for _ in range(2)]
    assert harms[0] != harms[1], "with it the same measurement would not repeat"


def test_a_quarter_of_the_watched_targets_is_without_knowledge_and_groups_are_balanced(world):
    duality = training(world, LWGR(**SMALL))
    drawn = duality._constrained(batch_of(duality, 64), np.random.default_rng(0))
    assert {name: len(rows) for name, rows in drawn.items()} == {"sparse": 6, "active": 6, SILENT: 4}
    for name in ("sparse", "active"):
        assert set(drawn[name]) <= set(duality.groups[name])
    shaken(duality.policy)
    harms = duality.objective(batch_of(duality), drawn)[1]
    alone = duality.watched.harm(duality.policy.generator.eval(), torch.from_numpy(drawn[SILENT]), None).mean()
    torch.testing.assert_close(harms[SILENT], alone)


def test_prices_follow_the_rule_and_absent_groups_keep_theirs(world):
    duality = training(world, LWGR(price_step=0.05, price_damping=0.1, **SMALL))
    unhurried = training(world, LWGR(**{**SMALL, "n_epochs": 800})).prices["active"]
    assert (unhurried.step_size, unhurried.damping) == pytest.approx((0.05 / 0.03, 0.1 / 0.03))
    price, ema, limit = 0.05, None, 0.03
    for harm_now in (0.09, 0.0, 0.2, 0.03):
        duality._move_prices({"active": torch.tensor(harm_now)})
        old, ema = ema, harm_now if ema is None else 0.9 * ema + 0.1 * harm_now
        price += 0.05 * (ema / limit - 1) + (0.0 if old is None else 0.1 * (ema - old) / limit)
        price = min(16.0, max(0.0, price))
        assert duality.prices["active"].value == pytest.approx(price, rel=1e-5)
    assert duality.prices["sparse"].value == 0.05 == duality.prices[SILENT].value
    paper = training(world, LWGR(preset="paper", knowledge="none", **SMALL))
    paper._move_prices({"all": torch.tensor(0.07)})
    assert paper.prices["all"].value == pytest.approx(0.05 + 5e-4 * (0.07 - 1e-4), rel=1e-6)


def test_a_fixed_price_stays_and_none_has_no_constraint(world):
    fixed = training(world, LWGR(constraint="fixed", price=0.5, **SMALL))
    fixed._move_prices({"active": torch.tensor(3.0)})
    assert [price.value for price in fixed.prices.values()] == [0.5] * 3
    none = training(world, LWGR(constraint="none", **SMALL))
    assert none._constrained(batch_of(none), np.random.default_rng(0)) == {} and none.prices == {}
    loss, harms, _, own = none.objective(batch_of(none), {})
    assert harms == {} and loss.item() > own


@pytest.mark.parametrize("kind", ["hinge", "margin", "kl"])
def test_harms_by_hand(world, kind):
    duality = training(world, LWGR(harm=kind, slack=0.01, **SMALL))
    shaken(duality.policy)
    generator, watch, rows = duality.policy.generator.eval(), duality.watched, torch.arange(6)
    with torch.no_grad():
        found = watch.harm(generator, rows, None)
    best = GenerativeScorer(world.reference, world.catalogue, world.data, beams=20).top(watch.windows.numpy(), 20)
    for row in range(6):
        target = int(watch.targets[row])
        items = [target, *(int(i) for i in best[row] if i and (kind == "kl" or i != target))]
        with torch.no_grad():
            now, before = (
                net.code_log_probs(net.encode(watch.windows[row : row + 1]), torch.tensor([items])).sum(-1)[0].double()
                for net in (generator, world.reference)
            )
        if kind == "hinge":
            wanted = (before[0] - now[0]) / 3
        elif kind == "margin":
            wanted = ((before[0] - before[1:].logsumexp(0)) - (now[0] - now[1:].logsumexp(0))) / 3
        else:
            p, q = (torch.cat([s[1:].exp(), 1 - s[1:].exp().sum(0, keepdim=True)]) for s in (before, now))
            wanted = (p * (p / q).log()).sum() / 3
        assert float(found[row]) == pytest.approx(max(0.0, float(wanted) - 0.01), abs=2e-5)
    assert found.max() > 0


def test_margin_forgives_what_happens_to_all_alike():
    before = (torch.tensor([-1.0]), torch.tensor([[-2.0, -3.0, -torch.inf]]))
    after = (before[0] - 0.7, before[1] - 0.7)
    assert float(harm.margin(before, after, 4)) == pytest.approx(0.0, abs=1e-6)
    assert float(harm.hinge(before[0] / 4, after[0] / 4)) == pytest.approx(0.175)
    worse = harm.margin(before, (before[0] - 0.8, before[1]), 4, slack=0.05)
    assert float(worse) == pytest.approx(0.15)
    alone = (before[0], torch.full((1, 2), -torch.inf))
    rivals = alone[1].clone().requires_grad_()
    found = harm.margin(alone, (before[0] - 1, rivals), 4)
    found.sum().backward()
    assert float(found.detach()) == 0 and torch.isfinite(rivals.grad).all()
    assert harm.capped(torch.tensor([0.4, 3.0])).tolist() == pytest.approx([0.4, 1.0])


# ------------------------------------------------ which targets, which histories


def test_an_epoch_draws_cuts_of_every_user_with_the_lags_asked_for(world):
    pool = Pool(world.splits.train, N_HISTORY, 3, True, 0, others=False)
    epoch = pool.epoch(0, 1, 0.15)
    users = pool.samples.users[epoch.rows]
    assert len(set(users)) == len(users) == len(set(world.splits.train.users)) == pool.size(1)
    again = pool.epoch(0, 1, 0.15)
    np.testing.assert_array_equal(epoch.rows, again.rows)
    assert not np.array_equal(epoch.rows, pool.epoch(1, 1, 0.15).rows)
    drawn = np.concatenate([pool.epoch(e, 4, 0.15).lags for e in range(60)])
    shares = [np.mean(drawn == lag) for lag in LAGS[0]]
    assert shares == pytest.approx(LAGS[1], abs=0.05)
    silent = np.concatenate([pool.epoch(e, 4, 0.15).silent for e in range(60)])
    assert silent.mean() == pytest.approx(0.15, abs=0.02)
    assert (
        not pool.epoch(0, 4, 0.0).silent.any()
        and not Pool(world.splits.train, 6, 3, False, 0).epoch(0, 4, 0, spoken=True).lags.any()
    )


def test_of_long_histories_a_few_cuts_are_read_with_one_lag_each(world):
    train = world.splits.train
    pool = Pool(train, N_HISTORY, 3, True, 0)
    longest = {u: train.cuts[train.users == u].max() for u in set(train.users)}
    for user, most in longest.items():
        rows = (pool.samples.users == user) & pool.read
        wanted = min(3, (train.users == user).sum()) if most > N_HISTORY else (train.users == user).sum()
        assert rows.sum() == wanted and (
            (pool.lags[rows] >= 0).all() if most > N_HISTORY else (pool.lags[rows] < 0).all()
        )
    assert Pool(train, N_HISTORY, 0, True, 0).read.all()
    few = Pool(train, N_HISTORY, 3, True, 0, others=False)
    np.testing.assert_array_equal(few.samples.cuts, train.cuts[pool.read])
    np.testing.assert_array_equal(few.lags, pool.lags[pool.read])


def test_no_target_is_lost_where_a_language_model_is_asked_for_few(world):
    """The cuts that it does not read are trained on without knowledge, and new parts alone on none of them."""
    pool = Pool(world.splits.train, N_HISTORY, 2, True, 0)
    assert len(pool) == len(world.splits.train) > pool.read.sum()
    epochs = [pool.epoch(e, 4, 0.0) for e in range(60)]
    assert set(np.concatenate([epoch.rows for epoch in epochs])) == set(range(len(pool)))
    for epoch in epochs[:5]:
        np.testing.assert_array_equal(epoch.silent, ~pool.read[epoch.rows])
        assert len(epoch.rows) == pool.size(4) and np.bincount(pool.samples.users[epoch.rows]).max() == 4
    alone = pool.epoch(0, 4, 0.0, spoken=True)
    assert pool.read[alone.rows].all() and not alone.silent.any() and len(alone.rows) == pool.size(4, spoken=True)


@pytest.mark.parametrize(
    ("how", "all_read", "n"),
    [
        ({"knowledge": "none"}, True, 1),
        ({"knowledge": "text"}, True, 1),
        ({}, False, 1),
        ({"preset": "paper"}, True, 0),
    ],
    ids=["none", "text", "llm", "paper"],
)
def test_only_a_language_model_is_spared_targets(world, how, all_read, n):
    method = LWGR(cuts_pool=2, **how, **SMALL)
    pool = _pool(method, method.settled(), world)
    assert pool.read.all() == all_read
    assert (len(pool) == len(world.splits.train)) == bool(n)


def test_late_knowledge_is_an_earlier_prefix_of_at_least_one_item(world):
    asked, samples = (
        Asked(world.data, world.splits, N_HISTORY),
        Samples(np.array([3, 3], np.int32), np.array([5, 2], np.int32)),
    )
    history = world.data.histories[2]
    for lag in (0, 2, 4):
        rows = asked.windows(samples, lag)
        np.testing.assert_array_equal(rows[0][rows[0] > 0], history[: max(5 - lag, 1)])
        np.testing.assert_array_equal(rows[1][rows[1] > 0], history[: max(2 - lag, 1)])


def test_partners_are_other_users_of_the_same_role(world):
    other = partners(world.splits, world.data.lengths, 0)
    numbers = np.arange(1, len(other) + 1)
    assert (other != numbers).all() and sorted(other) == numbers.tolist()
    certified = world.splits.roles == CERTIFICATE
    np.testing.assert_array_equal(certified[other - 1], certified)
    assert not np.array_equal(other, partners(world.splits, world.data.lengths, 1))
    asked = Asked(world.data, world.splits, N_HISTORY, other)
    rows = asked.windows(world.splits.valid)
    for row, user in zip(rows, world.splits.valid.users):
        theirs = world.data.histories[other[user - 1] - 1][:-2]
        np.testing.assert_array_equal(row[row > 0], theirs[-N_HISTORY:])


def test_a_partners_window_is_as_full_as_ones_own():
    """With partners drawn at random, a quarter of the windows of MovieLens would hold one item."""
    chance = np.random.default_rng(0)
    data = interactions(lengths=np.round(5 + chance.lognormal(3, 1, 200)).astype(int))
    splits = split(data)
    own, other = (
        (Asked(data, splits, 20, partner).windows(splits.train) > 0).sum(1)
        for partner in (None, partners(splits, data.lengths, 0))
    )
    assert np.mean(other == 1) < 1.2 * np.mean(own == 1) + 0.01
    assert np.mean(np.abs(own - other) <= 2) > 0.9


def test_knowledge_and_score_do_not_look_ahead(world):
    duality = training(world, LWGR(**SMALL))
    shaken(duality.policy)
    changed = [h.copy() for h in world.data.histories]
    for history in changed:
        history[4:] = history[4:] % N_ITEMS + 1
    later = dataclasses.replace(world.data, histories=tuple(changed))
    samples = Samples(np.arange(1, 21, dtype=np.int32), np.full(20, 4, np.int32))
    one, two = (Asked(data, world.splits, N_HISTORY).windows(samples) for data in (world.data, later))
    assert not np.array_equal(targets(world.data, samples), targets(later, samples))
    assert torch.equal(duality.policy.residuals(one), duality.policy.residuals(two))


# ------------------------------------------------ the new parts first, then all


def test_new_parts_are_trained_alone_before_anything_moves_the_generator(world):
    method = LWGR(**SMALL)
    duality = training(world, method, n_alone=2)
    before = {n: p.clone() for n, p in duality.policy.named_parameters()}
    duality._judge(duality._epoch())
    duality._advance()
    after = dict(duality.policy.named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved >= {"fusion.out.weight", "instructions.words"} and not any(n.startswith("generator.") for n in moved)
    row = duality.at.epochs[0]
    assert row["alone"] and row["harm"][SILENT] == 0 and -1 not in [step[1][1] for step in duality.steps]
    duality._judge(duality._epoch())
    best = {n: v.clone() for n, v in duality.best.items()}
    duality._advance()
    assert not duality.at.alone and (duality.at.begun_epoch, duality.at.begun_step) == (2, duality.at.step)
    assert equal(duality.policy.state_dict(), best), "all is trained from the best epoch on"
    peaks = {group["peak"] for group in duality.optimizer.param_groups}
    assert peaks == {method.learning_rate, method.learning_rate_new / 10}
    duality._epoch()
    assert not equal(duality.policy.generator.state_dict(), world.reference.state_dict())


def test_the_frozen_generator_keeps_its_dropout(world):
    """What it has learnt by heart would be no lesson for the new parts; without dropout those targets cost less."""
    duality = training(world, LWGR(**SMALL), n_alone=2)
    batch = batch_of(duality)
    one, two = (duality.objective(batch, {})[3] for _ in range(2))
    assert one != two
    for module in duality.policy.generator.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    assert duality.objective(batch, {})[3] == duality.objective(batch, {})[3]


def test_knowledge_that_does_not_come_ends_the_first_part_early(world):
    duality = training(world, LWGR(**SMALL), n_alone=100, patience=2)
    warm = -(-duality.n_warm_up // duality._lengths[True])
    duality.best = {n: v.clone() for n, v in duality.policy.state_dict().items()}
    duality.at.chosen_epoch = 1
    for duality.at.epoch in range(1, warm + 2):
        duality._advance()
        assert duality.at.alone, "patience counts from the end of the warm-up"
    duality.at.epoch = warm + 2
    duality._advance()
    assert not duality.at.alone and not duality.at.done


def test_without_new_parts_all_is_trained_at_once_and_as_long(world):
    duality = training(world, Continued(**SMALL), n_alone=5)
    both = training(world, LWGR(knowledge="none", **SMALL))
    assert not duality.at.alone and duality.n_steps == both.n_steps
    assert LWGR(preset="paper").settled().n_alone == 0 < LWGR().settled().n_alone


def test_the_warm_up_is_a_twentieth_at_most_and_patience_begins_behind_it(world):
    duality = training(world, Continued(**{**SMALL, "warm_up_steps": 200}), n_epochs=40, patience=1)
    steps = duality._lengths[False]
    assert duality.n_warm_up == 2 * steps < 200
    done = {}
    for epoch in (2, 3):
        duality.at.epoch, duality.at.chosen_epoch = epoch, 1
        duality._advance()
        done[epoch] = duality.at.done
    assert done == {2: False, 3: True}
    assert training(world, Continued(**SMALL), n_epochs=400).n_warm_up == SMALL["warm_up_steps"]


def test_a_short_training_moves_its_prices_in_time(world):
    """A harm of two limits raises the price to that of the recommender's own loss within an eighth of the steps."""
    method = LWGR(**{**SMALL, "n_epochs": 100})
    duality = training(world, method)
    assert 100 < duality.n_steps < 800
    for _ in range(duality.n_steps // 8):
        duality._move_prices({"active": torch.tensor(0.06)})
    assert duality.prices["active"].value > world.reference.n_levels
    own = training(world, LWGR(price_step=0.05, **{**SMALL, "n_epochs": 100})).prices["active"]
    assert own.step_size == pytest.approx(0.05 / 0.03), "what is asked for is done"


def test_an_epoch_is_judged_by_how_likely_the_true_items_became(world):
    duality = training(world, LWGR(**SMALL))
    shaken(duality.policy)
    duality._judge(0.0)
    knows = duality.policy.residuals(duality.asked.windows(duality.judges.samples))
    now = GenerativeScorer(
        duality.policy.generator, world.catalogue, world.data, residuals=lambda part: knows
    ).log_likelihood(duality.judges.samples)
    before = GenerativeScorer(world.reference, world.catalogue, world.data).log_likelihood(duality.judges.samples)
    wanted = float(np.mean(now - before)) / world.reference.n_levels
    assert duality.at.epochs[0]["gain"] == pytest.approx(wanted, abs=1e-5) == duality.at.chosen_gain
    duality.at.chosen_gain = -0.1
    duality._conclude()
    assert any("No epoch within the limit made the true items" in note for note in duality.at.notes)


def test_a_constraint_without_anybody_to_watch_is_said_before_any_work(world):
    splits = dataclasses.replace(world.splits, constraint=world.splits.constraint.take(slice(0, 0)))
    run = dataclasses.replace(world, splits=splits)
    for constraint in ("slice", "fixed"):
        with pytest.raises(UserError, match="None of the 130 users of toy is kept back for the constraint"):
            LWGR(constraint=constraint, **SMALL).fit(run)
    assert Continued(constraint="none", **SMALL).fit(run).record["chosen_epoch"] >= 1


# ------------------------------------------------ whole trainings


def test_a_fit_learns_records_and_serves(world, caplog):
    with caplog.at_level(logging.WARNING):
        fitted = LWGR(**{**SMALL, "n_epochs": 4, "batch_size": 32}).fit(world)
    record, samples = fitted.record, world.splits.test
    assert [(row["epoch"], row["alone"]) for row in record["epochs"]] == [
        (1, True), (2, False), (3, False), (4, False), (5, False),
    ]  # fmt: skip
    assert record["epochs"][-1]["loss"] < record["epochs"][1]["loss"]
    assert set(record["history"]) == {"sparse", "active", SILENT}
    assert all(len(h["price"]) == record["step"] for h in record["history"].values())
    assert any("cannot be certified with" in note for note in record["notes"]) and record["notes"][0] in caplog.text
    books = record["epochs"][-1]["books"]
    assert len(books) == 2 and all(0 < book["used"] <= 1 and 0 < book["perplexity"] <= 1 for book in books)
    assert record["chosen_epoch"] >= 1 and record["settled"]["max_harm"] == 0.03
    fusion = fitted.policy.fusion
    assert fusion.mean.any() and (fusion.std != 1).all() and fusion.middle.any(), "knowledge was measured"
    assert fitted.residual_table(samples).abs().sum() > 0
    ranks = fitted.ranks(samples)
    assert ranks.min() >= 1 and fitted.top(np.zeros((1, N_HISTORY), np.int32), 5).shape == (1, 5)
    stale, none = fitted.at_lag(4), fitted.without_knowledge()
    scores = [s.log_likelihood(samples) for s in (fitted, stale, none)]
    assert not np.allclose(scores[0], scores[1]) and not np.allclose(scores[0], scores[2])
    assert fitted.policy.knowledge_tensors().keys() >= {"fusion.out.weight", "instructions.words", "instructions.mean"}
    assert not any(name.startswith("generator.") for name in fitted.policy.knowledge_tensors())


def test_the_multiplier_lowers_the_harm_that_training_on_does(world):
    """A trained reference that is trained on at high rates forgets; the watched slice forgets less under a price."""
    how = {**SMALL, "cuts_per_epoch": 2, "learning_rate": 1e-2}
    start = training(world, Continued(constraint="none", **how), n_epochs=20)
    for _ in range(12):
        start._epoch()
    reference = copy.deepcopy(start.policy.generator).eval().requires_grad_(False)
    run, harms = dataclasses.replace(world, reference=reference), {}
    for constraint in ("none", "slice"):
        method = Continued(constraint=constraint, max_harm=0.02, price_step=0.5, **how)
        duality = training(run, method, n_epochs=20)
        for _ in range(10):
            duality._epoch()
        harms[constraint] = float(duality.watched.measure(duality.policy.generator, None).mean())
    assert harms["none"] > 0.02 and harms["slice"] < 0.7 * harms["none"], harms


def test_an_interrupted_training_ends_with_the_same_bits(world, tmp_path):
    method = LWGR(**{**SMALL, "n_epochs": 3, "batch_size": 32})
    whole = method.fit(world)
    run = dataclasses.replace(world, folder=tmp_path)
    saved = []
    original = Duality._save

    def stop_after_two(self):
        original(self)
        saved.append(self.at.epoch)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Duality, "_save", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            method.fit(run)
    torch.manual_seed(99)  # the caller's generator plays no part
    resumed = method.fit(run)
    assert equal(resumed.policy.state_dict(), whole.policy.state_dict())
    drop = {"seconds", "notes"}
    assert {k: v for k, v in resumed.record.items() if k not in drop} == {
        k: v for k, v in whole.record.items() if k not in drop
    }
    again = method.fit(run)
    assert equal(again.policy.state_dict(), whole.policy.state_dict()) and saved == [1, 2]
    other = dataclasses.replace(method, max_harm=0.5).fit(run)
    assert not equal(other.policy.state_dict(), whole.policy.state_dict()), "other settings, another folder"


def test_a_seed_repeats_and_the_callers_random_numbers_are_left(world):
    method = Continued(**{**SMALL, "n_epochs": 1})
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    one = method.fit(world)
    assert torch.equal(torch.rand(1), wanted)
    assert equal(one.policy.state_dict(), method.fit(world).policy.state_dict())
    assert not equal(
        one.policy.state_dict(), Continued(**{**SMALL, "n_epochs": 1, "seed": 1}).fit(world).policy.state_dict()
    )


def test_users_of_the_certificate_and_later_targets_leave_no_trace(world):
    """Randomised histories of certificate users, and other validation and test targets, change no trained weight."""
    method = LWGR(**{**SMALL, "n_epochs": 1})
    g = np.random.default_rng(4)
    changed = [h.copy() for h in world.data.histories]
    for history, role in zip(changed, world.splits.roles):
        if role == CERTIFICATE:
            history[:] = g.integers(1, N_ITEMS + 1, len(history))
        history[-1] = history[-1] % N_ITEMS + 1
    other = dataclasses.replace(world.data, histories=tuple(changed))
    run = dataclasses.replace(world, data=other, splits=split(other))
    one, two = method.fit(world), method.fit(run)
    assert equal(one.policy.state_dict(), two.policy.state_dict())
    judged = [h.copy() for h in changed]
    for history in judged:
        history[-2] = history[-2] % N_ITEMS + 1
    third = dataclasses.replace(world.data, histories=tuple(judged))
    last = method.fit(dataclasses.replace(world, data=third, splits=split(third)))
    assert equal(last.policy.state_dict(), one.policy.state_dict()), "one epoch: there is no choice to make"


def test_the_epoch_that_is_kept(world):
    duality = training(world, LWGR(**SMALL))
    rows = [(0.30, 0.09), (0.20, 0.05), (-0.10, 0.02), (0.15, 0.01), (0.90, 0.04), (0.12, 0.0)]
    kept = []
    for epoch, (gain, worst) in enumerate(rows, 1):
        if duality._is_better(gain, worst):
            duality.at.chosen_epoch, duality.at.chosen_gain, duality.at.chosen_harm = epoch, gain, worst
            duality.at.chosen_is_feasible = worst <= 0.03
            kept.append(epoch)
    assert kept == [1, 2, 3, 4], "the least harmful, then the best within the limit"


def test_a_limit_that_cannot_be_met_is_said(world):
    fitted = LWGR(**{**SMALL, "max_harm": 1e-6, "price_maximum": 0.06, "n_epochs": 1, "batch_size": 32}).fit(world)
    notes = " ".join(fitted.record["notes"])
    assert "No epoch kept the harm of validation users within 1e-06" in notes
    assert "The limit cannot be met for group" in notes and "stood at 0.06" in notes


@pytest.mark.parametrize(
    "method",
    [
        LWGR(preset="paper", **SMALL), LWGR(knowledge="shuffled", titles_shuffled=True, **SMALL),
        LWGR(knowledge="shuffled_evaluation", instruction="continuous", **SMALL),
        LWGR(instruction="prompt", constraint="fixed", harm="margin", **SMALL), KAR(harm="kl", **SMALL),
        LWGR(instruction="global", n_llm_layers=1, gate=False, constraint="none", llm_text="text", **SMALL),
    ],
    ids=["paper", "shuffled", "shuffled-evaluation", "prompt", "kar", "global"],
)  # fmt: skip
def test_every_switch_trains(world, method):
    fitted = dataclasses.replace(method, choice="best", learning_rate=3e-2).fit(world)
    assert np.isfinite(fitted.log_likelihood(world.splits.test)).all()
    assert not equal(fitted.policy.generator.state_dict(), world.reference.state_dict())
    assert fitted.residual_table(world.splits.test).abs().sum() > 0


def test_text_vectors_alone_need_no_language_model(world, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(N_ITEMS, 12)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    method = LWGR(knowledge="text", text_vectors=str(tmp_path / "v.npy"), **SMALL)
    fitted = method.fit(dataclasses.replace(world, model=None))
    assert fitted.residual_table(world.splits.test).abs().sum() > 0
    assert fitted.policy.knowledge_tensors()["source_part.positions"].abs().sum() > 0
    with pytest.raises(UserError, match="one row for each of 24 items"):
        np.save(tmp_path / "v.npy", vectors[1:])
        method.fit(world)


def test_kar_reads_each_history_once(world):
    duality = training(world, KAR(**SMALL))
    source = duality.policy.source
    windows = duality.asked.windows(world.splits.train)
    source.prepare(windows)
    calls = source._source[0].llm.register_forward_pre_hook(lambda *_: pytest.fail("read again"))
    duality.policy.residuals(windows)
    calls.remove()
    states = source.states(torch.zeros(2, 1, 32), torch.from_numpy(windows[:2])).states
    prompt = source._tokens
    known = source._source[0].states(prompt.expand(1, -1, -1), torch.from_numpy(windows[:1]))
    torch.testing.assert_close(
        states[0, 0], source.adaptor(known.states[0][known.mask[0]].mean(0)), rtol=1e-4, atol=1e-5
    )


def test_presets_and_own_values():
    paper = LWGR(preset="paper").settled()
    assert (paper.constraint, paper.slack, paper.max_harm, paper.price_maximum) == ("batch", 1e-4, 1e-4, None)
    assert (paper.order, paper.context, paper.residual, paper.gate, paper.fusion_layers) == (
        "prefix", "policy", False, False, 3,
    )  # fmt: skip
    assert not paper.lagged and paper.knowledge_dropout == 0
    mixed = LWGR(preset="paper", order="suffix", residual=True, slack=0.0).settled()
    assert (mixed.order, mixed.residual, mixed.slack, mixed.context) == ("suffix", True, 0.0, "policy")
    assert KAR().settled().order == "prefix" and Continued().knowledge == "none"
    with pytest.raises(SettingsError, match="max_harm"):
        LWGR(max_harm=0.0)
    for name in ("lwgr", "continued", "kar"):
        assert find("recommend", name).source


def test_what_is_missing_is_named(world):
    for part, words in (("reference", "fitted reference"), ("model", "language model"), ("catalogue", "items' codes")):
        with pytest.raises(UserError, match=words):
            LWGR(**SMALL).fit(dataclasses.replace(world, **{part: None}))


def test_the_multiplier_of_a_group_is_the_cores(world):
    assert all(isinstance(price, Multiplier) for price in training(world, LWGR(**SMALL)).prices.values())
