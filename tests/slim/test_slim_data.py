"""Reading labelled texts, keeping the splits apart, and the metrics."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from retouch.errors import UnknownName, UserError
from retouch.slim._folders import hub_splits
from retouch.slim._layouts import rows_of
from retouch.slim._reading import Table
from retouch.slim.data import Example, digest, make_task, quality, read
from retouch.slim.splits import Spans, carve, folded, groups
from retouch.store import key, sha256_file

SPLITS = ("train", "valid", "calib", "test")


def plain(rows):
    return [(e.text, e.pair, e.label) for e in rows]


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def some(n, start=0, pair=False):
    return [Example(f"text number {i} of some", f"other {i}" if pair else None, str(i % 2)) for i in range(start, n)]


def lines(examples, header="text\tlabel"):
    rows = ["\t".join([e.text, *([e.pair] if e.pair else []), str(e.label)]) for e in examples]
    return "\n".join([header, *rows, ""])


# Formats


def test_every_form_of_a_file_gives_the_same_rows(tmp_path):
    texts, labels = ['He said "no" , twice', "a, b; naïve"], ["neg", "pos"]
    files = {
        "a.tsv": "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in zip(texts, labels)),
        "a.csv": 'label,text\nneg,"He said ""no"" , twice"\npos,"a, b; naïve"\n',
        "a.jsonl": "".join(json.dumps({"label": y, "text": t, "id": 1}) + "\n" for t, y in zip(texts, labels)),
        "a.json": json.dumps([{"text": t, "label": y} for t, y in zip(texts, labels)]),
        "a.all": "".join(f"{y} {t}\n" for t, y in zip(texts, labels)),
    }
    wanted = list(zip(texts, [None, None], labels))
    for name, text in files.items():
        assert plain(read(put(tmp_path / name, text))) == wanted, name


def test_parquet_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow to test Parquet")
    from pyarrow import parquet

    table = pa.table({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0.0, 1.0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert plain(read(tmp_path / "a.parquet")) == [("a", "c", "0"), ("b", "d", "1")]
    parquet.write_table(pa.table({"text": ["a", "b"], "label": [0.5, float("nan")]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet row 2: the label is missing"):
        read(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"c.parquet cannot be read as Parquet"):
        read(put(tmp_path / "c.parquet", "no such thing"))


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(put(tmp_path / "a.parquet", "x"))


def test_without_datasets_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"no file or folder 'owner/a-set'.*pip install datasets"):
        read("owner/a-set")


def test_the_name_of_a_file_that_is_not_there_is_no_data_set(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError) as caught:
        read("nofile.tsv")
    assert "There is no file or folder 'nofile.tsv'" in str(caught.value) and "install" not in str(caught.value)


def test_a_hub_set_gives_names_for_classes_and_leaves_hidden_labels_out():
    datasets = pytest.importorskip("datasets", reason="pip install datasets to test sets of the hub")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )

    def loaded(**labels):
        return {
            split: datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": two}, features=features)
            for split, two in labels.items()
        }

    found = hub_splits("o/s", loaded(train=[1, 0], validation=[0, 1], test=[-1, -1]))
    assert {name: plain(rows) for name, rows in found.items()} == {
        "train": [("a", None, "yes"), ("b", None, "no")],
        "test": [("a", None, "no"), ("b", None, "yes")],
    }
    assert found["train"].names == ("no", "yes")
    found = hub_splits("o/s", loaded(train=[1, 0], validation=[0, 1], test=[1, 1]))
    assert [plain(found[split])[0][2] for split in ("train", "valid", "test")] == ["yes", "no", "yes"]
    with pytest.raises(UserError, match="no split 'train' with labels; it has validation"):
        hub_splits("o/s", loaded(validation=[0, 1]))


def test_marks_line_ends_and_quotes_of_tsv_are_kept_as_they_are(tmp_path):
    text = '\ufefftext\tlabel\r\n"an open quote\t0\r\n"both"  \t1\r\nnext\x85line\u2028same\t1'
    assert plain(read(put(tmp_path / "a.tsv", text))) == [
        ('"an open quote', None, "0"),
        ('"both"', None, "1"),
        ("next\x85line\u2028same", None, "1"),
    ]


def test_a_quoted_field_of_csv_may_hold_line_ends(tmp_path):
    path = put(tmp_path / "a.csv", 'text,label\r\n"two\r\nlines",0\r\nthe\x85rest,1\r\n')
    assert plain(read(path)) == [("two\r\nlines", None, "0"), ("the\x85rest", None, "1")]
    assert list(read(path).table.lines) == [2, 4]


@pytest.mark.parametrize(
    ("header", "row", "wanted"),
    [
        ("index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", ("a", "b", "entailment")),
        ("index\tquestion\tsentence\tlabel", "0\ta\tb\tx", ("a", "b", "x")),
        ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\ta\tb\t1", ("a", "b", "1")),
        ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t8\t9\ta\tb", ("a", "b", "1")),
        ("index\tsentence1\tsentence2\tlabel1\tgold_label", "0\ta\tb\tx\ty", ("a", "b", "y")),
        ("index\tgenre\tsentence1\tsentence2\tscore", "0\tg\ta\tb\t3.800", ("a", "b", "3.800")),
        ("label\ttext2\ttext", "1\tb\ta", ("a", "b", "1")),
        ("gj04\t0\t*\tThey made him.", "gj04\t1\t\tThey did.", ("They did.", None, "1")),
        ("g\tm\ty\t1\t5.000\tc\td", "g\tm\ty\t4\t4.750\ta\tb\tx\ty", ("a", "b", "4.750")),
        ("a long text\tWorld", "another\tSports", ("another", None, "Sports")),
    ],
)
def test_columns_are_known_by_their_published_names(tmp_path, header, row, wanted):
    assert plain(read(put(tmp_path / "a.tsv", f"{header}\n{row}\n")))[-1] == wanted


def test_other_column_names_can_be_said(tmp_path):
    path = put(tmp_path / "a.csv", "Review,Stars\ngood,5\nbad,1\nbad too,1\nfine,5\n")
    assert plain(read(path, columns={"text": "review", "label": "stars"}))[0] == ("good", None, "5")
    with pytest.raises(UserError, match=r"no label column. Its columns: Review, Stars.*columns="):
        read(path)
    with pytest.raises(UserError, match="no column 'note'"):
        read(path, columns={"text": "review", "label": "note"})
    with pytest.raises(UserError, match="columns names 'text', 'label'"):
        read(path, columns={"text": "review"})


def test_broken_rows_of_a_set_published_with_some_are_left_out_and_counted(tmp_path, caplog):
    path = put(
        tmp_path / "a.tsv", "id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t1\n1\tonly\n2\tc\t\t0\n3\td\te\t0\n"
    )
    rows = read(path)
    assert plain(rows) == [("a", "b", "1"), ("d", "e", "0")]
    assert rows.skipped == 2
    assert "left out 2 broken rows" in caplog.text


# Bad input

BAD = {
    "a.tsv": [
        ("", r"a.tsv is empty"),
        ("\ufeff\n \n", r"a.tsv is empty"),
        ("text\tlabel\n", r"a.tsv holds a header and no rows"),
        ("text\tmark\nx\t1\n", r"a.tsv has no label column. Its columns: text, mark"),
        ("body\tlabel\nx\t1\n", r"a.tsv has no column of texts"),
        ("no tabs here\nnor here\n", r"a.tsv has no label column"),
        ("text\tlabel\tText\nx\t1\ty\n", r"a.tsv: the column 'text' stands twice"),
        ("text\tlabel\nx\t1\n\ny\t2\t3\nz\n", r"a.tsv line 4: has 3 cells where the first line has 2"),
        ("some text\t1\nx\t1\ny\t2\t3\n", r"a.tsv line 3: has 3 cells"),
        ("text\tlabel\nx\t1\n \t0\n\t1\n", r"a.tsv line 3, 4: the text is empty"),
        ("text\tlabel\nx\t1\ny\t \n", r"a.tsv line 3: the label is missing"),
        (b"text\tlabel\nx\t1\ncaf\xe9\t0\n", r"a.tsv line 3 is not UTF-8"),
        ("text\tlabel\nx\t1\n".encode("utf-16"), r"a.tsv is not UTF-8 text: byte 3 is zero"),
    ],
    "a.csv": [
        ('text,label\nx,1\n"open,0\n', r"a.csv line 3 is no valid CSV"),
        ('text,label\nx,1\n"a" b,0\n', r"a.csv line 3 is no valid CSV"),
        ("text,label\nx,1\na, b,0\n", r"a.csv line 3: has 3 cells"),
        ("text,label,label\nx,1,1\n", r"the column 'label' stands twice"),
    ],
    "a.jsonl": [
        ('{"text": "x", "label": 1}\n{"text": "y"\n', r"a.jsonl line 2 is not valid JSON"),
        ('{"text": "x", "label": 1}\n{"text": "y"}\n', r"a.jsonl line 2: the label is missing"),
        ('{"text": "x", "label": 1}\n{"label": 0}\n', r"a.jsonl line 2: the text is empty"),
        ('{"text": 3, "label": 1}\n', r"a.jsonl line 1: no text"),
        ('{"text": "x", "label": [1, 2]}\n', r"line 1: the label must be a text or a number"),
        ('{"text": "x", "label": NaN}\n', r"line 1: the label is missing"),
        ('{"text": "x", "text": "y", "label": 1}\n', r"line 1 is not valid JSON: the name 'text' is given twice"),
        ('["x", 1]\n', r"record 1 must be an object"),
        ("[]\n", r"a.jsonl is empty"),
    ],
    "a.txt": [("word\nthe second\n", r"a.txt line 1 is no 'label text'")],
}


@pytest.mark.parametrize(("name", "text", "message"), [(name, *case) for name, cases in BAD.items() for case in cases])
def test_a_file_that_cannot_be_used_says_where(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read(put(tmp_path / name, text))


def test_a_column_of_numbers_in_a_file_without_a_header_is_no_text(tmp_path):
    rows = [(f"{i}\tfilm {i} was seen\t{i % 2}", f"film {i} was seen") for i in range(8)]
    found = read(put(tmp_path / "a.tsv", "\n".join(row for row, _ in rows)))
    assert [(e.text, e.pair) for e in found] == [(text, None) for _, text in rows]
    with pytest.raises(UserError, match=r"a.tsv has no label column"):
        read(put(tmp_path / "a.tsv", "1\t0\n2\t1\n3\t0\n"))


@pytest.mark.parametrize("name", ["TREC.all", "stsa.fine.train", "stsa.fine.dev", "train_5500.label"])
def test_lines_that_begin_with_a_label_may_be_latin_1(tmp_path, name):
    found = read(put(tmp_path / name, "1 caf\xe9\n0 bar\n".encode("latin-1")))
    assert [(e.label, e.text) for e in found] == [("1", "caf\xe9"), ("0", "bar")]


def test_a_cell_may_be_as_long_as_a_book(tmp_path):
    usual, book = csv.field_size_limit(), "word " * 40_000
    found = read(put(tmp_path / "a.csv", f'text,label\n"{book}",1\nshort,0\n'))
    assert found[0].text == book.strip()
    assert csv.field_size_limit() == usual


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_other_separators_are_named(tmp_path, mark):
    with pytest.raises(UserError, match=r"Save it with commas, or as .tsv"):
        read(put(tmp_path / "a.csv", f"text{mark}label\nx{mark}1\n"))


def test_rows_on_which_annotators_did_not_agree_are_left_out_and_counted(tmp_path, caplog):
    texts = "gold_label\tsentence1\tsentence2\nneutral\ta\tb\n-\tc\td\nentailment\te\tf\n"
    found = read(put(tmp_path / "snli.tsv", texts))
    assert [e.label for e in found] == ["neutral", "entailment"]
    assert found.skipped == 1 and "did not agree" in caplog.text
    with pytest.raises(UserError, match="label is '-'"):
        read(put(tmp_path / "none.tsv", "gold_label\tsentence1\tsentence2\n-\tc\td\n"))


def test_a_wrong_path_names_the_nearest(tmp_path):
    put(tmp_path / "train.tsv", lines(some(4)))
    with pytest.raises(UserError, match=r"Did you mean 'train.tsv'"):
        read(tmp_path / "trian.tsv")


# Splits of a folder


def files(folder):
    return {split: rows["file"] for split, rows in make_task(folder).recipe["files"].items()}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("train.tsv", "valid.tsv", "test.tsv"), {"train": "train.tsv", "valid": "valid.tsv", "test": "test.tsv"}),
        (("train.tsv", "dev.tsv", "test.tsv"), {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}),
        (("train.tsv", "dev.tsv"), {"train": "train.tsv", "test": "dev.tsv"}),
        (("train.tsv", "calib.tsv"), {"train": "train.tsv", "calib": "calib.tsv"}),
        (("x.train10k.tsv", "x.test.tsv"), {"train": "x.train10k.tsv", "test": "x.test.tsv"}),
        (("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"), {"train": "train.tsv", "test": "dev_matched.tsv"}),
    ],
)
def test_the_files_of_a_folder_serve_by_their_names(tmp_path, names, wanted):
    for i, name in enumerate(names):
        put(tmp_path / name, lines(some(40 * (i + 1), 40 * i)))
    assert files(tmp_path) == wanted


def test_a_folder_of_glue_reports_on_dev_and_never_opens_its_test(tmp_path):
    folder = tmp_path / "any"
    put(folder / "train.tsv", lines(some(40), "sentence\tlabel"))
    put(folder / "dev.tsv", lines(some(60, 40), "sentence\tlabel"))
    put(folder / "test.tsv", "index\tsentence\n0\tno labels here\n")
    assert files(folder) == {"train": "train.tsv", "test": "dev.tsv"}


def test_a_labelled_test_file_beside_columns_as_in_glue_is_what_is_reported_on(tmp_path):
    for i, split in enumerate(("train", "dev", "test")):
        put(tmp_path / "any" / f"{split}.tsv", lines(some(40 * (i + 1), 40 * i), "sentence\tlabel"))
    assert files(tmp_path / "any") == {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}


def test_several_sets_in_a_folder_are_told_by_the_beginning_of_their_names(tmp_path):
    for name in ("a.train.all", "a.test.all", "b.train.all"):
        put(tmp_path / name, "".join(f"{i % 2} {name} {i}\n" for i in range(40)))
    with pytest.raises(UserError, match=r"several data sets \(a.train.all, b.train.all\). Name one: .*/a$"):
        make_task(tmp_path)
    assert files(tmp_path / "a") == {"train": "a.train.all", "test": "a.test.all"}
    with pytest.raises(UserError, match=r"has no split 'test'; it has train"):
        read(tmp_path / "b", "test")


def test_two_files_for_one_split_are_refused(tmp_path):
    for name in ("train.tsv", "train.csv"):
        put(tmp_path / name, "text,label\n")
    with pytest.raises(UserError, match=r"several files for train: train.csv, train.tsv"):
        make_task(tmp_path)
    with pytest.raises(UserError, match=r"holds no file train.tsv"):
        make_task(put(tmp_path / "empty" / "notes.md", "x").parent)


# Labels and checks of a task


def test_classes_are_sorted_numbers_by_value_and_may_be_ordered():
    rows = [Example(f"t{i} x", None, label) for i, label in enumerate(["10", "9", "2"] * 10)]
    task = make_task(rows, n_calib=3, n_valid=3)
    assert task.labels == ("2", "9", "10")
    named = [Example(f"t{i} x", None, label) for i, label in enumerate(["no", "yes"] * 10)]
    assert make_task(named, n_calib=1, n_valid=1).labels == ("no", "yes")
    task = make_task(named, labels=("yes", "no"), n_calib=0, n_valid=0)
    assert [e.label for e in task.train[:2]] == [1, 0]
    assert task.calib == task.valid == task.test == ()
    with pytest.raises(UserError, match="the labels no, which are not among yes, maybe"):
        make_task(named, labels=("yes", "maybe"))


def test_classes_stand_in_the_order_that_the_set_gives_them():
    rows = tuple(Example(f"text {i}", None, ("equivalent", "not_equivalent")[i % 2]) for i in range(40))
    named = replace(rows_of(Table("x", ("text", "label"), [(e.text, e.label) for e in rows], range(40))),
                    names=("not_equivalent", "equivalent", "never"))  # fmt: skip
    assert make_task(named).labels == ("not_equivalent", "equivalent")
    assert make_task(rows).labels == ("equivalent", "not_equivalent")


def test_pairs_beside_single_texts_are_refused():
    single = [Example(f"text {i}", None, i % 2) for i in range(40)]
    pairs = [Example(f"one {i}", f"other {i}", i % 2) for i in range(40)]
    with pytest.raises(UserError, match="valid has pairs of texts, and the training rows are single texts"):
        make_task(single, pairs)
    with pytest.raises(UserError, match="test has single texts, and the training rows are pairs"):
        make_task(pairs, test=single)


def test_numbers_with_fractions_make_a_regression(tmp_path):
    rows = [Example(f"t{i} x", None, i / 7) for i in range(30)]
    task = make_task(rows)
    assert (task.labels, task.metric) == (None, "spearman")
    assert all(isinstance(e.label, float) for e in task.train)
    whole = [Example(f"t{i} x", None, i) for i in range(30)]
    assert make_task(whole, metric="spearman").labels is None
    for label, shown in (("nan", "'nan'"), ("high", "'high'"), (float("inf"), "inf")):
        with pytest.raises(UserError, match=f"train example 31: a label must be a finite number; got {shown}"):
            make_task([*rows, Example("x", None, label)])
    with pytest.raises(UserError, match=r"All labels of the training rows are 2.5"):
        make_task([Example(f"t{i} x", None, 2.5) for i in range(30)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": [Example(f"t{i}", None, "yes") for i in range(9)]}, "All labels of train are 'yes'"),
        ({"train": []}, "train holds no examples"),
        ({"train": [Example(" ", None, "0"), *some(9)]}, "train example 1: the text is empty"),
        ({"train": [Example(f"t{i}", None, f"{i}") for i in range(30)]}, r"30 different labels.*metric='spearman'"),
        ({"test": [Example("t", None, "2")]}, "test example 1: label 2 does not occur in the training rows.* 0, 1"),
        ({"valid": [Example("t", None, "x"), *some(3)]}, "valid example 1: label x does not occur"),
        ({"valid": some(60, 50), "test": some(60, 50)}, "valid and test are the same rows"),
        ({"calib": some(40)}, "train and calib are the same rows"),
        ({"valid": some(60, 50), "n_valid": 3}, "valid is given, and n_valid says"),
        ({"n_calib": -1}, "n_calib must be 0 or more"),
        ({"n_calib": 30, "n_valid": 30}, "60 rows are to be held back, .* only 40 roots"),
        ({"n_calib": 20, "n_valid": 20}, "No row is left to train on"),
        ({"max_train": 0}, "max_train must be at least 1"),
        ({"max_train": 1}, "All labels of the training rows that are left"),
        ({"calib": [*some(40), Example("text number 50", None, "1")]}, "Every training row overlaps"),
    ],
)
def test_a_task_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        make_task(**({"train": some(40)} | change))


def test_an_unknown_metric_is_named():
    with pytest.raises(UnknownName, match="Did you mean 'accuracy'"):
        make_task(some(40), metric="acuracy")


def test_a_class_that_the_draws_take_away_is_said(caplog):
    rows = [*some(40), Example("the only one", None, "rare")]
    make_task(rows, max_train=5, seed=1)
    assert "No training row of rare is left" in caplog.text
    with pytest.raises(UserError, match="test has rows of rare, and no training row of it is left"):
        make_task(rows, max_train=5, seed=1, test=[*some(9, 60), Example("another one", None, "rare")])


# Keeping rows apart


texts = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=12)


@given(texts=texts, inside=texts)
@settings(max_examples=150, deadline=None)
def test_the_index_counts_what_looking_everywhere_counts(texts, inside):
    spans = Spans([*texts, *inside])

    def times(one, other):
        one, other = one.split(), other.split()
        return sum(other[i : i + len(one)] == one for i in range(len(other)))

    wanted = [sum(times(text, other) for other in {*inside}) for text in spans.rows]
    assert spans.inside({*inside}).tolist() == wanted
    alone = [text for text in spans.rows if sum(times(text, other) for other in spans.rows) == 1]
    assert spans.roots() == alone


def within(text, others):
    return any(f" {folded(text)} " in f" {folded(other)} " for other in others)


@given(texts=texts, seed=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_no_held_text_nor_a_run_of_one_is_trained_on(texts, seed):
    rows = [Example(text.upper() if i % 3 else f" {text}", None, i % 2) for i, text in enumerate(texts)]
    rows += [Example("d e", None, 1), Example("e f", None, 0), Example("f d", None, 0)]
    held = carve(rows, n_calib=1, n_valid=1, seed=seed)
    drawn = [rows[i].text for i in (*held.calib, *held.valid)]
    assert len({*held.calib, *held.valid}) == 2
    assert not any(within(rows[i].text, drawn) for i in held.train)
    gone = {*range(len(rows))} - {*held.train, *held.calib, *held.valid}
    assert all(within(rows[i].text, drawn) for i in gone)
    assert len(gone) == held.facts["dropped"]


def test_where_most_rows_are_phrases_whole_sentences_are_drawn():
    chance = random.Random(0)
    sentences = [" ".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(20)]
    phrases = [" ".join(s.split()[i : i + 4]) for s in sentences for i in range(8)]
    rows = [Example(t, None, i % 2) for i, t in enumerate([*phrases, "quite short", *sentences])]
    held = carve(rows, n_calib=4, n_valid=3)
    assert held.facts["min_words"] == 10
    assert all(rows[i].text in sentences for i in (*held.calib, *held.valid))
    assert held.facts["dropped"] == 7 * 8


def test_groups_are_what_walking_from_row_to_row_reaches():
    chance = random.Random(3)
    rows = [(f"s{chance.randrange(40)}", f"s{chance.randrange(40)}") for _ in range(30)]
    walked = []
    for start in range(len(rows)):
        found, texts = {start}, {*rows[start]}
        while more := {i for i, row in enumerate(rows) if i not in found and texts & {*row}}:
            found |= more
            texts |= {text for i in more for text in rows[i]}
        if min(found) == start:
            walked.append(sorted(found))
    assert groups(rows) == walked


def test_pairs_that_share_a_text_stay_together():
    rows = [Example(f"one {i // 3}", f"TWO  {i}" if i % 4 else f"two {i // 8}", i % 2) for i in range(60)]
    held = carve(rows, n_calib=10, n_valid=5)
    assert 0 < len(held.calib) <= 10 and 0 < len(held.valid) <= 5
    sides = [
        {folded(t) for i in part for t in (rows[i].text, rows[i].pair)} for part in (held.train, held.valid, held.calib)
    ]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert held.facts["dropped"] == 0


def test_training_rows_in_given_splits_are_dropped_and_those_in_test_counted():
    train = [*some(40), Example("Number  1", None, "0")]
    calib, test = [Example("text number 1 of some", None, "0")], [Example("a text number 2 of some", None, "0")]
    task = make_task(train, calib=calib, test=test, n_valid=2, seed=3)
    left = {folded(e.text) for e in task.train}
    assert not left & {"text number 1 of some", "number 1"}
    assert task.recipe["draw"]["overlap_given"] == 2
    assert task.recipe["draw"]["overlap_test"] == ("text number 2 of some" in left)
    kept = make_task(train, calib=calib, test=test, n_valid=0, keep_overlap=True)
    assert len(kept.train) == 41
    pairs = make_task(some(40, pair=True), calib=[Example("x", "OTHER 7", "0")], n_valid=0)
    assert len(pairs.train) == 39


def test_the_draw_is_the_seed_s_and_its_recipe_is_plain(tmp_path):
    path = put(tmp_path / "mine" / "train.tsv", lines(some(200)))
    one, same = make_task(path, max_train=100, seed=1), make_task(path, max_train=100, seed=1)
    assert one == same
    assert one.recipe == same.recipe
    other = make_task(path, max_train=100, seed=2)
    assert one.calib != other.calib and one.train != other.train
    assert one.name == "mine-100"
    assert json.loads(json.dumps(one.recipe)) == one.recipe
    assert one.recipe["files"]["train"] == {"file": "train.tsv", "rows": 200, "skipped": 0, "sha256": sha256_file(path)}
    assert one.recipe["rows"] == {"train": 100, "valid": 15, "calib": 30, "test": 0}
    assert one.recipe["sha256"]["calib"] == digest(one.calib)
    assert key(**one.recipe) != key(**other.recipe)


# Metrics


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30),
    classes=st.sampled_from([2, 4]),
)
@settings(max_examples=100, deadline=None)
def test_the_metrics_are_their_formulas(rows, classes):
    predicted, true = (np.array(part) % classes for part in zip(*rows))
    assert quality("accuracy", predicted, true) == pytest.approx(np.mean(predicted == true))

    def f1(c):
        right = sum((predicted == c) & (true == c))
        of, found = sum(true == c), sum(predicted == c)
        precision, recall = right / max(found, 1), right / max(of, 1)
        return 0.0 if right == 0 else 2 * precision * recall / (precision + recall)

    wanted = f1(1) if classes == 2 else np.mean([f1(c) for c in range(classes)])
    assert quality("f1", predicted, true, classes) == pytest.approx(wanted)
    one, other = (np.eye(classes)[part] - np.eye(classes)[part].mean(0) for part in (predicted, true))
    spread = np.sqrt((one * one).sum() * (other * other).sum())  # the correlation of the indicator vectors
    wanted = (one * other).sum() / spread if spread > 1e-9 else 0.0
    assert quality("mcc", predicted, true) == pytest.approx(wanted, abs=1e-9)


@given(rows=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_spearman_is_scipy_s(rows):
    predicted, true = np.array(rows, float).T
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        assert quality("spearman", predicted, true) == 0.0
    else:
        assert quality("spearman", predicted[:, None], true) == pytest.approx(spearmanr(predicted, true).statistic)


def test_logits_count_by_their_largest():
    assert quality("accuracy", [[0.1, 0.2], [3.0, -1.0]], [1, 1]) == 0.5


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "message"),
    [
        ("accuracy", [], [], "at least one"),
        ("f1", [1], [1, 0], "as many predictions as labels"),
        ("spearman", [1.0, float("nan")], [1.0, 2.0], "1 of 2 predictions are not finite"),
        ("auc", [1], [1], "No metric is called 'auc'"),
    ],
)
def test_what_cannot_be_measured_is_refused(metric, predictions, labels, message):
    with pytest.raises(UserError, match=message):
        quality(metric, predictions, labels)


# The published files


def test_sst2_has_the_roots_and_draws_that_are_known(data_dir):
    task = make_task(data_dir / "glue" / "SST-2", max_train=20_000)
    assert task.name == "sst2-20k"
    assert task.recipe["rows"] == {"train": 20_000, "valid": 500, "calib": 1000, "test": 872}
    assert task.recipe["files"]["test"]["file"] == "dev.tsv"
    draw = task.recipe["draw"]
    assert (draw["rows"], draw["roots"], draw["min_words"]) == (67_349, 6885, 10)
    assert all(len(e.text.split()) >= 10 for e in (*task.calib, *task.valid))
    held = "|".join(f" {e.text} " for e in (*task.calib, *task.valid))
    assert not any(f" {e.text} " in held for e in task.train[::40])


def test_a_thousand_roots_of_sst2_cost_a_fifth_of_its_rows(data_dir):
    spans = Spans(folded(e.text) for e in read(data_dir / "glue" / "SST-2"))
    long = [root for root in spans.roots() if len(root.split()) >= 10]
    assert len(long) == 5825
    costs = [int((spans.inside(random.Random(seed).sample(long, 1000)) > 0).sum()) for seed in range(5)]
    assert all(11_500 < cost < 12_900 for cost in costs)  # 12,211 is one draw's


@pytest.mark.parametrize(
    ("name", "metric", "rows"),
    [
        ("glue/MRPC", "f1", (3326, 250, 500, 1725)),
        ("glue/RTE", "accuracy", (1890, 200, 400, 277)),
        ("glue/STS-B", "spearman", (4456, 431, 862, 1500)),
        ("sentence_cls/TREC", "accuracy", (4207, 409, 818, 500)),
        ("sentence_cls/agnews", "accuracy", (8499, 500, 1000, 7600)),
        ("sentence_cls/rt-polarity", "accuracy", (9159, 500, 1000, 0)),
    ],
)
def test_the_published_sets_are_read_whole(data_dir, name, metric, rows):
    task = make_task(data_dir / name)
    assert (task.metric, tuple(task.recipe["rows"][split] for split in SPLITS)) == (metric, rows)
    draw = task.recipe["draw"]
    assert sum(rows[:3]) + draw["dropped"] == draw["rows"]
