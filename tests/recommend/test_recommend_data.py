"""Reading and cleaning interactions: every format, every bad input, the slow obvious way beside the fast one."""

import json
import logging
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.errors import UnknownName, UserError
from retouch.recommend._cleaning import Taken, clean, natural
from retouch.recommend.data import describe, load

ROWS = [("ann", "a", 3), ("ann", "b", 1), ("bob", "a", 2), ("bob", "c", 5), ("bob", "b", 5), ("cat", "c", 4)]
TITLES = {"a": "Amber", "b": "Birch", "c": "Cedar"}


def csv_file(folder, rows=ROWS, head="user_id,item_id,timestamp,title", name="data.csv"):
    lines = [head, *(f"{u},{i},{t},{TITLES.get(i, i)}" for u, i, t in rows)]
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def taken(data):
    return {data.users[u]: [data.items[i - 1].id for i in h] for u, h in enumerate(data.histories)}


SORTED = {"ann": ["b", "a"], "bob": ["a", "c", "b"], "cat": ["c"]}


# ---------------------------------------------------------------- formats


def test_csv_is_sorted_by_time_then_place_and_says_how_many_rows_were_not(tmp_path):
    data = load(csv_file(tmp_path), min_count=0)
    assert taken(data) == SORTED
    assert data.notes["out_of_order"] == 1
    assert data.notes["tied"] == pytest.approx(1 / 3)
    assert [item.text for item in data.items] == ["Amber", "Birch", "Cedar"]
    assert data.history(1).items == ("b", "a")
    assert [t.tolist() for t in data.times] == [[1, 3], [2, 5, 5], [4]]


def test_numbers_do_not_depend_on_the_order_of_the_rows(tmp_path):
    one = load(csv_file(tmp_path), min_count=0)
    rows = [r for r in ROWS if r[1:] not in {("c", 5), ("b", 5)}]
    other = load(csv_file(tmp_path, [ROWS[3], ROWS[4], *reversed(rows)], name="other.csv"), min_count=0)
    assert other.fingerprint == one.fingerprint


