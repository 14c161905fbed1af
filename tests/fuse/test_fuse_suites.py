"""Suites: published files and own folders, split so that nothing stands in two splits."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from retouch.errors import FactError, UnknownName, UserError
from retouch.fuse import _mmlu, _synth, suites
from retouch.fuse._files import labelled
from retouch.fuse.base import Question
from retouch.fuse.templates import render


def check_splits(suite):
    """No question in two splits, nor twice in one; answers are among the options."""
    seen = Counter()
    for split in ("train", "selection", "test"):
        for domain in suite.domains:
            assert suite.questions(split)[domain], (split, domain)
            for q in suite.questions(split)[domain]:
                assert q.domain == domain
                assert 0 <= q.answer < len(q.options)
                seen[q.key] += 1
    seen.update(q.key for own in suite.shots.values() for q in own)
    assert max(seen.values()) == 1


def write(path, rows, sep="\t"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(sep.join(row) + "\n" for row in rows), encoding="utf-8")


def made(folder):
    for name, labels in (("birds", ("owl", "hen")), ("stones", ("flint", "slate", "chalk"))):
        rows = [(f"{name} number {i}", labels[i % len(labels)]) for i in range(60)]
        write(folder / name / "train.tsv", [("text", "label"), *rows])
        write(folder / name / "test.tsv", [("text", "label"), *rows[:5], (f"another of {name}", labels[0])])
    return folder


# Own data


def test_folders_drop_from_train_what_is_tested(tmp_path):
    suite = suites.folders(made(tmp_path))
    check_splits(suite)
    assert suite.domains == ("birds", "stones")
    assert len(suite.test["birds"]) == 6
    assert suite.facts["dropped"] == {"birds": 5, "stones": 5}
    assert sorted(suite.test["stones"][0].options) == ["chalk", "flint", "slate"]
    one = next(q for q in suite.test["birds"] if q.stem == "birds number 1")
    assert one.options[one.answer] == "hen"


def test_folders_read_json_lines_csv_and_pairs(tmp_path):
    for name in ("a", "b"):
        rows = [{"text": f"{name} {i}", "text2": f"other {i}", "label": i % 2} for i in range(20)]
        write(tmp_path / name / "train.jsonl", [[json.dumps(row)] for row in rows])
        write(tmp_path / name / "valid.csv", [("text", "text2", "label"), (f'"{name}, y"', "z", "1")], ",")
    suite = suites.folders(tmp_path)
    check_splits(suite)
    assert [q.stem for q in suite.test["a"]] == ["a, y\nz"]


def test_order_of_options_hangs_on_the_question_and_the_seed(tmp_path):
    made(tmp_path)
    one, again, other = (suites.folders(tmp_path, seed=s) for s in (0, 0, 1))
    orders = [[q.options for q in suite.test["stones"]] for suite in (one, again, other)]
    assert orders[0] == orders[1] != orders[2]
    assert [q.key for q in one.train["stones"]] == [q.key for q in other.train["stones"]]
    assert len(set(orders[0])) > 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("text", "label"), ("only a text",)], r"train\.tsv line 2 has 1 fields"),
        ([("text", "label"), ("one", "owl", "hen")], r"train\.tsv line 2 has 3 fields where 2 are expected"),
        ([("text", "label"), ("", "owl")], r"^birds/train\.tsv line 2 has no text"),
        ([("text", "sentence2", "label"), ("a", "b", "owl")], r"train\.tsv line 1: there must be columns"),
        ([("one", "two", "three")], r"train\.tsv line 1: there must be columns"),
    ],
)
def test_bad_lines_are_named(tmp_path, rows, said):
    made(tmp_path)
    write(tmp_path / "birds" / "train.tsv", rows)
    with pytest.raises(FactError, match=said):
        suites.folders(tmp_path)


@pytest.mark.parametrize(
    ("header", "row", "wanted"),
    [
        ("index question sentence label", "0 what? because. entailment", ("what?", "because.", "entailment")),
        ("id qid1 qid2 question1 question2 is_duplicate", "0 1 2 a? b? 1", ("a?", "b?", "1")),
        (
            "index sentence1 sentence2 label1 gold_label",
            "0 this that neutral entailment",
            ("this", "that", "entailment"),
        ),
        ("Sentence Label", "so 1", ("so", "", "1")),
    ],
)
def test_columns_are_found_as_sets_name_them_and_no_second_text_is_lost(tmp_path, header, row, wanted):
    names, cells = header.split(), row.split()
    write(tmp_path / "a.tsv", [names, cells])
    write(tmp_path / "a.jsonl", [[json.dumps(dict(zip(names, cells)))]])
    for file in ("a.tsv", "a.jsonl"):
        (found,) = labelled(tmp_path / file)
        assert (found.text, found.pair, found.label) == wanted


@pytest.mark.parametrize("row", [{"text": None, "label": 1}, {"text": "a", "label": None}, {"text": ["a"], "label": 1},
                                 {"text": "a", "label": [1]}, {"text": "a \ud83d", "label": 1}, ["a", 1]])  # fmt: skip
def test_json_that_is_no_text_with_a_label_is_refused(tmp_path, row):
    write(tmp_path / "a.jsonl", [[json.dumps({"text": "a", "text2": None, "label": 0})], [json.dumps(row)]])
    with pytest.raises(FactError, match=r"a\.jsonl line 2"):
        labelled(tmp_path / "a.jsonl")


def test_labels_that_train_lacks_are_refused(tmp_path):
    made(tmp_path)
    write(tmp_path / "birds" / "test.tsv", [("text", "label"), ("x", "emu")])
    with pytest.raises(UserError, match=r"birds/test\.tsv line 2: the label 'emu'"):
        suites.folders(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        suites.folders(tmp_path / "nowhere")
    with pytest.raises(UserError, match="0 sub-folders"):
        suites.folders(tmp_path)
    with pytest.raises(UserError, match=r"sentence_cls/TREC\.train\.all"):
        suites.text_cd(tmp_path, ["trec", "sst2"])


# MMLU


def mmlu(folder, sizes):
    for subject, n in sizes.items():
        for part, many in (("test", n), ("val", 2), ("dev", 1)):
            rows = [(f"{subject} {part} {i}?", "one", "two", "three", "four", "ABCD"[i % 4]) for i in range(many)]
            write(folder / part / f"{subject}_{part}.csv", rows, ",")
    return folder


def test_mmlu_layout_becomes_categories(tmp_path):
    suite = suites.mmlu_cd(mmlu(tmp_path, {"college_physics": 40, "philosophy": 40, "sociology": 40, "marketing": 40}))
    check_splits(suite)
    assert suite.domains == ("STEM", "humanities", "social sciences", "other")
    assert [len(suite.shots[d]) for d in suite.domains] == [1, 1, 1, 1]
    assert {q.subject for q in suite.test["STEM"]} == {"college physics"}
    assert suites.folders(tmp_path).domains == suite.domains


def test_no_subject_is_more_than_a_quarter(tmp_path):
    sizes = {"professional_law": 200, "jurisprudence": 20, "philosophy": 20, "formal_logic": 20, "prehistory": 20}
    suite = suites.mmlu_cd(mmlu(tmp_path, {**sizes, "sociology": 40}))
    counts = suite.facts["subjects"]["humanities"]
    assert max(counts.values()) <= sum(counts.values()) / 4
    assert counts["jurisprudence"] == 22
    assert counts["professional law"] == 29  # the largest c with 4 c <= 4 x 22 + c
    assert suite.facts["capped"] == {"humanities": 173}
    again = suites.mmlu_cd(tmp_path)
    assert again == suite


def test_questions_that_read_the_same_are_asked_once(tmp_path):
    mmlu(tmp_path, {"college_physics": 30, "philosophy": 30})
    row = ("Is  IT?", "two", "one", "Four", "three", "A")
    write(tmp_path / "test" / "sociology_test.csv", [("is it?", "one", "two", "three", "four", "B"), row], ",")
    suite = suites.mmlu_cd(tmp_path, domains=["STEM", "humanities"])
    assert suite.facts["repeated"] == 0
    keys = {suites.question_key(r[0], r[1:5]) for r in (row, ("is it?", "one", "two", "three", "four"))}
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("q", "a", "b", "c", "A"), r"philosophy_test\.csv line 2: .* 6 fields; this has 5"),
        (("q", "a", "b", "c", "d", "E"), r"philosophy_test\.csv line 2: the answer must be A, B, C or D; got 'E'"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, row, said):
    mmlu(tmp_path, {"college_physics": 4})
    write(tmp_path / "test" / "philosophy_test.csv", [("q", "a", "b", "c", "d", "A"), row], ",")
    with pytest.raises(FactError, match=said):
        suites.mmlu_cd(tmp_path)


def test_unknown_subjects_and_domains_are_named(tmp_path):
    mmlu(tmp_path, {"college_physics": 9, "philosophy": 9})
    with pytest.raises(UnknownName, match="domain on disk is called 'law'"):
        suites.mmlu_cd(tmp_path, domains=["STEM", "law"])
    mmlu(tmp_path, {"colege_physics": 9})
    with pytest.raises(UnknownName, match="Did you mean 'college_physics'"):
        suites.mmlu_cd(tmp_path)


def test_the_map_holds_all_subjects_once():
    known = _mmlu._map()
    subjects = [s for members in known["fields"].values() for s in members]
    assert len(subjects) == len(set(subjects)) == 57
    assert sorted(f for members in known["categories"].values() for f in members) == sorted(known["fields"])


# Published data


def test_published_mmlu(data_dir):
    suite = suites.mmlu_cd(data_dir)
    check_splits(suite)
    n = {d: sum(len(suite.questions(s)[d]) for s in ("train", "selection", "test")) for d in suite.domains}
    assert 0.55 < len(suite.train["STEM"]) / n["STEM"] < 0.65
    assert 0.2 < len(suite.test["other"]) / n["other"] < 0.3
    assert suites.mmlu_cd(data_dir, "fine").domains == ("law", "health", "math", "economics", "physics", "philosophy")
    short = suites.mmlu_cd(data_dir, max_characters=600)
    assert max(len(q.stem) + sum(map(len, q.options)) for q in short.test["humanities"]) <= 600


def test_published_sentences(data_dir):
    suite = suites.text_cd(data_dir, ("ag_news", "trec", "sst2", "rte", "mrpc", "mr"))
    check_splits(suite)
    assert [len(suite.test["ag_news"][0].options), len(suite.test["trec"][0].options)] == [4, 6]
    assert (len(suite.test["trec"]), len(suite.test["sst2"])) == (500, 872)
    right = Counter(q.options[q.answer] for q in suite.test["trec"])
    assert right == {
        "description": 138,
        "thing": 94,
        "abbreviation": 9,
        "person": 65,
        "place": 81,
        "number": 113,
    }
    asked = {q.stem.rsplit("\n", 1)[-1].strip().casefold() for q in suite.test["sst2"]}
    assert not any(q.stem.rsplit("\n", 1)[-1].strip().casefold() in asked for q in suite.train["mr"])
    assert len(suite.train["mr"]) > 1000


# What edges learn from


def test_blind_examples_ask_one_question_and_aware_ones_several(tmp_path):
    suite = suites.folders(made(tmp_path))
    blind = suites.examples(suite, "birds", "blind")
    assert len(blind) == len(suite.train["birds"])
    assert all(e.target in (" A", " B") for e in blind)
    aware = suites.examples(suite, "birds", "aware", n=200, k=3)
    assert {e.target.count(",") for e in aware} == {0, 1, 2}
    assert not any("stones" in e.prompt for e in aware)
    assert (
        aware
        == suites.examples(suite, "birds", "aware", n=200, k=3)
        != suites.examples(suite, "birds", n=200, k=3, seed=1)
    )
    assert sum(e.target.count(",") + 1 for e in suites.examples(suite, "birds")) == len(suite.train["birds"])


def test_examples_end_where_an_answer_begins(tmp_path):
    suite = suites.folders(made(tmp_path))
    for e in suites.examples(suite, "stones", how="each", k=2, n=20):
        assert e.prompt.endswith("Answer:")
        assert e.target in (" A", " B", " C")
    with pytest.raises(UnknownName, match="template"):
        suites.examples(suite, "stones", how="plane")
    with pytest.raises(UnknownName, match="domain"):
        suites.examples(suite, "bird")


def test_lessons_of_public_questions_have_the_same_form(tmp_path):
    suite = suites.folders(made(tmp_path))
    found = suites.lessons(suite.train["stones"], 2, "replay", n=30, how="numbered")
    assert {e.target.count(":") for e in found} == {1, 2}
    assert all("stones number" in e.prompt for e in found)


def test_templates_with_braces_in_a_question():
    q = Question("d", "sets", "Is {x} in {k}?", ("{a}", "b"), 0, "k")
    assert "Is {x} in {k}?\nA. {a}\nB. b" in render([q, q], "numbered").prompt


# The synthetic suite


def test_synthetic_facts_and_their_contradictions():
    suite = _synth.synth_cd(overlap=0.5)
    check_splits(suite)
    facts = {d: {q.stem.split()[1]: q.options[q.answer] for q in suite.train[d]} for d in suite.domains}
    shared = set.intersection(*(set(own) for own in facts.values()))
    assert len(shared) == 8
    assert all(len({own[k] for own in facts.values()}) == 4 for k in shared)
    asked = {(q.stem, q.options[q.answer]) for q in suite.test["private 0"]}
    assert asked == {(q.stem, q.options[q.answer]) for q in suite.train["private 0"]}
    assert not {q.stem for q in _synth.public()} & {q.stem for own in suite.train.values() for q in own}
