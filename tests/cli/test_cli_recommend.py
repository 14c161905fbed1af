"""``retouch recommend`` and ``retouch bench recommend``: what they say, what they leave behind, how mistakes are named."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import numpy as np
import pytest

import toy_shop
from retouch import store as files
from retouch.recommend.stores import Past, open_store
from retouch.settings import fields_of

# Typer asks click 8.5 by old names; neither is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")

POLICY = [part for n, v in toy_shop.POLICY.items() if n != "beams" for part in (f"--{n.replace('_', '-')}", v)]
QUICK = ("--codes", 4, "--size", "tiny", "--reference-epochs", 2, "--beams", 24, *POLICY)


@dataclass
class Said:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def retouch(*words):
    """Run a command in this process."""
    from retouch.cli import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", "300")
        patch.delenv("RETOUCH_DEBUG", raising=False)
        patch.setattr(sys, "argv", ["retouch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    return Said(ended.value.code, out.getvalue(), err.getvalue())


def done(*words):
    said = retouch("recommend", *words)
    assert said.code == 0, said.err
    return said


def refused(*words, code=2, verb="recommend"):
    """Run a command that is to fail: nothing on stdout, and one error."""
    said = retouch(verb, *words)
    assert said.code == code, said
    assert said.out == ""
    assert "Traceback" not in said.err and "error: " in said.err
    return said.err


def listing(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class Shop:
    """A fitted bundle with all that it was made from."""

    folder: object
    words: tuple
    said: Said

    def __getattr__(self, name):
        return self.folder / name


@pytest.fixture(scope="module")
def shop(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    toy_shop.language_model(tiny, folder / "llm")
    data, encoder = toy_shop.csv_file(folder / "toy.csv"), toy_shop.vectors(folder / "vectors.npy")
    words = (data, "--llm", folder / "llm", "--encoder", encoder, "--work", folder / "work", *QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETOUCH_CACHE", str(folder / "cache"))
        said = done("fit", *words, "--max-harm", 0.9, "-o", folder / "bundle")
        address = f"sqlite:{folder / 'knowledge.db'}"
        done("nearline", folder / "bundle", "--store", address, "--histories", data)
    return Shop(folder, words, said)


@pytest.fixture
def address(shop):
    return f"sqlite:{shop.folder / 'knowledge.db'}"


@pytest.fixture
def same_cache(shop, monkeypatch):
    monkeypatch.setenv("RETOUCH_CACHE", str(shop.folder / "cache"))


def damaged(shop, tmp_path):
    """Copy the bundle and flip one byte of its policy."""
    place = shutil.copytree(shop.bundle, tmp_path / "damaged")
    file = place / "change.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return place


# ------------------------------------------------ fit


def test_fit_tells_the_result_and_what_to_do_next(shop):
    out = shop.said.out
    for words in (
        "Recommending toy.csv",
        "With 95% confidence the mean harm of fresh knowledge is at most",
        "within the limit of 0.9",
        "Test targets, full ranking",
        "Codes by level",
        f"Saved as {shop.bundle}; the policy serves.",
        f"Next: retouch recommend nearline {shop.bundle} --store sqlite:knowledge.db --histories {shop.folder / 'toy.csv'}",
    ):
        assert words in out
    assert str(shop.llm) in out, "the language model is named"
    files.check_folder(shop.bundle)


def test_fitting_again_finds_everything_again(shop, same_cache, tmp_path):
    before = listing(shop.work)
    told = done("fit", *shop.words, "--max-harm", 0.9, "-o", tmp_path / "again", "--json").json
    assert listing(shop.work) == before
    assert told["numbers"]["certificate"]["bound"]["attempt"] == 1
    assert told["numbers"]["settings"]["method"]["max_harm"] == 0.9
    for name in ("reference.safetensors", "change.safetensors", "knowledge.safetensors", "certificate.json"):
        assert (tmp_path / "again" / name).read_bytes() == (shop.bundle / name).read_bytes()


def test_a_policy_that_is_not_proved_is_not_kept_unless_asked_for(shop, same_cache, tmp_path):
    words = ("fit", *shop.words, "--max-harm", 0.01, "-o", tmp_path / "refused")
    said = retouch("recommend", *words, "--json")
    assert said.code == 3
    assert said.json["numbers"]["certificate"]["lines"][0]["verdict"] == "undecided", "the report is told all the same"
    assert "which does not decide about the limit of 0.01" in said.err
    assert "The policy is refused and the reference serves." in said.err
    assert "cannot be certified with" in said.err, "the warning that came before training"
    assert not (tmp_path / "refused").exists()
    kept = done(*words, "--keep-refused", "--html", tmp_path / "report.html")
    assert f"Saved as {tmp_path / 'refused'}; the reference serves." in kept.out
    assert "The constraint while training" in (tmp_path / "report.html").read_text()
    assert done("for", tmp_path / "refused", "--history", "i1; i2", "--json").json["rung"] == "reference"


def test_no_setting_of_the_policy_is_hidden_by_an_option_of_the_command():
    import typer.main

    from retouch import registry
    from retouch.cli import recommend
    from retouch.recommend.nearline import NearlineSettings

    commands = typer.main.get_command(recommend.app).commands
    for name, cls in (("fit", registry.load("recommend", "lwgr")), ("nearline", NearlineSettings)):
        options = {o for p in commands[name].params for o in p.opts}
        hidden = options & {f"--{f.name.replace('_', '-')}" for f in fields_of(cls)}
        assert hidden == ({"--max-harm"} if name == "fit" else set())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere.csv",), "There is no file or folder 'nowhere.csv'"),
        (("toy.csv", "--user", "customer"), "No column of toy.csv is called 'customer'."),
        (("toy.csv", "--text", "title,brand"), "No column of toy.csv is called 'brand'."),
        (("toy.csv", "--format", "inter"), "No format is called 'inter'."),
        (("toy.csv", "--split", "random"), "No value of --split is called 'random'. Known: leave-one-out, time."),
        (("toy.csv", "--holdout", "user"), "No value of --holdout is called 'user'. Did you mean 'users'?"),
        (("toy.csv", "--tokeniser", "rq"), "No value of --tokeniser is called 'rq'."),
        (("toy.csv", "--size", "huge"), "size must be tiny|small|base|tiger; got 'huge'."),
        (("toy.csv", "--reference-epochs", "0"), "n_epochs must be int >= 1; got 0."),
        (("toy.csv", "--dropout", "1"), "dropout must be float >= 0 and < 1; got 1.0."),
        (("toy.csv", "--max-harm", "0"), "max_harm must be"),
        (("toy.csv", "--max-harm", "nan"), "max_harm must be"),
        (("toy.csv", "--max-harms", "0.1"), "Method 'lwgr' has no setting 'max_harms'. Did you mean 'max_harm'?"),
        (
            ("toy.csv", "--reference-epoch", "3"),
            "There is no option --reference-epoch. Did you mean --reference-epochs?",
        ),
        (("toy.csv", "--n-bookz", "3"), "Method 'lwgr' has no setting 'n_bookz'. Did you mean 'n_books'?"),
        (("toy.csv", "--titles", "words"), "titles must be pooled|tokens; got 'words'."),
        (("toy.csv", "--min-count", "-1"), "min_count must be at least 0; got -1."),
        (("toy.csv", "--min-count", "500"), "Nothing is left of"),
        (("toy.csv", "--min-rating", "3"), "No column of toy.csv is called 'rating'."),
        (("toy.csv", "--device", "toaster"), "Device 'toaster' cannot be used"),
        (("toy.csv", "--llm", "./none"), "There is no model folder './none'."),
        (("toy.csv", "--encoder", "none.npy"), "none.npy cannot be read as a .npy file of numbers"),
        (("toy.csv", "--encoder", "few.npy"), "few.npy must hold one row for each of 24 items; its shape is (23, 8)."),
        (("toy.csv", "--codes", "30"), "codes"),
        (("toy.csv", "--html", "no/r.html"), "--html no/r.html must be a file in a folder that exists."),
        (("toy.csv", "-o", "toy.csv"), "toy.csv exists and is no bundle of ours. Name another folder."),
        (("toy.csv", "-o", "llm"), "llm exists and is no bundle of ours. Name another folder."),
        (("toy.csv", "-o", "bundle/inside"), "lies inside"),
        (("one.csv", "--min-count", "0"), "one.csv: one item is left ('i1'), and there is nothing to choose."),
        (("bare.csv",), "100.0% of the 24 items have no text, such as 'i1'."),
        (("nan.csv",), "nan.csv line 3: 'nan' in column 'timestamp' is no time."),
        (("toy.csv", "--title-map", "none.tsv"), "There is no file or folder 'none.tsv'."),
    ],
)
def test_fit_names_a_mistake_and_writes_nothing(shop, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    for name in ("toy.csv", "llm", "bundle"):
        (tmp_path / name).symlink_to(shop.folder / name)
    rows = (shop.folder / "toy.csv").read_text().splitlines()
    (tmp_path / "one.csv").write_text("\n".join([rows[0], *(r for r in rows if ",i1," in r)]))
    (tmp_path / "bare.csv").write_text("\n".join(r.rpartition(",")[0] for r in rows))
    (tmp_path / "nan.csv").write_text(
        "\n".join([*rows[:2], rows[2].replace(rows[2].split(",")[2], "nan", 1), *rows[3:]])
    )
    toy_shop.vectors(tmp_path / "few.npy", 23)
    given = {str(w) for w in words}
    rest = [w for n, v in (("--llm", "llm"), ("--encoder", shop.folder / "vectors.npy"), ("-o", "out"), ("--codes", 4))
            if n not in given for w in (n, v)]  # fmt: skip
    assert says in refused("fit", *words, *rest, "--work", "work")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------ for


def test_for_takes_ids_and_titles(shop):
    one = done("for", shop.bundle, "--history", "i1; i2; i3", "-k", 4)
    two = done("for", shop.bundle, "--history", "Title 1 of kind 0; i2; title 3 OF kind 0", "-k", 4)
    assert one.out == two.out
    assert one.out.startswith("For this history (prototype)")
    assert len([line for line in one.out.splitlines() if line.lstrip()[:1].isdigit()]) == 4


def test_for_json(shop):
    told = done("for", shop.bundle, "--history", "i1; i2", "-k", 3, "--json").json
    assert told["rung"] == "prototype" and len(told["items"]) == 3 and told["reasons"] == []
    assert set(told["items"][0]) == {"id", "title", "score", "sid", "moved"}
    assert told["bundle"] == files.read_json(shop.bundle / "retouch.json")["fingerprint"]


def test_for_names_an_unknown_title_with_the_nearest(shop):
    says = refused("for", shop.bundle, "--history", "Title 1 of kin")
    assert "'Title 1 of kin' is neither an id nor a title of this catalogue." in says
    assert "'Title 1 of kind 0'" in says


def test_for_shows_the_codes_of_an_item(shop):
    told = done("for", shop.bundle, "--item", "i7", "--json").json
    assert (told["id"], told["title"]) == ("i7", toy_shop.title(7)) and len(told["codes"]) == 4
    said = done("for", shop.bundle, "--item", toy_shop.title(7)).out
    assert said == f"{toy_shop.title(7)} (id i7): codes {' '.join(map(str, told['codes']))}\n"
    assert "is neither an id nor a title" in refused("for", shop.bundle, "--item", "nothing")


def test_for_asks_the_language_model_now_and_explains(shop):
    said = done("for", shop.bundle, "--history", "i1; i2; i3", "--knowledge", "now", "--explain", "-k", 2)
    assert said.out.startswith("For this history (fresh)")
    told = done(
        "for", shop.bundle, "--history", "i1; i2; i3", "--knowledge", "now", "--explain", "-k", 2, "--json"
    ).json
    assert told["rung"] == "fresh" and len(told["reasons"]) == 2
    assert all(reason["sentence"] in said.out for reason in told["reasons"])


def test_what_nearline_stored_answers_fresh(shop, address):
    told = done("for", shop.bundle, "--user", "u5", "--store", address, "--json").json
    assert (told["rung"], told["lag"]) == ("fresh", 0) and told["knowledge_age_s"] >= 0
    now = done("for", shop.bundle, "--user", "u5", "--store", address, "--knowledge", "now", "--json").json
    assert [p["id"] for p in now["items"]] == [p["id"] for p in told["items"]]
    stranger = done("for", shop.bundle, "--user", "nobody", "--store", address, "--json").json
    assert stranger["rung"] == "popular" and stranger["items"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), 'Give a history, such as --history "title; title", or a user with --store.'),
        (("--user", "u1"), 'Give a history, such as --history "title; title", or a user with --store.'),
        (("--history", "i1", "-k", "0"), "k must be a whole number from 1 to 100; got 0."),
        (("--history", "i1", "--knowledge", "later"), "No value of --knowledge is called 'later'. Known: now, stored."),
        (("--history", "i1", "--store", "mysql:x"), "The store 'mysql:x' is not understood."),
        (("--history", "i1", "--store", "sqlite:"), "sqlite: needs a path"),
        (("--history", "i1", "--store", "redis://127.0.0.1:1/0"), "does not answer"),
        (("--history", "i1", "--knowledge", "now", "--llm", "./none"), "There is no model folder './none'."),
        (("--history", "i1", "--llm", "./none"), "--llm names who is asked with --knowledge now"),
    ],
)
def test_for_names_a_mistake(shop, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused("for", shop.bundle, *words)


def test_a_user_without_a_history_cannot_be_asked_about(shop, tmp_path):
    empty = f"sqlite:{tmp_path / 'empty.db'}"
    assert "There is no store at" in refused("for", shop.bundle, "--user", "u1", "--store", empty)
    open_store(empty).close()
    says = refused("for", shop.bundle, "--user", "u1", "--store", empty, "--knowledge", "now")
    assert "The store knows no history of user 'u1'." in says


# ------------------------------------------------ bundles that cannot be used


@pytest.mark.parametrize(
    "words",
    [
        ("for", "BUNDLE", "--history", "i1"),
        ("for", "BUNDLE", "--history", "i1", "--knowledge", "now"),
        ("nearline", "BUNDLE", "--store", "sqlite:new.db"),
        ("evaluate", "BUNDLE"),
        ("evaluate", "BUNDLE", "--window", "w.jsonl"),
        ("serve", "BUNDLE"),
    ],
)
def test_a_bundle_that_is_missing_damaged_or_none_is_named(shop, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    toy_shop.json_lines(tmp_path / "w.jsonl")
    files.write_folder(tmp_path / "other", {"retouch.json": '{"kind": "slim", "format": 1}'})
    (tmp_path / "plain").mkdir()
    for place, says in (
        ("nowhere", "nowhere"), (damaged(shop, tmp_path), "change.safetensors"), ("other", "other"), ("plain", "plain"),
    ):  # fmt: skip
        assert says in refused(*(place if w == "BUNDLE" else w for w in words))
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("command", ["for", "nearline", "evaluate"])
def test_another_language_model_is_refused(shop, tiny, tmp_path, command):
    other = toy_shop.language_model(tiny, tmp_path / "other", seed=1)
    window = toy_shop.json_lines(tmp_path / "w.jsonl")
    words = {
        "for": ("--history", "i1", "--knowledge", "now"),
        "nearline": ("--store", f"sqlite:{tmp_path / 'k.db'}", "--histories", window),
        "evaluate": ("--window", window),
    }[command]
    says = refused(command, shop.bundle, *words, "--llm", other)
    assert str(other) in says or "language model" in says
    assert not (tmp_path / "k.db").exists()


# ------------------------------------------------ nearline


def test_nearline_writes_only_what_is_needed(shop, tmp_path):
    address, histories = f"sqlite:{tmp_path / 'k.db'}", toy_shop.json_lines(tmp_path / "h.jsonl", n_users=12)
    first = done("nearline", shop.bundle, "--store", address, "--histories", histories)
    assert first.out.startswith("12 users: 12 asked, 0 remembered, 0 needed nothing, 0 without a known item; 100.0%")
    assert "Servers read these records" in first.out
    assert f"Next: retouch recommend serve {shop.bundle} --store {address}" in first.out
    told = done("nearline", shop.bundle, "--store", address, "--json").json  # the store's own histories
    assert (told["unchanged"], told["written"], told["covered"]) == (12, 0, 12)
    assert told["active"] == told["namespace"] and told["store"] == address
    assert not list((tmp_path / "cache" / "recommend").glob("nearline-*")), "nothing is left of a run that ended"


def test_nearline_reads_columns_of_other_names(shop, tmp_path):
    data = toy_shop.csv_file(tmp_path / "other.csv", names=("who", "what", "when", "title"))
    words = ("nearline", shop.bundle, "--store", f"sqlite:{tmp_path / 'k.db'}", "--histories", data)
    assert "No column of other.csv is called 'user_id'." in refused(*words)
    told = done(*words, "--user", "who", "--item", "what", "--time", "when", "--json").json
    assert told["covered"] == 130


def test_nearline_goes_back_to_what_was_read_before(shop, tmp_path):
    address, histories = f"sqlite:{tmp_path / 'k.db'}", toy_shop.json_lines(tmp_path / "h.jsonl", n_users=3)
    words = ("nearline", shop.bundle, "--store", address)
    assert "There is no store at" in refused(*words, "--rollback") and not (tmp_path / "k.db").exists()
    kept = open_store(address)
    assert "there is nothing to go back to" in refused(*words, "--rollback")
    kept.activate("older")
    kept.close()
    waiting = done(*words, "--histories", histories, "--no-activate")
    assert "Servers do not yet read these records" in waiting.out
    assert done(*words, "--json").json["active"] != "older"
    assert done(*words, "--rollback").out == "Servers read namespace older again.\n"
    assert (
        done(*words, "--rollback", "--json").json["active"]
        == files.read_json(shop.bundle / "retouch.json")["fingerprint"]
    )


def test_nearline_forgets_and_says_what_there_was(shop, tmp_path):
    address = f"sqlite:{tmp_path / 'k.db'}"
    words = ("nearline", shop.bundle, "--store", address, "--forget", "ann", "--forget", "nobody")
    assert "There is no store at" in refused(*words) and not (tmp_path / "k.db").exists()
    kept = open_store(address)
    kept.append([("ann", "i1")])
    kept.close()
    assert done(*words).out == "Removed 1 histories and 0 records of 2 users.\n"
    assert done(*words, "--json").json["histories"] == 0


def test_nearline_leaves_out_what_was_rated_low(shop, tmp_path):
    lines = ["user_id,item_id,rating,timestamp", "ann,i1,5,1", "ann,i2,1,2", "ann,i3,4,3", "ben,i1,2,1"]
    (tmp_path / "rated.csv").write_text("\n".join(lines) + "\n")
    address = f"sqlite:{tmp_path / 'k.db'}"
    done("nearline", shop.bundle, "--store", address, "--histories", tmp_path / "rated.csv", "--min-rating", 3)
    kept = open_store(address)
    assert [past and past.items for past in kept.histories(["ann", "ben"])] == [("i1", "i3"), None]
    kept.close()
    lines = toy_shop.json_lines(tmp_path / "h.jsonl", n_users=2)
    words = ("nearline", shop.bundle, "--store", address, "--min-rating", 3)
    assert "histories without ratings" in refused(*words, "--histories", lines)
    assert "--min-rating needs --histories" in refused(*words)


def test_nearline_lists_namespaces_and_purges_one_that_is_not_read(shop, tmp_path):
    address, histories = f"sqlite:{tmp_path / 'k.db'}", toy_shop.json_lines(tmp_path / "h.jsonl", n_users=3)
    words = ("nearline", shop.bundle, "--store", address)
    assert "There is no store at" in refused(*words, "--namespaces") and not (tmp_path / "k.db").exists()
    name = done(*words, "--histories", histories, "--json").json["namespace"]
    kept = open_store(address)
    kept.put_many({"u1": kept.get_many(["u1"])[0]}, "older")
    kept.close()
    told = done(*words, "--namespaces", "--json").json["namespaces"]
    assert sorted((one["name"], one["n_records"], one["active"]) for one in told) == sorted(
        [(name, 3, True), ("older", 1, False)]
    )
    assert name[:12] in done(*words, "--namespaces").out
    assert "is active" in refused(*words, "--purge", name[:8])
    assert "0 namespaces begin with 'x'" in refused(*words, "--purge", "x")
    assert "2 namespaces begin with ''" in refused(*words, "--purge", "")
    assert done(*words, "--purge", "old").out == "Removed 1 record of namespace older.\n"
    assert [one["name"] for one in done(*words, "--namespaces", "--json").json["namespaces"]] == [name]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--store", "ftp://x"), "The store 'ftp://x' is not understood."),
        (("--store", "sqlite:text.db"), "The store text.db does not answer"),
        (("--store", "sqlite:empty.db"), "The store sqlite:empty.db knows no histories yet. Name a file"),
        (("--histories", "none.csv"), "There is no file or folder 'none.csv'"),
        (("--histories", "broken.jsonl"), "broken.jsonl line 1 is not valid JSON"),
        (("--histories", "llm"), "llm holds no interactions."),
        (("--ttl-s", "0"), "ttl_s must be"),
        (("--coverages", "0.5"), "has no setting 'coverages'"),
        (("--watch", "--json"), "leave out --ray and --json"),
        (("--purge", "a", "--rollback"), "--rollback and --purge are each all that a call does. Give one of them."),
    ],
)
def test_nearline_names_a_mistake(shop, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.db").write_text("a text that is no database at all" * 100)
    (tmp_path / "broken.jsonl").write_text('{"user": ')
    (tmp_path / "llm").symlink_to(shop.llm)
    assert says in refused("nearline", shop.bundle, *words)


def test_serve_names_a_store_that_cannot_be(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "The store 'ftp://x' is not understood." in refused("serve", shop.bundle, "--store", "ftp://x")
    assert "none.txt" in refused("serve", shop.bundle, "--token", "none.txt")


def test_serve_takes_how_it_answers_and_what_it_takes_as_flags(shop, monkeypatch):
    taken = {}
    monkeypatch.setattr("retouch.recommend.serve.run", lambda *given, **named: taken.update(named))
    done("serve", shop.bundle, "--beams", 20, "--filter-seen", "false", "--rate-per-s=5", "--port", 8123)
    assert (taken["port"], taken["settings"].beams, taken["settings"].filter_seen) == (8123, 20, False)
    assert (taken["limits"].rate_per_s, taken["limits"].body_kib) == (5.0, 64)
    assert "Did you mean 'beams'?" in refused("serve", shop.bundle, "--beam", 20)
    assert "body_kib must be" in refused("serve", shop.bundle, "--body-kib", 0)
    assert "belongs to no option" in refused("serve", shop.bundle, "many")


# ------------------------------------------------ evaluate


def test_evaluate_shows_the_certificate_and_computes_it_again(shop):
    said = done("evaluate", shop.bundle)
    assert "With 95% confidence the mean harm of fresh knowledge is at most" in said.out
    assert "Certified harm" in said.out and "fresh, all" in said.out
    assert done("evaluate", shop.bundle, "--recompute").out == said.out + "Computed again from the arrays: equal.\n"
    assert done("evaluate", shop.bundle, "--json").json == files.read_json(shop.bundle / "certificate.json")


def test_a_certificate_that_says_more_than_its_arrays_is_refused(shop, tmp_path):
    content = {p.name: p.read_bytes() for p in shop.bundle.iterdir() if p.name != "manifest.json"}
    told = json.loads(content["certificate.json"])
    told["lines"][0]["upper"] /= 2
    files.write_folder(tmp_path / "forged", content | {"certificate.json": json.dumps(told)})
    says = refused("evaluate", tmp_path / "forged", "--recompute")
    assert "does not say what its arrays give (it differs in lines)" in says


def test_evaluate_says_which_rows_of_a_table_cannot_be(tmp_path):
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text("model,R@5,N@5,R@10,N@10\nA,0.05,0.034,0.09,0.047\n")
    bad.write_text("model,R@5,N@5,R@10,N@10\nA,0.05,0.034,0.09,0.063\n")
    assert "All rows are possible" in done("evaluate", "--check-table", good).out
    said = retouch("recommend", "evaluate", "--check-table", bad)
    assert said.code == 2 and said.out.startswith("A: ndcg@10 - ndcg@5 is 0.0290")
    told = retouch("recommend", "evaluate", "--check-table", bad, "--json")
    assert told.code == 2 and len(told.json["impossible"]) == 1
    (tmp_path / "none.csv").write_text("model,accuracy\nA,0.4\n")
    assert "A: nothing to check." in refused("evaluate", "--check-table", tmp_path / "none.csv")
    assert "cannot be read as a table" in refused("evaluate", "--check-table", tmp_path / "missing.csv")


def test_evaluate_certifies_on_fresh_histories(shop, tmp_path):
    window = toy_shop.json_lines(tmp_path / "window.jsonl", seed=4, n_users=60)
    said = done("evaluate", shop.bundle, "--window", window)
    assert "on 60 users" in said.out and "within the limit of 0.9" in said.out
    strict = retouch("recommend", "evaluate", shop.bundle, "--window", window, "--max-harm", 0.01, "--json")
    assert strict.code == 3 and strict.json["bound"]["limit"] == 0.01
    table = toy_shop.csv_file(tmp_path / "other.csv", seed=4, names=("who", "what", "when", "title"))
    columns = ("--user", "who", "--item", "what", "--time", "when")
    assert "on 130 users" in done("evaluate", shop.bundle, "--window", table, *columns).out
    assert "must be above 0" in refused("evaluate", shop.bundle, "--window", window, "--max-harm", 0)
    rows = [f"u{n},i{i},{5 - (n < 40)},{i}" for n in range(60) for i in range(1, 5)]
    (tmp_path / "rated.csv").write_text("\n".join(["user_id,item_id,rating,timestamp", *rows]) + "\n")
    liked = ("--window", tmp_path / "rated.csv", "--min-rating", 5)
    assert "on 20 users" in retouch("recommend", "evaluate", shop.bundle, *liked, "--max-harm", 0.9).out
    assert "--min-rating looks at the ratings of" in refused("evaluate", shop.bundle, "--min-rating", 5)
    assert "There is no file or folder" in refused("evaluate", shop.bundle, "--window", tmp_path / "none.jsonl")


def test_evaluate_needs_something_to_evaluate():
    assert "Name a bundle, or a table with --check-table." in refused("evaluate")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--max-harm", 0.1), "--max-harm is the limit for --window"),
        (("--llm", "smollm2"), "--llm names who is asked for --window"),
        (("--window", "w.jsonl", "--recompute"), "leave out --window and --reasons"),
        (("--reasons", "w.jsonl", "--recompute"), "leave out --window and --reasons"),
        (("--window", "w.jsonl", "--reasons", "w.jsonl"), "give one of them"),
    ],
)
def test_evaluate_refuses_flags_that_would_do_nothing(shop, words, says):
    assert says in refused("evaluate", shop.bundle, *words)


def test_what_comes_next_reads_the_same_columns():
    from retouch.cli.recommend import _columns

    assert _columns("", "user_id", "item_id", "timestamp", None) == []
    assert _columns("csv", "who", "item_id", "", None) == ["--format", "csv", "--user", "who", "--time", ""]
    assert _columns("", "user_id", "item_id", "timestamp", 4.0) == ["--min-rating", "4.0"]


# ------------------------------------------------ data


def test_data_that_pip_cannot_bring_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    says = refused("data", "ml-100k", "-o", tmp_path / "out")
    assert "pip could not download recbole==1.2.1" in says and "retouch recommend fit FOLDER" in says
    assert "No data set to fetch is called 'ml-1m'. Did you mean 'ml-100k'?" in refused("data", "ml-1m")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------ bench


def test_bench_writes_one_object_and_shows_a_table(shop, tmp_path):
    words = ("recommend", "--data", shop.folder / "toy.csv", "--encoder", shop.folder / "vectors.npy", "--codes", 4,
             "--size", "tiny", "--reference-epochs", 2, "--work", shop.work, "--max-harm", 0.5)  # fmt: skip
    out = tmp_path / "bench.json"
    said = retouch("bench", *words, "--methods", "popularity,reference,reference:n_epochs=1", "--json", out)
    assert said.code == 0, said.err
    assert "130 users of toy.csv, full ranking" in said.out and f"Saved as {out}." in said.out
    told = json.loads(out.read_text())
    assert (told["verb"], told["model"], told["data"], told["n"]) == ("recommend", None, "toy.csv", 130)
    assert told["methods"]["popularity"]["harm_limit"] == 0.5
    assert (
        told["methods"]["reference"]["harm_mean"] == 0
    )  # the flags are its settings: it is what harm is measured from
    asked = [told["methods"][name]["settings"] for name in ("reference", "reference:n_epochs=1")]
    assert [(s["size"], s["n_epochs"]) for s in asked] == [("tiny", 2), ("tiny", 1)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--methods", "popularty"), "No recommend method is called 'popularty'. Did you mean 'popularity'?"),
        (("--methods", "popularity,popularity"), "Method 'popularity' is named twice."),
        (("--methods", "sasrec:n_epoch=3"), "has no setting 'n_epoch'. Did you mean 'n_epochs'?"),
        (("--max-harm", "0"), "--max-harm must be above 0, in nats per code; got 0"),
        (("--max-harm", "nan"), "--max-harm must be above 0, in nats per code; got nan"),
        (("--data", "none.csv"), "There is no file or folder 'none.csv'"),
        (("--device", "toaster"), "Device 'toaster' cannot be used"),
        (("--model", "./none", "--methods", "lwgr"), "There is no model folder './none'."),
        (("--split", "time2"), "No value of --split is called 'time2'. Did you mean 'time'?"),
        (("--json", "no/b.json"), "--json no/b.json must be a file in a folder that exists."),
        (("--encoder", "none.npy"), "none.npy cannot be read"),
    ],
)
def test_bench_names_a_mistake_and_writes_nothing(shop, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    defaults = {"--data": shop.folder / "toy.csv", "--methods": "popularity", "--json": "b.json", "--work": "work"}
    rest = [w for name, value in defaults.items() if name not in words for w in (name, value)]
    assert says in refused("recommend", *rest, *words, verb="bench")
    assert not (tmp_path / "b.json").exists()


# ------------------------------------------------ all of it, as a person does


@pytest.mark.slow
def test_all_commands_one_after_the_other_in_processes_of_their_own(shop, tmp_path):
    """Fit is stopped and goes on; a watch sees a new history; the service is in its own tests."""
    env = os.environ | {"RETOUCH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from retouch.cli import main; main()", "recommend"]
    toy = ("--llm", shop.llm, "--encoder", shop.folder / "vectors.npy", *QUICK)

    def run(*words):
        return subprocess.run(
            [*command, *map(str, words)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    said = run("fit", shop.folder / "toy.csv", *toy, "--max-harm", 0.9, "-o", "bundle")
    assert said.returncode == 0, said.stderr
    done_ = run("nearline", "bundle", "--store", "sqlite:k.db", "--histories", shop.folder / "toy.csv")
    assert done_.returncode == 0 and "100.0% covered" in done_.stdout
    watch = subprocess.Popen(
        [*command, "nearline", "bundle", "--store", "sqlite:k.db", "--watch", "--poll-s", "0.1"],
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        kept = open_store(f"sqlite:{tmp_path / 'k.db'}")
        kept.put_histories({"new": Past(("i1", "i2", "i3"), 3)})
        until = time.monotonic() + 120
        while kept.get_many(["new"])[0] is None and time.monotonic() < until:
            time.sleep(0.2)
        assert kept.get_many(["new"])[0] is not None
        kept.close()
    finally:
        watch.send_signal(signal.SIGTERM)
        _, err = watch.communicate(timeout=60)
    assert watch.returncode == 0 and "1 asked" in err
    told = json.loads(run("for", "bundle", "--user", "new", "--store", "sqlite:k.db", "--json").stdout)
    assert told["rung"] == "fresh" and np.isfinite([p["score"] for p in told["items"]]).all()
    assert run("evaluate", "bundle", "--recompute").returncode == 0
