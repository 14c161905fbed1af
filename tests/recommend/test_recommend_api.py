"""From interactions to a certified bundle: each stage is made once, and found again by what made it."""

import dataclasses
import hashlib
import json
import zipfile

import numpy as np
import pytest

import toy_shop
from retouch import store
from retouch.errors import StoreError, UnknownName, UserError
from retouch.model import wrap
from retouch.progress import listen
from retouch.recommend import _seen, api, bench, fetch
from retouch.recommend.bundle import open_bundle
from retouch.recommend.lwgr import LWGR
from retouch.recommend.nearline import trigger
from retouch.recommend.personal import certify_on
from retouch.recommend.popularity import Popularity
from retouch.recommend.reference import ReferenceSettings
from retouch.recommend.splits import CERTIFICATE
from retouch.report import to_json

METHOD = LWGR(**toy_shop.POLICY, max_harm=0.9)
REFERENCE = ReferenceSettings(size="tiny", n_epochs=2)


def tokens(folder, **changes):
    return api.Tokens(**{"codes": 4, "encoder": str(toy_shop.vectors(folder / "vectors.npy"))} | changes)


def files(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """All tests that fit share the counts of looks."""
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def llm(tiny):
    return wrap(*tiny("llama"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory, llm):
    """Fit once: the folder of the stages, and what was made."""
    folder = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETOUCH_CACHE", str(folder / "cache"))
        prepared = api.prepare(toy_shop.interactions(), folder / "work", tokens=tokens(folder))
        return folder, api.fit(prepared, METHOD, REFERENCE, llm=llm)


@pytest.fixture
def again(shop, monkeypatch):
    """What is needed to fit again with the same stages and counts."""
    folder, made = shop
    monkeypatch.setenv("RETOUCH_CACHE", str(folder / "cache"))
    return folder, made


def equal(one, two):
    return one.keys() == two.keys() and all(bool((one[n] == two[n]).all()) for n in one)


# ------------------------------------------------ preparing


def test_preparing_gives_codes_to_every_item_and_finds_them_again(shop):
    folder, made = shop
    before = files(folder / "work")
    prepared = api.prepare(toy_shop.interactions(), folder / "work", tokens=tokens(folder))
    assert files(folder / "work") == before
    assert prepared.catalogue.codes.shape == (24, 4) and prepared.health.n_items == 24
    np.testing.assert_array_equal(prepared.catalogue.codes, made.prepared.catalogue.codes)
    np.testing.assert_array_equal(prepared.splits.roles, made.prepared.splits.roles)


def test_codes_that_are_damaged_on_disk_are_made_again(tmp_path):
    made = [api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=tokens(tmp_path))]
    (place,) = (tmp_path / "work").glob("tokens-*")
    file = place / "catalogue.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    made.append(api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=tokens(tmp_path)))
    np.testing.assert_array_equal(made[0].catalogue.codes, made[1].catalogue.codes)
    store.check_folder(place)


@pytest.mark.parametrize("change", [{"seed": 1}, {"how": "leave-one-out", "holdout": "targets"}, {"codes": 5}])
def test_what_decides_the_codes_makes_codes_of_its_own(tmp_path, change):
    own = {"codes": change.pop("codes")} if "codes" in change else {}
    api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=tokens(tmp_path))
    api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=tokens(tmp_path, **own), **change)
    assert len(list((tmp_path / "work").glob("tokens-*"))) == 2


def test_stages_are_kept_in_the_cache_when_no_folder_is_named(tmp_path, cache):
    made = api.prepare(toy_shop.interactions(), tokens=tokens(tmp_path))
    assert made.folder == store.cache_dir() / "recommend" / made.data.fingerprint[:16]
    assert any(made.folder.iterdir())


def test_other_tokenisers_make_codes_too(tmp_path):
    made = api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=tokens(tmp_path, tokeniser="opq", force=True))
    assert made.catalogue.n_items == 24


def test_codes_that_collapsed_are_refused_unless_forced(tmp_path):
    same = {"encoder": str(tmp_path / "same.npy"), "codes": 2}
    data = toy_shop.interactions()
    rows = np.repeat(np.random.default_rng(0).normal(size=(2, 8)), 12, 0).astype(np.float32)
    np.save(tmp_path / "same.npy", rows)
    with pytest.raises(UserError, match=r"not fit to train on.*force"):
        api.prepare(data, tmp_path / "work", tokens=api.Tokens(**same))
    assert api.prepare(data, tmp_path / "work", tokens=api.Tokens(**same, force=True)).health.problems


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokeniser": "rq-means"}, "No tokeniser is called 'rq-means'. Did you mean 'rq_kmeans'"),
        ({"encoder": "nowhere.npy"}, "nowhere.npy cannot be read as a .npy file of numbers"),
        ({"codes": 1}, "codes must be"),
        ({"codes": 40}, "codes"),
    ],
)
def test_what_cannot_give_codes_is_named(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=tokens(tmp_path, **changes))