def test_a_quoted_csv_with_semicolons_and_a_line_end_in_a_cell(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('who;what;when;name\nann;a;1;"Amber; old\nand new"\nann;b;x;Birch\n')
    with pytest.raises(UserError, match=r"data\.csv line 4: 'x' in column 'when' is no time"):
        load(path, user="who", item="what", time="when", text=("name",), min_count=0)
    path.write_text(path.read_text().replace(";x;", ";2;"))
    data = load(path, user="who", item="what", time="when", text=("name",), min_count=0)
    assert data.items[0].title == "Amber; old and new"


def test_parquet_with_dates_and_numbers_as_ids(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import datetime

    import pyarrow.parquet as parquet

    days = [datetime.datetime(2014, 7, d) for d in (3, 1, 2)]
    table = arrow.table(
        {"user_id": [1, 1, 2], "item_id": [10.0, 9.0, 10.0], "timestamp": days, "title": ["x", "y", "x"]}
    )
    parquet.write_table(table, tmp_path / "data.parquet")
    data = load(tmp_path / "data.parquet", min_count=0)
    assert taken(data) == {"1": ["9", "10"], "2": ["10"]}
    assert data.times[0][1] - data.times[0][0] == 2 * 86_400 * 1_000_000


def test_atomic_files_take_all_tokens_as_text_and_floats_as_none(tmp_path):
    (tmp_path / "toy.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{u}\t{i}\t3\t{t}.5\n" for u, i, t in ROWS)
    )
    (tmp_path / "toy.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tprice:float\tclass:token_seq\n"
        "a\tAmber Road\t1996\t3.5\tCrime Drama\nb\tBirch\t\t1\t\nz\tunused\t\t1\t\nc\tCedar?\t\t2\tDrama\n"
    )
    data = load(tmp_path, min_count=0)
    assert taken(data) == SORTED
    assert [item.text for item in data.items] == [
        "Amber Road (1996). Class: Crime, Drama.",
        "Birch",
        "Cedar? Class: Drama.",
    ]
    assert data.items[0].categories == ("Crime", "Drama")
    assert data.times[0].tolist() == [1_500_000, 3_500_000]
    assert data.notes["described_unused"] == 1
    assert data.notes["format"] == "atomic"


def test_atomic_files_without_a_clock_keep_the_order_of_the_file(tmp_path):
    path = tmp_path / "toy.inter"
    path.write_text("user_id:token\titem_id:token\n" + "".join(f"{u}\t{i}\n" for u, i, _ in ROWS))
    data = load(path, min_count=0, allow_missing_text=True)
    assert data.times is None
    assert taken(data)["ann"] == ["a", "b"]


@pytest.mark.parametrize("kind", ["header", "bare", "json", "fields"])
def test_a_sequence_file_with_each_kind_of_titles(tmp_path, kind):
    (tmp_path / "toy.txt").write_text("ann b a\nbob a c b\n\ncat c\n")
    if kind in ("header", "bare"):
        head = "item_id\tasin\ttitle\n" if kind == "header" else ""
        asin = "x\t" if head else ""
        rows = "".join(f"{i}\t{asin}{t}, and more\n" for i, t in TITLES.items())
        (tmp_path / "toy.items.tsv").write_text(head + rows)
    else:
        records = {i: f"{t}, and more" if kind == "json" else {"title": f"{t}, and more"} for i, t in TITLES.items()}
        (tmp_path / "toy.items.json").write_text(json.dumps(records))
    data = load(tmp_path, min_count=0)
    assert taken(data) == SORTED
    assert data.times is None
    assert [item.text for item in data.items] == ["Amber, and more", "Birch, and more", "Cedar, and more"]


def test_a_file_of_titles_may_be_named(tmp_path):
    (tmp_path / "names.csv").write_text("item_id,title,brand\na,Amber,X\nb,Birch,\nc,Cedar,Y\n")
    data = load(csv_file(tmp_path, head="user_id,item_id,timestamp,other"), titles=tmp_path / "names.csv", min_count=0)
    assert [item.text for item in data.items] == ["Amber. Brand: X.", "Birch", "Cedar. Brand: Y."]


def test_ratings_are_ignored_until_a_least_one_is_asked_for(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("user_id,item_id,timestamp,rating,title\nann,a,1,5,A\nann,b,2,1,B\nbob,b,1,4,B\nbob,c,2,,C\n")
    assert load(path, min_count=0).lengths.sum() == 4
    with pytest.raises(UserError, match=r"line 5: the rating '' is no number"):
        load(path, min_count=0, min_rating=4)
    path.write_text(path.read_text().replace("2,,C", "2,2,C"))
    assert taken(load(path, min_count=0, min_rating=4)) == {"ann": ["a"], "bob": ["b"]}
    with pytest.raises(UserError, match="Lower min_rating"):
        load(path, min_count=0, min_rating=6)


# ---------------------------------------------------------------- what is wrong is named


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "data.csv is empty"),
        ("user_id,item_id,timestamp\n", "it has a header and no row"),
        ("user_id,item_id,user_id\n1,2,3\n", "'user_id' stands twice"),
        ("user_id,item_id,timestamp\nann,a,1\nann,b\n", "data.csv line 3 has 2 cells; the first line has 3"),
        ("user_id,item_id,timestamp\nann,a,1\n,b,2\n", "data.csv line 3: the user in column 'user_id' is empty"),
        ("user_id,item_id,timestamp\nann,a,1\nann, ,2\n", "data.csv line 3: the item in column 'item_id' is empty"),
        ("user_id,item_id,timestamp\nann,a,1\nann,b,nan\n", "data.csv line 3: 'nan' in column 'timestamp' is no time"),
        (
            "user_id,item_id,timestamp\nann,a,1\n\nann,b,inf\n",
            "data.csv line 4: 'inf' in column 'timestamp' is no time",
        ),
        ("user_id,item_id,timestamp\nann,a,1\nann,b,\n", "data.csv line 3: '' in column 'timestamp' is no time"),
        ("user_id,item_id,timestamp\nann,a,1e300\n", "'1e300' in column 'timestamp' is no time"),
        ('user_id,item_id,timestamp\nann,"a,1\n', "data.csv line 2 is no valid CSV"),
        ("user_id,item_id,timestamp,title\nann,a,1,A\nbob,a,1,A\n", "one item is left ('a')"),
        ("user_id,item_id,timestamp\nann,a,1\nann,b,2\n", "100.0% of the 2 items have no text, such as 'a'"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(path, min_count=0)
    assert said in str(error.value)


def test_other_bad_inputs_are_named(tmp_path):
    path = csv_file(tmp_path)
    with pytest.raises(UnknownName, match=r"No column of data\.csv is called 'user'\. Did you mean 'user_id'\?"):
        load(path, user="user")
    with pytest.raises(UnknownName, match=r"'brand'"):
        load(path, text=("title", "brand"))
    with pytest.raises(UserError, match=r"Did you mean 'data\.csv'\?"):
        load(tmp_path / "dat.csv")
    with pytest.raises(UnknownName, match=r"No format is called 'xml'"):
        load(path, format="xml")
    with pytest.raises(UserError, match=r"Nothing is left of 6 interactions.*Lower min_count"):
        load(path)
    (tmp_path / "other.csv").write_text(path.read_text())
    with pytest.raises(UserError, match=r"holds 2 files that may be the interactions \(data\.csv, other\.csv\)"):
        load(tmp_path)
    (tmp_path / "bad.csv").write_bytes(b"user_id,item_id,timestamp\nann,a,1\nann,\xff,2\n")
    with pytest.raises(UserError, match=r"bad\.csv line 3 is not UTF-8 text"):
        load(tmp_path / "bad.csv")
    (tmp_path / "bad.inter").write_text("user_id\titem_id:token\nann\ta\n")
    with pytest.raises(UserError, match=r"bad\.inter line 1: 'user_id' is no cell of an atomic file's header"):
        load(tmp_path / "bad.inter")
    (tmp_path / "ragged.inter").write_text("user_id:token\titem_id:token\nann\ta\n\nann\tb\tc\n")
    with pytest.raises(UserError, match=r"ragged\.inter line 4 has 3 cells; 2 were expected"):
        load(tmp_path / "ragged.inter")
    (tmp_path / "twice.txt").write_text("ann a b\nbob b\nann c\n")
    with pytest.raises(UserError, match=r"twice\.txt line 3: user 'ann' already stands on line 1"):
        load(tmp_path / "twice.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no interactions"):
        load(tmp_path / "empty")


def test_a_few_items_without_text_are_a_warning_and_may_be_many_when_allowed(tmp_path, caplog):
    rows = [("ann", f"x{i}", i) for i in range(9)] + [("ann", "bare", 99)]
    path = tmp_path / "data.csv"
    path.write_text(
        "user_id,item_id,timestamp,title\n" + "".join(f"{u},{i},{t},{'' if i == 'bare' else i}\n" for u, i, t in rows)
    )
    with caplog.at_level(logging.WARNING):
        data = load(path, min_count=0)
    assert "10.0% of the items have no text, such as 'bare'" in caplog.text
    assert data.notes["no_text"] == pytest.approx(0.1)
    assert (
        load(csv_file(tmp_path, head="user_id,item_id,timestamp,other"), min_count=0, allow_missing_text=True).n_items
        == 3
    )


def test_equal_titles_and_described_twice_are_counted(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("user_id,item_id,timestamp,title\nann,a,1,Same\nann,b,2,same\nann,c,3,Other\nbob,a,1,Changed\n")
    data = load(path, min_count=0)
    assert data.notes["equal_texts"] == 2
    assert data.items[0].text == "Same"  # the first row counts
    assert ("items whose text is also another's", 2) in describe(data).rows


# ---------------------------------------------------------------- cleaning


def test_duplicates_fall_and_repeats_stay_or_not(tmp_path):
    rows = [("ann", "a", 1), ("ann", "a", 1), ("ann", "a", 2), ("ann", "b", 3)]
    data = load(csv_file(tmp_path, rows), min_count=0)
    assert taken(data) == {"ann": ["a", "a", "b"]}
    assert (data.notes["duplicates"], data.notes["repeats"]) == (1, 1)
    assert taken(load(csv_file(tmp_path, rows), min_count=0, repeats="first")) == {"ann": ["a", "b"]}


def core(pairs, least):
    """The slow obvious core."""
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        kept = [(u, i) for u, i in pairs if users[u] >= least and items[i] >= least]
        if len(kept) == len(pairs):
            return kept
        pairs = kept


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=60),
    st.integers(0, 4),
)
def test_cleaning_equals_the_slow_obvious_way(rows, least):
    want = core([(u, i) for u, i, _ in sorted(dict.fromkeys(rows), key=lambda r: (r[0], r[2]))], least)
    columns = [np.array(column, np.int64) for column in zip(*rows)]
    if not want:
        with pytest.raises(UserError, match="Nothing is left"):
            clean(Taken(*columns), min_count=least, repeats="keep", ties="file", seed=0)
        return
    found = clean(Taken(*columns), min_count=least, repeats="keep", ties="file", seed=0)
    assert list(zip(found.users.tolist(), found.items.tolist())) == want


def test_ties_are_shuffled_by_the_seed_and_only_ties(tmp_path):
    rows = [("ann", f"x{i:02}", i // 10) for i in range(40)]
    path = csv_file(tmp_path, rows)
    by_file, one, other = (
        taken(load(path, min_count=0, **s))["ann"] for s in ({}, {"ties": "shuffle"}, {"ties": "shuffle", "seed": 1})
    )
    assert by_file != one != other
    for k in range(0, 40, 10):
        assert sorted(one[k : k + 10]) == by_file[k : k + 10]
    assert taken(load(path, min_count=0, ties="shuffle"))["ann"] == one


def test_ids_sort_by_value_and_then_as_text():
    assert natural(["x", "10", "9", "²", "1"]) == ["1", "9", "10", "x", "²"]


def test_each_part_changes_the_fingerprint(tmp_path):
    same = load(csv_file(tmp_path), min_count=0)
    changed = [("ann", "a", 9), *ROWS[1:]]
    prints = {
        load(csv_file(tmp_path, rows, name=f"{k}.csv"), min_count=0).fingerprint
        for k, rows in enumerate([ROWS, changed, ROWS[:-1]])
    }
    assert len(prints) == 3 and same.fingerprint in prints
    text = csv_file(tmp_path).read_text().replace("Amber", "Umber")
    (tmp_path / "text.csv").write_text(text)
    assert load(tmp_path / "text.csv", min_count=0).fingerprint not in prints


def test_a_large_file_is_read_without_a_loop_over_its_rows(tmp_path):
    chance = np.random.default_rng(0)
    n = 100_000
    columns = chance.integers(0, (3000, 900, 10**9), (n, 3))
    path = tmp_path / "big.csv"
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(map(",".join, columns.astype(str).tolist())))
    calls = 0

    def trace(frame, event, arg):
        nonlocal calls
        calls += event == "call" and "recommend" in frame.f_code.co_filename

    sys.setprofile(trace)
    try:
        data = load(path, allow_missing_text=True)
    finally:
        sys.setprofile(None)
    assert data.lengths.sum() == data.notes["read"] - data.notes["duplicates"] - data.notes["rare"] > 90_000
    assert calls < n / 10


def test_reading_loads_no_torch():
    code = "import sys, retouch.recommend.base, retouch.recommend.splits, retouch.recommend.evaluate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- real


def test_movielens_as_published(data_dir):
    raw = load(data_dir / "ml-100k", min_count=0)
    assert (raw.n_users, raw.n_items, int(raw.lengths.sum())) == (943, 1682, 100_000)
    data = load(data_dir / "ml-100k")
    assert (data.n_users, data.n_items, int(data.lengths.sum())) == (943, 1349, 99_287)
    assert (data.lengths.min(), np.median(data.lengths), data.lengths.max()) == (19, 64, 648)
    assert data.notes["tied"] == pytest.approx(0.51, abs=0.005)
    assert data.notes["tied_last"] == pytest.approx(0.44, abs=0.005)
    first = data.items[data.item_numbers["1"] - 1]
    assert first.text == "Toy Story (1995). Genres: Animation, Children's, Comedy."
    assert first.categories == ("Animation", "Children's", "Comedy")
    assert any("é" in item.title for item in data.items)  # Latin-1


def test_beauty_as_published(data_dir, caplog):
    with caplog.at_level(logging.WARNING):
        data = load(data_dir / "amazon-beauty")
    assert (data.n_users, data.n_items, int(data.lengths.sum())) == (22_363, 12_101, 198_502)
    assert data.items[0].title.startswith("OPI Nail Lacquer")
    assert data.notes["equal_texts_share"] == pytest.approx(0.005, abs=0.001)
    assert 0 < data.notes["no_text"] < 0.001
    assert "have no text" in caplog.text
    assert not any(h[-1] in h[:-1] for h in data.histories)


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_a_line_of_blanks_is_no_line(tmp_path, line):
    (tmp_path / "toy.txt").write_text(f"ann b a\n{line}\nbob a c b\n{line}\ncat c\n{line}")
    data = load(tmp_path / "toy.txt", min_count=0, allow_missing_text=True)
    assert taken(data) == SORTED
    (tmp_path / "twice.txt").write_text(f"ann b a\n{line}\nann c\n")
    with pytest.raises(UserError, match="line 3: user 'ann' already stands on line 1"):
        load(tmp_path / "twice.txt", min_count=0, allow_missing_text=True)


def test_ids_inside_of_a_map_are_no_text_and_its_keys_count(tmp_path):
    (tmp_path / "toy.txt").write_text("ann b a\nbob a c b\ncat c\n")
    fields = {"a": {"item_id": "a", "title": "Amber"}, "b": {"title": "Birch", "asin": "b"}, "c": {"title": "Cedar"}}
    (tmp_path / "toy.items.json").write_text(json.dumps(fields))
    data = load(tmp_path / "toy.txt", min_count=0)
    assert [item.text for item in data.items] == ["Amber", "Birch", "Cedar"]
    asked = load(tmp_path / "toy.txt", min_count=0, text=("title", "asin"))
    assert asked.items[1].text == "Birch. Asin: b."


def test_a_title_comes_before_another_column_that_is_a_name(tmp_path):
    (tmp_path / "toy.inter").write_text("user_id:token\titem_id:token\n" + "".join(f"{u}\t{i}\n" for u, i, _ in ROWS))
    rows = "".join(f"{i}\tAcme\t{title}\n" for i, title in TITLES.items())
    (tmp_path / "toy.item").write_text(f"item_id:token\tbrand_name:token\ttitle:token\n{rows}")
    data = load(tmp_path, min_count=0)
    assert next((item.title, item.text) for item in data.items) == ("Amber", "Amber. Brand name: Acme.")


def test_numbers_of_any_length_have_an_order():
    long = ["9" * 5000, "1" + "0" * 5000, "007", "8", "7", "-1", "x"]
    assert natural(long) == ["007", "7", "8", "9" * 5000, "1" + "0" * 5000, "-1", "x"]


def test_parquet_of_other_writers(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from decimal import Decimal

    def read(times):
        ids = {"user_id": ["ann", "ann", "bob"], "item_id": arrow.array([b"a", b"b ", b"a"])}
        titles = arrow.array([b"Amber", b"Birch", b"Amber"])
        parquet.write_table(arrow.table({**ids, "timestamp": times, "title": titles}), tmp_path / "data.parquet")
        return load(tmp_path / "data.parquet", min_count=0)

    big = 2**60
    data = read([Decimal(big + 1), Decimal(big), Decimal(3)])
    assert taken(data) == {"ann": ["b", "a"], "bob": ["a"]} and data.times[0].tolist() == [big, big + 1]
    assert [item.text for item in data.items] == ["Amber", "Birch"]
    assert read([Decimal("2.5"), Decimal(2), Decimal(3)]).times[0].tolist() == [2_000_000, 2_500_000]
    fine = arrow.array([1_600_000_000_000_000_000, 1_600_000_000_000_001_000, 0], arrow.timestamp("ns"))
    assert np.diff(read(fine).times[0]).tolist() == [1]
    zoned = arrow.array([3_000_000_999, 1_000_000_001, 7], arrow.timestamp("ns", "UTC"))  # finer than Python's times
    data = read(zoned)
    assert taken(data) == {"ann": ["b", "a"], "bob": ["a"]} and np.diff(data.times[0]).tolist() == [2_000_000]


def test_columns_of_a_map_may_stand_in_any_order_and_spelling(tmp_path):
    (tmp_path / "names.csv").write_text("Title,Price,ItemID\nAmber,3,a\nBirch,4,b\nCedar,5,c\n")
    bare = csv_file(tmp_path, head="user_id,item_id,timestamp,other")
    data = load(bare, titles=tmp_path / "names.csv", min_count=0)
    assert [item.text for item in data.items] == ["Amber", "Birch", "Cedar"]
    own = load(csv_file(tmp_path, head="user_id,item_id,timestamp,Title", name="own.csv"), min_count=0)
    assert [item.text for item in own.items] == ["Amber", "Birch", "Cedar"]


def test_an_id_that_no_request_could_name_is_refused(tmp_path):
    (tmp_path / "long.csv").write_text("user_id,item_id,timestamp\nann,i1,1\nann," + "x" * 257 + ",2\n")
    with pytest.raises(UserError, match=r"long\.csv: the id of item 'x+\.\.\. must have 1 to 256 characters; got 257"):
        load(tmp_path / "long.csv", min_count=0)
