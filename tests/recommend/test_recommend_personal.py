"""One person and one bundle: words become items, a history becomes an answer, fresh histories become a certificate."""

import json
from dataclasses import replace

import pytest
import recommend_bundles as small

import toy_shop
from retouch.errors import ModelError, StoreDown, StoreError, UserError
from retouch.model import open_model
from retouch.recommend.bundle import open_bundle
from retouch.recommend.personal import answer_for, certify_on, check_reasons, codes_of, items_of, language_model
from retouch.recommend.stores import Past, open_store


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A bundle that names its language model, beside the model."""
    place = tmp_path_factory.mktemp("personal")
    toy_shop.language_model(tiny, place / "llm")
    run, tokeniser = small.world(open_model(place / "llm"))
    small.save(place / "bundle", run, tokeniser, settings={"n_history": 6, "llm": str(place / "llm")})
    return place


@pytest.fixture(scope="module")
def bundle(folder):
    return open_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def asking(folder):
    return open_bundle(folder / "bundle", knowledge=language_model(folder / "bundle"))


# ------------------------------------------------ words


def test_ids_and_titles_may_be_mixed_and_written_in_any_case(bundle):
    title = bundle.items[2].title
    assert items_of(bundle, f" i1 ;{title.upper()}; ; i4;") == ("i1", bundle.items[2].id, "i4")
    assert items_of(bundle, " ; ") == ()


def test_an_unknown_word_is_named_with_the_nearest_titles(bundle):
    with pytest.raises(
        UserError, match=r"'amber 2' is neither an id nor a title of this catalogue.*'amber 24', 'amber 12'"
    ):
        items_of(bundle, "i1; amber 2")
    with pytest.raises(UserError, match=r"'§§' is neither .* Nearest titles: none is near\."):
        items_of(bundle, "§§")


def test_a_year_behind_a_title_may_be_left_out_unless_two_are_meant(bundle):
    first, second, *rest = bundle.items
    dated = replace(first, title="Fargo (1996)")
    assert items_of(replace(bundle, items=(dated, second, *rest)), "fargo") == (first.id,)
    two = replace(bundle, items=(dated, replace(second, title="Fargo (2014)"), *rest))
    with pytest.raises(UserError, match=r"'Fargo \(1996\)', 'Fargo \(2014\)'"):
        items_of(two, "Fargo")


def test_a_title_may_hold_semicolons_and_the_longest_name_counts(bundle):
    first, second, third, *rest = bundle.items
    named = (
        replace(first, title="Love; Actually; Not"),
        replace(second, title="Love"),
        replace(third, title="love; actually"),
    )
    held = replace(bundle, items=(*named, *rest))
    assert items_of(held, "i9;Love; Actually; i4") == ("i9", third.id, "i4")
    assert items_of(held, "love; ACTUALLY; not;Love;i4;") == (first.id, second.id, "i4")


def test_of_equal_titles_none_is_chosen_silently(bundle):
    first, second, *rest = bundle.items
    held = replace(bundle, items=(replace(first, title="Sabrina"), replace(second, title="sabrina"), *rest))
    with pytest.raises(UserError, match=rf"'Sabrina' is the title of 2 items.*'{first.id}', '{second.id}'"):
        items_of(held, "Sabrina; i5")
    assert items_of(held, f"{second.id}; i5") == (second.id, "i5")


def test_an_item_is_found_with_its_codes(bundle):
    for number in (1, 10, 24):
        item = bundle.items[number - 1]
        for word in (item.id, item.title):
            assert codes_of(bundle, word) == (item, tuple(bundle.catalogue.codes[number - 1].tolist()))


# ------------------------------------------------ answers


def test_a_typed_history_needs_no_user_and_no_store(bundle):
    told = answer_for(bundle, "i1; i2; i3", k=4)
    assert len(told.items) == 4 and told.rung == "reference" and not told.reasons
    assert not {"i1", "i2", "i3"} & {place.id for place in told.items}
    assert [p.score for p in told.items] == sorted((p.score for p in told.items), reverse=True)


def test_asking_now_gives_fresh_knowledge(asking, bundle):
    told = answer_for(asking, "i1; i2; i3", ask=True, explain=True, k=3)
    assert (told.rung, told.lag) == ("fresh", 0)
    assert told.reasons and asking.groups and all(group.n_users >= 20 for group in asking.groups.values())
    for reason in told.reasons:
        drops = [part["drop"] for part in reason["parts"]]
        assert len(drops) == 2 and drops == sorted(drops, reverse=True)
        first = reason["parts"][0]
        named = asking.groups.get((first["book"], first["word"]))
        assert first["group"] == (str(named) if named else f"group {first['book'] + 1}-{first['word'] + 1}")
        assert (first["group"] in reason["sentence"]) == (first["drop"] > 0)
    assert [p.score for p in told.items] != [p.score for p in answer_for(bundle, "i1; i2; i3", k=3).items]


def test_asking_now_for_a_user_of_a_store_reads_that_users_history(asking, tmp_path):
    address = f"sqlite:{tmp_path / 'k.db'}"
    kept = open_store(address)
    kept.put_histories({"ann": Past(("i1", "i2", "i3"), 3)})
    kept.close()
    told = answer_for(asking, "", "ann", address, ask=True)
    assert (told.rung, told.lag) == ("fresh", 0)
    assert told.items == answer_for(asking, "i1;i2;i3", ask=True).items
    typed = answer_for(asking, "i4;i5", "ann", address, ask=True)
    assert typed.rung == "fresh" and typed.items == answer_for(asking, "i4;i5", ask=True).items
    with open_store(address)._reading() as c:  # nothing is left behind
        assert c.execute("SELECT COUNT(*) FROM records").fetchone() == (0,)


def test_somebody_must_be_asked_about(asking, bundle, tmp_path):
    address = f"sqlite:{tmp_path / 'k.db'}"
    for history, user, store in (("", "", ""), ("  ", "", address), ("", "ann", "")):
        with pytest.raises(UserError, match=r"Give a history, such as --history .* or a user with --store"):
            answer_for(bundle, history, user, store)
    with pytest.raises(UserError, match="There is no store at"):
        answer_for(asking, "", "ann", address, ask=True)
    open_store(address).close()
    with pytest.raises(UserError, match="knows no history of user 'ann'"):
        answer_for(asking, "", "ann", address, ask=True)
    with pytest.raises(UserError, match="was opened without its language model"):
        answer_for(bundle, "i1", ask=True)


def test_a_store_that_cannot_be_is_named(bundle, tmp_path):
    (tmp_path / "text.db").write_text("no database, but rather a text that is long enough" * 40)
    with pytest.raises(UserError, match="The store 'file:x' is not understood"):
        answer_for(bundle, "i1", store="file:x")
    with pytest.raises(StoreDown, match="does not answer"):
        answer_for(bundle, "i1", store=f"sqlite:{tmp_path / 'text.db'}")


# ------------------------------------------------ the language model


def test_the_bundles_own_model_is_opened_or_another_copy(folder):
    assert language_model(folder / "bundle").source == str(folder / "llm")
    (folder / "copy").symlink_to(folder / "llm")
    assert open_bundle(folder / "bundle", knowledge=language_model(folder / "bundle", str(folder / "copy"))).asks


def test_a_model_that_moved_or_was_never_named_is_asked_for(folder, tiny, tmp_path):
    run, tokeniser = small.world(open_model(folder / "llm"))
    small.save(tmp_path / "moved", run, tokeniser, settings={"n_history": 6, "llm": str(tmp_path / "gone")})
    with pytest.raises(UserError, match=r"was fitted with '.*gone', which does not open.* name it with --llm"):
        language_model(tmp_path / "moved")
    small.save(tmp_path / "mute", run, tokeniser)
    with pytest.raises(UserError, match="does not say which language model it was fitted with; name it with --llm"):
        language_model(tmp_path / "mute")
    with pytest.raises((ModelError, UserError), match="gone"):
        language_model(tmp_path / "mute", str(tmp_path / "gone"))


def test_another_model_is_refused(folder, tiny, tmp_path):
    other = toy_shop.language_model(tiny, tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match=r"language model|was made with"):
        open_bundle(folder / "bundle", knowledge=language_model(folder / "bundle", str(other)))


def test_a_folder_that_is_no_bundle_is_named(folder, tmp_path):
    for place in (tmp_path / "nowhere", folder / "llm"):
        with pytest.raises(StoreError):
            language_model(place)


# ------------------------------------------------ fresh histories


def test_fresh_histories_are_certified_by_their_last_items(asking, tmp_path):
    path = toy_shop.json_lines(tmp_path / "window.jsonl", seed=3, n_users=60)
    found = certify_on(asking, path)
    line = found.line()
    assert line.n == 60 and found.terms.limit == 0.9 and line.mean > 0
    assert found.about["bundle"] == asking.fingerprint
    assert certify_on(asking, path, 0.01).line().upper == line.upper
    assert not certify_on(asking, path, 0.01).holds


def test_reasons_are_checked_on_histories_without_a_language_model(bundle, tmp_path):
    path = toy_shop.json_lines(tmp_path / "window.jsonl", seed=3, n_users=20)
    found = check_reasons(bundle, path)
    assert found.n == 20 and found.mean > 0 and found.lower <= found.mean <= found.upper
    assert check_reasons(bundle, path) == found


def test_columns_of_fresh_histories_may_have_other_names(asking, tmp_path):
    names = ("who", "what", "when", "title")
    path = toy_shop.csv_file(tmp_path / "window.csv", seed=3, names=names)
    assert certify_on(asking, path, user="who", item="what", time="when").line().n == 130
    with pytest.raises(UserError, match=r"No column of window.csv is called 'user_id'"):
        certify_on(asking, path)


@pytest.mark.parametrize("limit", [0, -0.5, float("nan")])
def test_a_limit_is_above_zero(asking, tmp_path, limit):
    with pytest.raises(UserError, match="must be above 0"):
        certify_on(asking, toy_shop.json_lines(tmp_path / "w.jsonl"), limit)


def test_histories_that_prove_nothing_are_refused(asking, bundle, tmp_path):
    path = tmp_path / "strange.jsonl"
    path.write_text("\n".join(json.dumps({"user": u, "items": i}) for u, i in (("a", ["x", "y"]), ("b", ["i1", "z"]))))
    with pytest.raises(UserError, match=r"strange.jsonl: nobody has two items that the bundle's catalogue knows"):
        certify_on(asking, path)
    with pytest.raises(UserError, match="was opened without its language model"):
        certify_on(bundle, path)
    with pytest.raises(UserError, match="There is no file or folder"):
        certify_on(asking, tmp_path / "none.csv")


def test_a_long_history_of_titles_is_read(bundle):
    titled = replace(bundle, items=(replace(bundle.items[0], title="Love; Actually"), *bundle.items[1:]))
    assert items_of(titled, "; ".join(["i3", "love; actually", "i5"] * 300)) == ("i3", "i1", "i5") * 300
