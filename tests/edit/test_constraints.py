"""Constraint sets: what must never be in them, which half a prompt is in, types of subjects, and their keys."""

from __future__ import annotations

import collections
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.edit import _subjects
from retouch.edit.constraints import (
    _drawn,
    constraints,
    for_facts,
    half_of,
    read_prompts,
    subject_type,
)
from retouch.edit.facts import Fact, Prompt, demo, load, protected
from retouch.errors import FactError, SettingsError

CAPITAL = Fact(
    "The capital of {} is",
    "France",
    "Lyon",
    relation="P36",
    paraphrases=["France's seat of government is"],
    neighbors=[Prompt("The capital of Peru is"), Prompt("Lake Geneva lies near the city of")],
    related=[Prompt("The currency of France is the")],
)
TYPES = sorted(_subjects.types())
LEAVES = [name for name in TYPES if not _subjects.types()[name].wide]


def kinds(found):
    return collections.Counter(c.kind for c in found)


@st.composite
def some_facts(draw):
    """A fact on a listed subject, through a template of its type, with neighbours of that type."""
    kind = _subjects.types()[draw(st.sampled_from(TYPES))]
    names = draw(st.lists(st.sampled_from(kind.names), min_size=3, max_size=4, unique_by=_subjects.key))
    template, other = draw(st.lists(st.sampled_from(kind.templates), min_size=2, max_size=2, unique=True))
    subject, *near = (name.removeprefix("the ") for name in names)
    neighbors = [Prompt(template.replace("{}", name)) for name in near]
    return Fact(template, subject, "X", paraphrases=[other.replace("{}", subject)], neighbors=neighbors)


# The lists


@pytest.mark.parametrize("name", TYPES)
def test_templates_have_one_slot_and_end_where_the_answer_starts(name):
    templates = [t for ask in _subjects.types()[name].asks for t in ask.templates]
    assert len(templates) >= 12
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert template.count("{}") == 1
        assert template == template.strip() and template[-1] not in ".?!:"
    assert sum(t.startswith("{}") for t in templates) >= len(templates) / 2


@pytest.mark.parametrize("name", LEAVES)
def test_lists_are_long_enough_and_hold_nothing_twice(name):
    names = _subjects.types()[name].names
    assert len(names) >= 60
    assert len({_subjects.key(n) for n in names}) == len(names)
    for one in names:
        assert isinstance(one, str) and one == " ".join(one.split()) and "{" not in one


def test_a_wider_type_has_all_names_of_its_children():
    person, musician = _subjects.types()["person"], _subjects.types()["musician"]
    assert set(musician.names) < set(person.names)
    assert set(person.templates) < set(musician.templates)


# Types


@pytest.mark.parametrize(
    ("prompt", "subject", "relation", "wanted"),
    [
        ("The mother tongue of {} is", "Danielle Darrieux", "P103", "person"),
        ("{} was born in", "Eli Maor", "P19", "person"),
        ("{} passed away at", "Charles Alfred Pillsbury", "P20", "person"),
        ("{} has a citizenship from", "Mahmoud Fawzi", "P27", "person"),
        ("{} works in the city of", "Leonardo Balada", "P937", "person"),
        ("{} is affiliated with the religion", "Jahangir", "P140", "person"),
        ("{} plays the instrument", "Toko Yasuda", "P1303", "musician"),
        ("{}, the", "Alain Lanty", "P1303", "musician"),
        ("{}'s music label is", "Purple Hearts", "P264", "musician"),
        ("{} plays in the position of", "Percy Snow", "P413", "athlete"),
        ("{} professionally plays the sport", "Andreas Ivanschitz", "P641", "athlete"),
        ("{} works in the field of", "Yi-Fu Tuan", "P101", "scientist"),
        ("The capital city of {} is", "Uusimaa", "P36", "country"),
        ("The official language of {} is", "Gibraltar", "P37", "country"),
        ("{} is a twin city of", "Wellington", "P190", "city"),
        ("The headquarters of {} is in", "Majorette", "P159", "company"),
        ("{} is owned by", "Vevo", "P127", "company"),
        ("{} is produced by", "Nissan Laurel", "P176", "product"),
        ("{} is a product of", "Apple A5", "P178", "product"),
        ("{} was originally aired on", "Redigo", "P449", "show"),
        ("The original language of {} is", "Zampa", "P364", "work"),
        ("The novel {} was written by", "The Leopard", None, "book"),
        ("{} is named after", "Baghdad International Airport", "P138", "landmark"),
        ("{} is a member of", "San Marino Football Federation", "P463", "organisation"),
        ("{} belongs to the continent of", "Howard Glacier", "P30", "place"),
        ("The volcano called {} is located in the country of", "Mount Fuji", None, "place"),
        ("{} makes me think of", "Berlin", None, "city"),
        ("{} makes me think of", "Nobody At All", None, "other"),
        ("{} makes me think of", "Nobody At All", "native language", "person"),
    ],
)
def test_the_type_of_a_subject(prompt, subject, relation, wanted):
    assert subject_type(subject, prompt, relation) == wanted
    assert subject_type(subject, prompt.replace("{}", subject), relation) == wanted


