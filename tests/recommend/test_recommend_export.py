"""Files for RecBole, read back: the same users and targets, no test item in training, each part what the split says."""

from collections import Counter

import numpy as np
import pytest
import recommend_made as made

from retouch.errors import StoreError, UserError
from retouch.recommend.base import Item
from retouch.recommend.export import write_benchmark
from retouch.recommend.splits import split, windows


def table(folder, part):
    """Return the header and the rows of one file."""
    head, *rows = (folder / f"{folder.name}.{part}.inter").read_text(encoding="utf-8").splitlines()
    return head.split("\t"), [row.split("\t") for row in rows]


def distinct(n_users=40, seed=0):
    """Histories without repeats, some of them as short as one item."""
    chance = np.random.default_rng(seed)
    histories = [chance.permutation(30)[: chance.integers(1, 12)] + 1 for _ in range(n_users)]
    return made.interactions(histories, 30, [np.arange(len(h)) for h in histories])


@pytest.mark.parametrize("holdout", ["users", "targets"])
@pytest.mark.parametrize("how", ["leave-one-out", "time"])
def test_every_sample_of_the_split_has_its_row(tmp_path, how, holdout):
    data = made.random_data(seed=3)
    splits = split(data, how, holdout)
    folder = write_benchmark(data, splits, tmp_path / "out", n_history=4)
    for part in ("train", "valid", "test"):
        head, rows = table(folder, part)
        assert head == ["user_id:token", "item_id_list:token_seq", "item_id:token"]
        samples = splits.of(part)
        seen, targets = windows(data, samples, 4)
        for row, user, window, target in zip(rows, samples.users, seen, targets, strict=True):
            assert row == [f"u{user}", " ".join(f"i{i}" for i in window if i), f"i{target}"]
            assert 1 <= len(row[1].split()) <= 4, "RecBole cannot read a row without a history"


@pytest.mark.parametrize("holdout", ["users", "targets"])
def test_no_test_item_of_a_user_is_in_training(tmp_path, holdout):
    data = distinct()
    folder = write_benchmark(data, split(data, holdout=holdout), tmp_path / "out", n_history=50)
    last = {f"u{u}": f"i{h[-1]}" for u, h in enumerate(data.histories, 1) if len(h) >= 3}
    assert {row[0]: row[2] for row in table(folder, "test")[1]} == last, "the same users with the same target"
    for user, history, target in table(folder, "train")[1]:
        assert last.get(user) not in {target, *history.split()}
    for user, item in table(folder, "plain")[1]:
        assert last.get(user) != item
    valid = {row[0]: row[2] for row in table(folder, "valid")[1]}
    for user, history, target in table(folder, "train")[1]:
        assert valid.get(user) not in {target, *history.split()}


@pytest.mark.parametrize("holdout", ["users", "targets"])
@pytest.mark.parametrize("how", ["leave-one-out", "time"])
def test_plain_rows_are_what_popularity_counts(tmp_path, how, holdout):
    data = distinct(seed=1) if how == "leave-one-out" else made.random_data(seed=1)
    splits = split(data, how, holdout)
    folder = write_benchmark(data, splits, tmp_path / "out")
    counted = Counter(item for _, item in table(folder, "plain")[1])
    assert [counted[f"i{i}"] for i in range(1, data.n_items + 1)] == splits.counts[1:].tolist()


def test_the_files_bear_the_name_of_the_folder_and_give_way_to_new_ones(tmp_path):
    data = made.random_data()
    folder = write_benchmark(data, split(data), tmp_path / "shop")
    before = (folder / "shop.train.inter").read_bytes()
    write_benchmark(data, split(data, seed=1), folder)
    assert (folder / "shop.train.inter").read_bytes() != before
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json", *(f"shop.{part}.inter" for part in ("train", "valid", "test", "plain"))
    }  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(StoreError, match="will not be replaced"):
        write_benchmark(data, split(data), tmp_path / "mine")


@pytest.mark.parametrize("bad", ["two words", "a\tb", "", 'six"'])
def test_an_id_that_such_a_file_cannot_hold_is_named(tmp_path, bad):
    data = made.random_data()
    splits = split(data)
    items = (Item(bad, "text", "title"), *data.items[1:])
    changed = type(data)(data.name, data.users, items, data.histories, data.times, data.fingerprint)
    with pytest.raises(UserError, match="item id"):
        write_benchmark(changed, splits, tmp_path / "out")
    with pytest.raises(UserError, match="n_history must be at least 1; got 0"):
        write_benchmark(data, splits, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
