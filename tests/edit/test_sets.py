"""Which facts a bench measures: files, files mixed, suites."""

from __future__ import annotations

import json

import pytest

from retouch.edit._sets import SUITES, Asked, apart, draw
from retouch.edit.bench import known_facts
from retouch.edit.facts import Fact, Prompt, load
from retouch.errors import FactError, UserError
from retouch.model import wrap


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama"), source="tiny llama")


def written(path, *subjects):
    facts = [Fact("The capital of {}", s, "is Lyon", "is Paris") for s in subjects]
    path.write_text("\n".join(json.dumps(f.to_dict()) for f in facts))
    return path


def subjects(groups):
    return [[f.subject for f in g] for g in groups]


def test_facts_of_a_file_stand_alone(llama, tmp_path):
    path = written(tmp_path / "a.jsonl", "France", "Italy", "Japan")
    asked = Asked(data=[path], n=2)
    assert subjects(draw(llama, asked, tmp_path / "b.json")) == [["France"], ["Italy"]]
    assert asked.name == "a.jsonl"


def test_several_files_are_mixed_in_turn(llama, tmp_path):
    one = written(tmp_path / "a.jsonl", "France", "Italy", "Japan")
    two = written(tmp_path / "b.jsonl", "Peru")
    asked = Asked(data=[one, two], n=3)
    assert subjects(draw(llama, asked, tmp_path / "c.json")) == [["France"], ["Peru"], ["Italy"]]
    assert asked.name == "a.jsonl+b.jsonl"


def test_known_facts_are_looked_for_in_the_whole_file(llama, tmp_path):
    path = written(tmp_path / "a.jsonl", *(f"Land{i}" for i in range(12)))
    facts = draw(llama, Asked(data=[path], n=2, known=True), tmp_path / "b.json")
    assert [f for (f,) in facts] == known_facts(llama, load(path), 2)


def test_known_facts_that_are_too_few_are_told(llama, tmp_path, caplog):
    path = written(tmp_path / "a.jsonl", *(f"Land{i}" for i in range(6)))
    n = len(draw(llama, Asked(data=[path], n=6, known=True), tmp_path / "b.json"))
    assert 0 < n < 6
    assert f"The model knows {n} of 6 facts; 6 were asked for." in caplog.text


def test_bad_records_are_left_out_where_that_is_wanted(llama, tmp_path):
    path = written(tmp_path / "a.jsonl", "France")
    path.write_text(path.read_text() + '\n{"prompt": "The capital of {}", "target": "x"}\n')
    with pytest.raises(FactError, match="line 2"):
        draw(llama, Asked(data=[path]), tmp_path / "b.json")
    for asked in (Asked(data=[path], skip_bad=True), Asked(suite="zsre", data=[path])):
        assert subjects(draw(llama, asked, tmp_path / "b.json")) == [["France"]]


@pytest.mark.parametrize("suite", ["counterfact", "knowedit", "zsre"])
def test_a_suite_is_drawn_from_the_folder_of_data_sets(llama, data_dir, tmp_path, monkeypatch, suite):
    named = draw(llama, Asked(suite, [data_dir], n=3, seed=1), tmp_path / "b.json")
    assert [len(g) for g in named] == [1, 1, 1]
    monkeypatch.setenv("RETOUCH_DATA", str(data_dir))
    asked = Asked(suite, n=3, seed=1)
    assert draw(llama, asked, tmp_path / "b.json") == named
    assert asked.name == suite


def test_prompts_that_the_same_model_edits_are_dropped_and_others_stay():
    capital = Fact("The capital of {} is", "Peru", "Cusco", related=[Prompt("The language of Peru is")])
    language = Fact("The language of {} is", "Peru", "Latin", related=[Prompt("The capital of Peru is")])
    other = Fact("The capital of {} is", "Chile", "Arica", neighbors=[Prompt("The capital of Peru is")])
    groups = [[capital, language], [other]]
    alone = apart(groups, 1)
    assert [len(f.related) for f in alone[0]] == [0, 0]
    assert alone[1] == [other]
    together = apart(groups, 2)
    assert [len(g) for g in together] == [2, 1]
    assert together[1][0].neighbors == ()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"suite": "counterfacts"}, "No suite is called 'counterfacts'. Known: counterfact, same-subject"),
        ({}, "Name a file of facts with --data, or a suite with --suite"),
        ({"suite": "zsre", "n": 0}, "--n and --group-size must be at least 1; got 0 and 4"),
        ({"suite": "zsre", "group_size": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_any_work(fields, says):
    with pytest.raises(UserError, match=says):
        Asked(**fields)


def test_folders_and_files_are_told_apart(tmp_path):
    path = written(tmp_path / "a.jsonl", "France")
    with pytest.raises(UserError, match="is a folder: give it alone, with --suite"):
        Asked(data=[tmp_path])
    with pytest.raises(UserError, match="is a folder: give it alone"):
        Asked("zsre", [tmp_path, path])
    with pytest.raises(UserError, match="is drawn from the data sets: give their folder"):
        Asked("same-subject", [path])


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_without_its_data_says_what_to_set(suite, monkeypatch, tmp_path, llama):
    monkeypatch.delenv("RETOUCH_DATA", raising=False)
    with pytest.raises(UserError, match=r"no folder is named\. Set RETOUCH_DATA"):
        draw(llama, Asked(suite), tmp_path / "b.json")
    monkeypatch.setenv("RETOUCH_DATA", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"is no folder\. Set RETOUCH_DATA"):
        draw(llama, Asked(suite), tmp_path / "b.json")