def test_vectors_of_another_catalogue_are_refused(tmp_path):
    toy_shop.vectors(tmp_path / "few.npy", 23)
    with pytest.raises(UserError, match=r"one row for each of 24 items; its shape is \(23, 8\)"):
        api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=api.Tokens(encoder=str(tmp_path / "few.npy")))


# ------------------------------------------------ fitting


def test_fitting_makes_a_policy_with_its_proof(shop):
    _, made = shop
    assert made.certified.holds and made.certified.terms.limit == 0.9 and made.certified.terms.attempt == 1
    assert {line.rung for line in made.certified.lines} == {"fresh", "stale", "prototype"}
    assert set(made.evaluations) == {"reference", "policy"}
    assert made.settings["method"]["name"] == "lwgr" and made.settings["reference"]["size"] == "tiny"
    assert not any(e.broken for e in made.evaluations.values())


def test_a_second_call_trains_nothing_and_costs_no_confidence(again, llm):
    folder, made = again
    before, heard = files(folder), []
    with listen(lambda what, done, total: heard.append(what)):
        second = api.fit(made.prepared, METHOD, REFERENCE, llm=llm)
    assert files(folder) == before
    assert not [what for what in heard if what.startswith(("Training", "Asking for"))]
    assert equal(second.reference.state_dict(), made.reference.state_dict())
    assert equal(second.policy.generator.state_dict(), made.policy.generator.state_dict())
    assert second.certified.to_dict() == made.certified.to_dict()


def test_another_policy_is_another_look_at_the_same_users(again, llm):
    _, made = again
    other = api.fit(made.prepared, dataclasses.replace(METHOD, max_harm=0.8), REFERENCE, llm=llm)
    assert other.certified.terms.attempt == 2
    assert other.certified.terms.alpha == pytest.approx(0.05 / 6)
    assert equal(other.reference.state_dict(), made.reference.state_dict()), "the reference was found again"


def test_other_roles_of_the_same_users_are_another_look_at_them(again, tmp_path, llm):
    _, made = again
    prepared = api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=tokens(tmp_path), seed=1)
    assert (prepared.splits.roles != made.prepared.splits.roles).any()
    method = dataclasses.replace(METHOD, seed=1, n_epochs=1)
    first, second = (api.fit(prepared, method, REFERENCE, llm=llm).certified.terms.attempt for _ in range(2))
    assert first == second > made.certified.terms.attempt


def test_fresh_is_certified_with_the_oldest_knowledge_that_counts_as_fresh(shop):
    _, made = shop
    p, policy = made.prepared, made.policy
    samples = p.splits.certificate
    lags = np.array([trigger(int(cut)) for cut in samples.cuts])
    late = np.zeros(len(samples))
    for lag in np.unique(lags):
        late = np.where(lags == lag, policy.at_lag(int(lag)).log_likelihood(samples), late)
    told = made.certified.evidence.after["fresh"] * len(p.catalogue.sizes)
    np.testing.assert_allclose(told, late, atol=1e-4)
    assert not np.allclose(told, policy.log_likelihood(samples), atol=1e-4)
    assert made.certified.about["lags"] == {"fresh": 4, "stale": 8}


# ------------------------------------------------ who had a part in training


@pytest.fixture
def saved(again, llm):
    folder, made = again
    if not (folder / "bundle").exists():
        made.save(folder / "bundle")
    return made, open_bundle(folder / "bundle", knowledge=llm)


def lines(path, histories):
    path.write_text("".join(json.dumps({"user": u, "items": list(h)}) + "\n" for u, h in histories.items()))
    return path


def of_users(made, numbers, more=()):
    return {made.prepared.data.users[u]: (*made.prepared.data.history(u + 1).items, *more) for u in numbers}


def test_whoever_trained_does_not_certify(saved, tmp_path):
    made, bundle = saved
    apart = made.prepared.splits.roles == CERTIFICATE
    found = certify_on(bundle, toy_shop.csv_file(tmp_path / "window.csv"), 0.9)
    assert found.line().n == apart.sum() < 130
    assert found.about["window"] == {"trained": 0, "left_out": 130 - apart.sum()}
    assert f"{apart.sum()} users who had no part in training" in found.sentence()
    with pytest.raises(UserError, match=r"all \d+ users had a part in training.*whole histories"):
        certify_on(bundle, lines(tmp_path / "w.jsonl", of_users(made, np.flatnonzero(~apart))), 0.9)


