import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from retouch import bound, store
from retouch.errors import BoundRefused, StoreError, UserError
from retouch.recommend.base import Item, Run
from retouch.recommend.certificate import Certified, Terms, certify, recompute, require
from retouch.recommend.data import Interactions
from retouch.recommend.evidence import Evidence, collect, slice_key
from retouch.recommend.popularity import Popularity
from retouch.recommend.splits import CERTIFICATE, split


def evidence(n=600, loss=0.0, spread=0.05, seed=0, rungs=("fresh",), several=False, **changes):
    g = np.random.default_rng(seed)
    unit = np.sort(np.concatenate([np.arange(n), g.integers(0, n, n // 2)])) if several else np.arange(n)
    before = -2 - g.random(len(unit))
    ranks = g.integers(1, 40, len(unit))
    fields = {
        "users": g.integers(0, 256, (n, 8), dtype=np.uint8), "unit": unit,
        "segments": {"sparse": unit % 3 == 0, "active": unit % 3 != 0, "tail": g.random(len(unit)) < 0.2,
                     "new": np.zeros(len(unit), bool)},
        "before": before,
        "after": {r: before - loss * (i + 1) + spread * g.normal(size=len(unit)) for i, r in enumerate(rungs)},
        "rank_before": ranks,
        "rank_after": {r: np.maximum(1, ranks + g.integers(-4, 4, len(unit))) for r in rungs},
        "n_levels": 4,
    }  # fmt: skip
    return Evidence(**fields | changes)


TERMS = Terms(limit=0.05)


# ------------------------------------------------ bounds and verdicts


def test_a_line_by_hand():
    found = evidence(several=True)
    line = certify(found, TERMS).line()
    raw = np.maximum(found.before - found.after["fresh"], 0)
    x = np.array([np.minimum(raw, 1)[found.unit == u].mean() for u in range(600)])
    alpha = 0.05 / 2 / 3  # the first attempt has half, and three segments share it
    assert line.n == 600 and line.mean == pytest.approx(x.mean())
    assert line.upper == bound.upper_bound(x, confidence=1 - alpha) >= line.mean
    assert line.lower == 1 - bound.upper_bound(1 - x, confidence=1 - alpha) <= line.mean
    assert line.verdict == "kept" and line.capped == 0


@pytest.mark.parametrize(
    ("loss", "n", "verdict"), [(0.0, 600, "kept"), (0.2, 600, "refused"), (0.03, 120, "undecided"), (0.0, 40, "undecided")]
)  # fmt: skip
def test_verdicts(loss, n, verdict):
    certified = certify(evidence(n, loss), TERMS)
    assert certified.line().verdict == verdict and certified.holds == (verdict == "kept")
    if verdict == "kept":
        require(certified)
        assert "within the limit of 0.05" in certified.sentence()
    else:
        with pytest.raises(BoundRefused, match="the reference serves") as caught:
            require(certified)
        assert caught.value.exit_code == 3
    if verdict == "undecided":
        needed = certified.line().needed
        assert needed > n and f"about {needed} users would" in certified.sentence()
        assert certify(evidence(3 * needed, loss, seed=5), TERMS).holds


def test_the_cap_holds_the_bound_and_the_uncapped_mean_is_told():
    found = evidence()
    found.after["fresh"][:3] -= 50.0
    line = certify(found, TERMS).line()
    assert line.capped == pytest.approx(3 / 600) and line.mean_uncapped > 0.2 > line.mean
    assert line.upper < 0.05


def test_slack_forgives_and_never_rewards():
    one, two = (certify(evidence(loss=0.1), Terms(0.05, slack=s)).line() for s in (0.0, 0.1))
    assert two.mean < one.mean - 0.05 and two.mean > 0


def test_coverage_of_the_bound():
    """The promise: in at most 5 % of the draws the true mean lies above the bound."""
    g, draws, missed = np.random.default_rng(0), 500, 0
    harms = np.minimum(np.maximum(0, 0.05 * g.normal(size=200_000)), 1)
    for draw in range(draws):
        x = g.choice(harms, 120)
        missed += bound.upper_bound(x, seed=draw) < harms.mean()
    assert missed / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_every_attempt_has_less_to_spend_and_all_together_no_more_than_was_said():
    spent = [Terms(0.05, attempt=k).alpha for k in range(1, 2000)]
    assert spent[0] == pytest.approx(0.025) and sum(spent) < 0.05 and spent == sorted(spent, reverse=True)
    uppers = [certify(evidence(), Terms(0.05, attempt=k)).line().upper for k in (1, 2, 5)]
    assert uppers == sorted(uppers) and uppers[0] < uppers[2]
    with pytest.raises(UserError, match="Attempts count from 1"):
        certify(evidence(), Terms(0.05, attempt=0))


def test_more_rungs_and_segments_share_the_error():
    one = certify(evidence(), Terms(0.05, least=10_000)).line()
    three = certify(evidence(), TERMS).line()
    many = certify(evidence(rungs=("fresh", "stale", "none")), TERMS).line()
    assert one.mean == three.mean and one.upper < three.upper < many.upper


# ------------------------------------------------ segments and rungs


def test_small_segments_are_not_tested_alone_and_go_by_all():
    certified = certify(evidence(450), TERMS)
    assert certified.line("fresh", "sparse").verdict == "reported" and certified.line("fresh", "sparse").upper is None
    assert certified.line("fresh", "active").verdict == "kept"
    assert certified.line("fresh", "tail").verdict == "reported"
    assert certified.allows("fresh", "sparse")
    with pytest.raises(UserError, match="says nothing of rung 'fresh' in segment 'new'"):
        certified.line("fresh", "new")


def test_a_segment_that_is_harmed_takes_the_next_rung():
    found = evidence(1500, rungs=("fresh", "stale", "none"))
    for rung in ("stale", "none"):
        found.after[rung][:] = found.after["fresh"]
    sparse = found.segments["sparse"]
    found.after["fresh"][sparse] -= 0.1
    found.after["none"][:] -= 0.3
    certified = certify(found, Terms(0.06))
    assert certified.routes("sparse") == ("stale", "reference")
    assert certified.routes("active") == ("fresh", "stale", "reference")
    assert certified.routes("active", reference=False) == ("fresh", "stale")
    assert not certified.allows("prototype", "active"), "what was not measured is not served"


def test_the_policy_alone_serves_only_where_there_is_no_reference():
    certified = certify(evidence(900, rungs=("fresh", "none")), Terms(0.2))
    assert certified.routes("all") == ("fresh", "reference")
    assert certified.routes("all", reference=False) == ("fresh", "none")


# ------------------------------------------------ hits and benefit


def test_lost_hits_are_bounded_exactly():
    found = evidence(400)
    before, after = np.full(400, 5), np.full(400, 5)
    after[:9] = 11  # lost
    before[20:24], after[20:24] = 30, 2  # gained
    after[50:60] = 9  # moved, and still a hit
    hits = certify(dataclasses.replace(found, rank_before=before, rank_after={"fresh": after}), TERMS).hits["fresh"]
    assert (hits["lost"], hits["gained"]) == (9, 4)
    assert hits["lost_share_at_most"] == pytest.approx(beta.ppf(1 - 0.025, 10, 391), abs=1e-9)
    assert hits["p_value"] == pytest.approx(binom.sf(8, 13, 0.5))
    same = certify(dataclasses.replace(found, rank_after={"fresh": found.rank_before}), TERMS)
    assert same.hits["fresh"]["lost"] == 0 and same.hits["fresh"]["p_value"] == 1.0
    assert all(row == [0.0, 0.0, 0.0] for row in same.benefit["fresh"].values())


def test_benefit_is_paired_over_users():
    found = evidence(300, several=True)
    better = dataclasses.replace(found, rank_after={"fresh": np.maximum(1, found.rank_before - 6)})
    mean, low, high = certify(better, TERMS).benefit["fresh"]["recall@10"]
    gain = (better.rank_after["fresh"] <= 10).astype(float) - (found.rank_before <= 10)
    assert mean == pytest.approx(np.mean([gain[found.unit == u].mean() for u in range(300)]))
    assert 0 < low < mean < high


def test_what_is_compared_is_told_and_not_tested():
    found = evidence(compared={"continued": evidence().before - 0.07})
    assert certify(found, TERMS).compared["continued"] == pytest.approx(0.07)
    assert certify(found, TERMS).line().upper == certify(evidence(), TERMS).line().upper


# ------------------------------------------------ files


def test_a_saved_certificate_is_computed_again_from_its_arrays(tmp_path):
    made = certify(
        evidence(rungs=("stale", "fresh"), several=True, compared={"second_seed": np.full(900, -2.5)}),
        Terms(0.05, attempt=2, seed=7), {"holdout": "users", "data": "abc"},
    )  # fmt: skip
    made.save(tmp_path)
    told = json.loads((tmp_path / "certificate.json").read_text())
    assert told == recompute(tmp_path).to_dict() == made.to_dict() == Certified.load(tmp_path).to_dict()
    assert told["bound"]["unit"] == "user" and told["bound"]["cap"] == 1.0 and told["about"]["data"] == "abc"
    assert made.lines[0].rung == "fresh" and made.table().rows[0][0] == "fresh, all"


def test_a_number_that_the_arrays_do_not_give_is_found(tmp_path):
    certify(evidence(), TERMS).save(tmp_path)
    told = store.read_json(tmp_path / "certificate.json")
    told["lines"][0]["upper"] *= 0.9
    store.write_json_atomic(tmp_path / "certificate.json", told)
    with pytest.raises(StoreError, match=r"differs in lines.*Certify the policy again"):
        Certified.load(tmp_path)
    store.write_json_atomic(tmp_path / "certificate.json", {"format": 1})
    with pytest.raises(StoreError, match="is no certificate"):
        Certified.load(tmp_path)


def test_other_arrays_are_no_evidence(tmp_path):
    import torch

    store.save_tensors(tmp_path / "x.safetensors", {"before": torch.zeros(3)})
    with pytest.raises(StoreError, match="no evidence of a certificate"):
        Evidence.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({}, "who had no part in training"),
        ({"holdout": "targets"}, "whose targets were kept from training"),
        ({"window": {"trained": None, "left_out": None}}, "not known whether"),
        ({"window": {"trained": 0, "left_out": 3}}, "who had no part in training"),
        ({"window": {"trained": 7, "left_out": 0}}, "of whom 7 had a part in training"),
    ],
)
def test_the_sentence_says_of_whom_it_speaks(about, words):
    assert words in certify(evidence(), TERMS, about).sentence()


# ------------------------------------------------ from scorers


@pytest.fixture(scope="module")
def toy():
    g = np.random.default_rng(1)
    histories = tuple(g.integers(1, 31, int(g.integers(5, 12))).astype(np.int32) for _ in range(200))
    items = tuple(Item(f"i{i}", "", "") for i in range(30))
    data = Interactions("toy", tuple(f"u{u}" for u in range(200)), items, histories, None, "toy")
    return data, split(data)


def test_evidence_is_of_users_who_were_kept(toy):
    data, splits = toy
    reference, other = (Popularity(smoothing=s).fit(Run(data, splits)) for s in (0.5, 5.0))
    found = collect(data, splits, reference, {"fresh": other}, 4, compared={"continued": other}, salt="s")
    samples = splits.certificate
    assert len(found.users) == len(np.unique(samples.users)) == (splits.roles == CERTIFICATE).sum()
    np.testing.assert_allclose(found.before, reference.log_likelihood(samples) / 4)
    np.testing.assert_array_equal(found.rank_after["fresh"], other.ranks(samples))
    assert found.segments.keys() == {"sparse", "active", "tail", "new"}
    again = collect(data, splits, reference, {"fresh": reference}, 4, salt="t")
    assert not np.array_equal(again.users, found.users), "another salt, other hashes"
    assert certify(again, TERMS).line().mean == 0.0 and certify(found, TERMS).line().mean > 0.0
    assert slice_key(data, splits) != slice_key(data, split(data, seed=1))


def test_evidence_of_users_who_were_used_is_refused(toy):
    data, splits = toy
    scorer = Popularity().fit(Run(data, splits))
    with pytest.raises(UserError, match="users who were trained on"):
        collect(data, dataclasses.replace(splits, certificate=splits.valid), scorer, {"fresh": scorer}, 4)
    nobody = splits.certificate.take(slice(0, 0))
    with pytest.raises(UserError, match="No user was kept"):
        collect(data, dataclasses.replace(splits, certificate=nobody), scorer, {"fresh": scorer}, 4)