def test_of_types_that_share_a_phrase_the_one_that_lists_the_subject_wins():
    assert subject_type("Sahara", "{} is located in") == "place"
    assert subject_type("Louvre", "{} is located in") == "landmark"


def test_a_phrase_is_made_of_whole_words():
    assert subject_type("Zzyx", "{} respeaksish") == "other"


# What is in a set


def test_the_mixture_is_the_promised_one():
    found = kinds(constraints(CAPITAL, n=40))
    assert found == {"relation": 24, "subject": 8, "general": 8}


def test_what_one_kind_cannot_fill_the_others_do():
    found = constraints(CAPITAL, n=500)
    assert len(found) == 500
    assert kinds(found)["general"] > 100 > kinds(found)["subject"]


def test_relation_prompts_ask_the_own_relation_of_other_countries_in_the_own_and_in_other_words():
    found = [c for c in constraints(CAPITAL) if c.kind == "relation"]
    countries = {_subjects.key(n) for n in _subjects.types()["country"].names}
    for c in found:
        assert _subjects.key(c.subject) in countries
        assert "capital" in c.prompt and c.subject in c.prompt
    own = [c for c in found if c.prompt in (f"The capital of {c.subject} is", f"The capital of the {c.subject} is")]
    assert len(found) / 4 < len(own) < len(found)


def test_subject_prompts_do_not_ask_for_the_edited_relation_nor_serve_the_evaluation():
    found = [c.prompt for c in constraints(CAPITAL) if c.kind == "subject"]
    assert "France lies on the continent of" in found
    assert not any("capital" in prompt for prompt in found)
    assert "The currency of France is the" not in found  # a related prompt of the fact
    assert all("France" in prompt for prompt in found)


@pytest.mark.parametrize(
    ("fact", "never"),
    [
        (Fact("The mother tongue of {} is", "Eli Maor", "Dutch"), ("mother tongue", "speaks")),
        (Fact("{} expired at", "Eli Maor", "Rome", relation="P20"), (" died in", "passed away")),
        (Fact("{} holds the title of", "Eli Maor", "X", paraphrases=["Born in May. He sang. By profession, Eli Maor is a"]), ("profession", "works")),
    ],
)  # fmt: skip
def test_relations_are_told_by_words_by_identifier_and_by_paraphrases(fact, never):
    found = [c.prompt for c in constraints(fact, n=200) if c.kind == "subject"]
    assert any("married" in prompt for prompt in found)
    assert not [prompt for prompt in found for word in never if word in prompt]


def test_a_lead_in_of_a_paraphrase_says_nothing_about_the_relation():
    fact = Fact("{} holds the title of", "Eli Maor", "X", paraphrases=["She was born and married. Eli Maor follows"])
    found = [c.prompt for c in constraints(fact, n=200) if c.kind == "subject"]
    assert "Eli Maor is married to" in found and "Eli Maor follows the religion of" not in found