def test_whoever_trained_and_went_on_counts_by_the_new_item(saved, tmp_path):
    made, bundle = saved
    trained = np.flatnonzero(made.prepared.splits.roles != CERTIFICATE)
    gone_on = of_users(made, trained[:30], ("i7",))
    shorter = {user: (*items[1:], "i3", "i7") for user, items in of_users(made, trained[30:40]).items()}
    found = certify_on(bundle, lines(tmp_path / "w.jsonl", gone_on | shorter | {"new": ("i1", "i2", "i7")}), 0.9)
    assert found.line().n == 31 and found.about["window"] == {"trained": 30, "left_out": 10}
    assert "31 users of whom 30 had a part in training, with earlier items" in found.sentence()


def test_without_the_salt_nothing_is_said_of_training(saved, tmp_path):
    _, bundle = saved
    found = certify_on(bundle, toy_shop.csv_file(tmp_path / "window.csv"), 0.9, salt="another")
    assert found.line().n == 130 and "no part" not in found.sentence()
    assert "not known whether they had a part in training" in found.sentence()


def test_each_bundle_that_is_measured_on_a_window_is_one_look_at_it(saved, tmp_path):
    _, bundle = saved
    path = toy_shop.json_lines(tmp_path / "window.jsonl", seed=5, n_users=60)
    attempts = [
        certify_on(b, path, limit, salt="x").terms.attempt
        for b, limit in ((bundle, 0.9), (bundle, 0.5), (dataclasses.replace(bundle, fingerprint="other"), 0.9))
    ]
    assert attempts == [1, 1, 2]


def test_a_salt_is_drawn_once_also_where_files_cannot_be_linked(cache, monkeypatch):
    def link(*places):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    salt = _seen.own_salt()
    assert len(salt) == 32 and _seen.own_salt() == salt
    assert [p.name for p in (store.cache_dir() / "recommend").iterdir()] == ["salt"]


def test_no_salt_is_in_a_bundle_and_hashes_tell_nothing_without_it(saved):
    made, bundle = saved
    salt = _seen.own_salt()
    assert made.salt == salt and len(salt) == 32
    for file in bundle.path.iterdir():
        assert salt.encode() not in file.read_bytes(), file.name
    hashes = {row.tobytes() for row in (*made.certified.evidence.users, *bundle.seen().users)}
    for guess in ("", made.prepared.data.fingerprint, bundle.fingerprint):
        assert not hashes & {_seen._user(guess, user) for user in made.prepared.data.users}
        assert not hashes & {
            hashlib.blake2b(f"{guess}:{u}".encode(), digest_size=8).digest() for u in made.prepared.data.users
        }


def test_a_user_kept_back_by_targets_alone_is_noted_as_trained():
    data = toy_shop.interactions()
    whole, targets = (api.split(data, "leave-one-out", how, 0) for how in ("users", "targets"))
    assert len(_seen.Seen.of(data, targets, "s").users) == 130
    assert len(_seen.Seen.of(data, whole, "s").users) == (whole.roles != CERTIFICATE).sum()


def test_an_interrupted_fit_goes_on_and_ends_the_same(again, tmp_path, llm, monkeypatch):
    _, made = again
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "cache"))
    prepared = api.prepare(toy_shop.interactions(), tmp_path / "work", tokens=tokens(tmp_path))
    trained = []

    def stop(what, done, total):
        if "Training the reference" in what:
            trained.append(done)
            if trained == [1, 2, 3, 4]:
                raise KeyboardInterrupt

    with listen(stop), pytest.raises(KeyboardInterrupt):
        api.fit(prepared, METHOD, REFERENCE, llm=llm)
    with listen(stop):
        second = api.fit(prepared, METHOD, REFERENCE, llm=llm)
    assert trained.count(1) == 1, "the first epoch was not trained again"
    assert equal(second.reference.state_dict(), made.reference.state_dict())
    assert second.certified.line().mean == pytest.approx(made.certified.line().mean, abs=1e-6)


@pytest.mark.parametrize("part", ["certificate", "constraint"])
def test_nobody_to_watch_or_to_certify_on_is_said_before_any_training(shop, tmp_path, part):
    prepared = shop[1].prepared
    splits = dataclasses.replace(prepared.splits, **{part: getattr(prepared.splits, part).take(slice(0, 0))})
    alone = dataclasses.replace(prepared, splits=splits, folder=tmp_path / "work")
    with pytest.raises(UserError, match=f"kept .*for the {part}"):
        api.fit(alone, METHOD, REFERENCE)
    methods = {"popularity": Popularity(), "lwgr": METHOD}
    with pytest.raises(UserError, match=f"kept .*for the {part}"):
        bench.run(alone, bench.Bench(methods, REFERENCE), None, tmp_path / "out.json")
    assert not list(tmp_path.iterdir()), "nothing was trained"


def test_the_report_tells_people_and_programs(shop):
    _, made = shop
    report = made.report()
    assert [table.title for table in report.tables] == [
        "Test targets, full ranking", "Paired difference", "Certified harm", "Codes by level", "Codes of all items",
    ]  # fmt: skip
    assert (report.title, report.model) == ("Recommending shop", "a network in memory")
    told = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert told["numbers"]["certificate"]["bound"]["limit"] == 0.9
    assert {row["metric"] for row in told["numbers"]["evaluations"]["policy"]} >= {"recall@5", "ndcg@10"}


def test_the_picture_shows_price_and_harm_of_every_step(shop):
    _, made = shop
    assert made.report().pictures == ()
    (picture,) = made.report(pictures=True).pictures
    assert picture.title == "The constraint while training"
    for group in made.policy.record["history"]:
        assert f"smoothed, {group} from " in picture.caption


def test_a_bundle_is_saved_and_opened(shop, tmp_path, llm):
    _, made = shop
    made.save(tmp_path / "bundle")
    opened = open_bundle(tmp_path / "bundle", knowledge=llm)
    assert opened.serves == "policy" and opened.asks
    assert equal(opened.reference.state_dict(), made.reference.state_dict())
    assert opened.settings["method"] == made.settings["method"]


def test_knowledge_of_a_language_model_needs_one(shop):
    with pytest.raises(UserError, match="needs a language model"):
        api.fit(shop[1].prepared, METHOD, REFERENCE)


@pytest.mark.slow
def test_knowledge_that_asks_no_language_model_needs_none(again):
    folder, made = again
    vectors = str(toy_shop.vectors(folder / "own.npy"))
    text = LWGR(**toy_shop.POLICY | {"n_epochs": 1}, max_harm=0.9, knowledge="text", text_vectors=vectors)
    assert api.fit(made.prepared, text, REFERENCE).llm is None


def test_a_device_that_is_not_here_is_refused_before_any_work(shop):
    _, made = shop
    for device in ("toaster", "cuda:99"):
        with pytest.raises(UserError, match=f"Device '{device}' cannot be used"):
            api.fit(made.prepared, METHOD, REFERENCE, device=device)


# ------------------------------------------------ data that is fetched

INSIDE = "recbole/dataset_example/ml-100k/"


def wheel(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"content of {name}")
    return path


def test_a_wheel_gives_its_atomic_files_and_nothing_else(tmp_path):
    names = [INSIDE + n for n in ("ml-100k.inter", "ml-100k.item", "ml-100k.user", "ml-100k.link")]
    made = fetch.unpack(wheel(tmp_path / "a.whl", [*names, "recbole/__init__.py", "other/x.inter"]), tmp_path / "out")
    store.check_folder(made)
    assert {p.name for p in made.iterdir()} == {"ml-100k.inter", "ml-100k.item", "ml-100k.user", "manifest.json"}
    assert (made / "ml-100k.item").read_text() == f"content of {INSIDE}ml-100k.item"


def test_a_wheel_that_holds_no_interactions_leaves_nothing(tmp_path):
    (tmp_path / "broken.whl").write_bytes(b"PK no zip")
    for path in (wheel(tmp_path / "empty.whl", [INSIDE + "ml-100k.item"]), tmp_path / "broken.whl"):
        with pytest.raises(StoreError):
            fetch.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_fetched_is_named_before_any_download(tmp_path):
    with pytest.raises(UnknownName, match="Did you mean 'ml-100k'"):
        fetch.fetch("ml-10k", tmp_path / "out")
    with pytest.raises(StoreError, match="lies inside"):
        store.write_folder(tmp_path / "saved", {"a": "b"})
        fetch.fetch("ml-100k", tmp_path / "saved" / "inside")
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_not_the_published_one_is_refused(tmp_path, monkeypatch):
    named = wheel(tmp_path / "recbole-1.2.1-py3-none-any.whl", [INSIDE + "ml-100k.inter"])
    with zipfile.ZipFile(named, "a") as archive:
        archive.writestr("recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        archive.writestr("recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("recbole-1.2.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(StoreError, match="is not the published one; nothing was kept"):
        fetch.fetch("ml-100k", tmp_path / "out")
    assert not (tmp_path / "out").exists()