@settings(max_examples=40, deadline=None)
@given(some_facts(), st.integers(0, 5))
def test_nothing_that_must_not_be_in_a_set_is_in_it(fact, seed):
    edited = [_subjects.fold(t) for t in (fact.filled, *fact.paraphrases)]
    nearby = "\n".join(p.prompt for p in fact.neighbors).casefold()
    halves = {half: constraints(fact, n=120, seed=seed, half=half) for half in ("plan", "certify")}
    for half, found in halves.items():
        assert len({c.prompt for c in found}) == len(found) <= 120
        for c in found:
            assert not any(text in _subjects.fold(c.prompt) for text in edited)
            assert "{}" not in c.prompt
            assert not c.subject or c.subject.casefold() not in nearby
            if c.kind == "subject":
                assert half == "plan" and c.subject == fact.subject
            else:
                assert half_of(c.prompt, c.subject) == half
                assert _subjects.key(c.subject) != _subjects.key(fact.subject)
                assert f" {fact.subject.casefold()} " not in f" {c.prompt.casefold()} "
    plan, certify = ({c.prompt for c in halves[h]} for h in halves)
    assert not plan & certify
    plan, certify = ({_subjects.key(c.subject) for c in halves[h] if c.subject} for h in halves)
    assert not plan & certify


def test_names_that_share_a_telling_word_are_left_out_but_not_all_mountains():
    subjects = {c.subject for c in constraints(Fact("{} lies in the country of", "Mount Kenya", "Peru"))}
    assert "Mount Everest" in subjects or "Mount Etna" in subjects
    subjects = {c.subject for h in ("plan", "certify") for c in constraints(Fact("{} was born in", "John Ford", "X"), half=h)
                if c.kind == "relation"}  # fmt: skip
    assert subjects and not {s for s in subjects if {"John", "Ford"} & set(s.split())}


def test_a_template_with_an_article_takes_names_that_bear_one():
    found = [
        c for c in constraints(Fact("The {} is located in the city of", "Eiffel Tower", "Rome")) if c.kind == "relation"
    ]
    assert found and all(f"the {c.subject}" in _subjects.types()["landmark"].names for c in found)
    own = [
        c.prompt
        for c in constraints(Fact("The {} is located in the city of", "Eiffel Tower", "Rome"))
        if c.kind == "subject"
    ]
    assert "The Eiffel Tower was designed by the architect" in own


def test_a_name_opens_a_sentence_with_a_capital():
    found = [c.prompt for c in constraints(Fact("{} is located in", "Big Ben", "Rome")) if c.kind == "relation"]
    assert all(not prompt.startswith("the ") for prompt in found)
    assert any(prompt.startswith("The ") for prompt in found)


def test_about_seven_tenths_of_the_names_are_for_planning():
    halves = [half_of("", name) for kind in LEAVES for name in _subjects.types()[kind].names]
    assert halves.count("plan") / len(halves) == pytest.approx(0.7, abs=0.04)


def test_a_name_is_in_one_half_however_it_is_written():
    assert half_of("x", "the Netherlands") == half_of("y", "Netherlands") == half_of("z", " NETHERLANDS ")


def test_the_shipped_prompts_are_in_the_sets_and_split():
    texts = {p.prompt for p in protected()}
    found = [{c.prompt for c in constraints(CAPITAL, n=2000, half=h)} & texts for h in ("plan", "certify")]
    assert all(len(f) > 30 for f in found)
    assert not found[0] & found[1]


def test_the_seed_alone_decides_the_set():
    assert constraints(CAPITAL, seed=3) == constraints(CAPITAL, seed=3)
    assert constraints(CAPITAL, n=40, seed=3) != constraints(CAPITAL, n=40, seed=4)


def test_a_fact_without_a_subject_has_general_prompts_only(caplog):
    fact = Fact("The currency of Japan is the", "", "franc")
    with caplog.at_level(logging.WARNING):
        found = constraints(fact, n=30)
    assert kinds(found) == {"general": 30}
    assert "without a subject" in caplog.text
    assert fact.filled not in [c.prompt for c in constraints(fact, n=3000)]


def test_own_prompts_come_first_and_whole():
    own = ["My dog is called", "My cat is called ", "My dog is called", "The capital of Peru is"]
    for half in ("plan", "certify"):
        found = constraints(CAPITAL, n=20, half=half, own=own)
        assert [c.prompt for c in found[:3]] == ["My dog is called", "My cat is called", "The capital of Peru is"]
        assert len(found) == 20
    assert len(constraints(CAPITAL, n=2, own=own)) == 3


def test_an_own_prompt_that_asks_for_the_edited_fact_is_left_out_and_told(caplog):
    with caplog.at_level(logging.WARNING):
        found = constraints(CAPITAL, n=5, own=["The capital of France is", "Tea is"])
    assert "The capital of France is" not in [c.prompt for c in found]
    assert found[0].prompt == "Tea is"
    assert "ask for an edited fact" in caplog.text


@pytest.mark.parametrize(("how", "said"), [({"n": -1}, "n must be 0"), ({"half": "test"}, "half must be 'plan' or")])
def test_wrong_settings_are_refused(how, said):
    with pytest.raises(SettingsError, match=said):
        constraints(CAPITAL, **how)
    assert constraints(CAPITAL, n=0) == []


# Batches


def test_a_batch_holds_nothing_that_any_fact_edits():
    facts = [
        Fact("The capital of {} is", "Germany", "Bonn"),
        Fact("The currency of {} is the", "Germany", "mark"),
        Fact("{} pays with a currency called the", "Brazil", "peso"),
        Fact("{} was born in the city of", "Isaac Newton", "Rome"),
    ]
    found = for_facts(facts, n=400)
    assert len({c.prompt for c in found}) == len(found) == 400
    for c in found:
        assert not any(f.filled in c.prompt for f in facts)
        if c.kind != "subject":
            assert not any(f.subject in c.prompt for f in facts)
        elif c.subject == "Germany":
            assert "capital" not in c.prompt and "currency" not in c.prompt
    of_newton = [c for c in found if c.kind == "relation" and "was born in the city of" in c.prompt]
    of_capital = [c for c in found if c.kind == "relation" and c.prompt.startswith("The capital of")]
    assert len(of_newton) >= 30 and len(of_capital) >= 15


def test_a_batch_of_one_is_the_single_set():
    assert for_facts([CAPITAL], n=70, seed=2) == constraints(CAPITAL, n=70, seed=2)


def test_sample_facts_get_full_sets():
    for fact in demo():
        assert len(constraints(fact, n=300)) == 300
        assert len(constraints(fact, n=100, half="certify")) == 100


def test_counterfact_records_get_a_type(data_dir):
    facts = load(data_dir / "counterfact" / "counterfact_full.json", n=200, seed=0)
    told = [subject_type(f.subject, f.prompt, f.relation) for f in facts]
    assert told.count("other") <= 4
    for fact in facts[:20]:
        found = kinds(constraints(fact, n=100))
        assert found["relation"] >= 30 and found["subject"] >= 5


@given(st.integers(0, 60), st.integers(0, 9))
def test_drawing_to_the_end_is_a_permutation(n, seed):
    assert sorted(_drawn(range(n), seed)) == list(range(n))


# The user's own file


def write(tmp_path, text, name="own.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_prompts_are_read_one_a_line(tmp_path):
    assert read_prompts(write(tmp_path, "\ufeffTea is\r\n\n  Snow is white and\n")) == ["Tea is", "Snow is white and"]


def test_prompts_are_read_from_json_lines(tmp_path):
    text = '{"prompt": "Tea is", "answer": 1}\n\n{"prompt": "The capital of {} is", "subject": "Peru"}\n'
    assert read_prompts(write(tmp_path, text)) == ["Tea is", "The capital of Peru is"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "own.txt is empty"),
        ("\n \n", "own.txt is empty"),
        ("Tea is\n\nThe capital of {} is", r"own.txt line 3: the prompt 'The capital of \{\} is' holds"),
        ('{"prompt": "a"}\n{"prompt": ', "own.txt line 2: broken JSON"),
        ('{"prompt": "a"}\nTea is', "own.txt line 2: broken JSON"),
        (
            '{"prompt": "a"}\n\n{"text": "b"}',
            "own.txt line 3: field 'prompt' must be text; got None. Fields found: text",
        ),
        ('{"prompt": "a"}\n{"prompt": 3}', "own.txt line 2: field 'prompt' must be text; got 3"),
        ('{"prompt": "a"}\n7', "own.txt line 2: an object with the field 'prompt'"),
        ('{"prompt": "a {}", "subject": 3}', "own.txt line 1: field 'subject' must be text"),
        ('[{"prompt": "a"}]', r"own.txt line 1: begins with '\['"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(tmp_path, text, said):
    with pytest.raises(FactError, match=said):
        read_prompts(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(FactError, match=r"there is no file '.*none.txt'"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "own.txt").write_bytes(b"Tea\xff")
    with pytest.raises(FactError, match=r"own.txt is not UTF-8 text: byte 3"):
        read_prompts(tmp_path / "own.txt")
