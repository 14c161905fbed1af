"""The suites are drawn as their recipe says: from small files made by hand, and once from the real ones."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from retouch.edit import _groups, suites
from retouch.edit._relations import _cloze, fold, read_knowledge, table
from retouch.edit.evaluate import known
from retouch.edit.facts import Fact, load
from retouch.errors import FactError, UserError
from retouch.model import wrap
from retouch.tokens import Text, encode

PEOPLE = [
    f"{first} {last}" for first in ("Ada", "Bo", "Cy", "Di", "Eva", "Flo") for last in ("Reed", "Stone", "Wood", "Hill")
]
CITIES = ["Paris", "London", "Rome", "Tokyo", "Berlin", "Vienna", "Madrid"]
PATTERNS = {
    "P19": ["[X] was born in [Y].", "[X] is native to [Y].", "[Y] is the birthplace of [X]."],
    "P20": ["[X] died in [Y] .", "[X], who died in [Y]", "[X] lost their life at [Y]."],
    "P27": ["[X] is [Y] citizen.", "[X] is a citizen of [Y]."],
    "P103": ["The native language of [X] is [Y]."],
    "P1412": ["[X] used to communicate in [Y] .", "[X] was native to [Y]."],
    "P937": ["[X] used to work in [Y] .", "[X] worked in [Y]."],
    "P140": ["[X] follows the [Y] religion.", "[X] is follower of [Y]."],
    "P361": ["[X] is part of [Y]."],
}
OBJECTS = {
    "P19": CITIES,
    "P20": [*CITIES, "Oslo"],
    "P27": ["France", "Japan", "Brazil", "Canada"],
    "P103": ["French", "Dutch", "German"],
    "P1412": ["Italian", "Spanish", "English"],
    "P937": ["Kyoto", "Geneva", "Boston"],
    "P140": ["Islam", "Buddhism", "Judaism"],
    "P361": ["Europe", "mathematics"],
}
OCCUPATION = {
    "name": "person occupation",
    "prompt_templates": ["{} works as a", "By profession, {} is a"],
    "prompt_templates_zs": ["What is the job of {}? It is", "{} works professionally as a"],
    "samples": [
        {"subject": p.upper(), "object": ("actor", "poet", "caf\\u00e9 owner")[i % 3]} for i, p in enumerate(PEOPLE)
    ],
}
HEAD = "case_id\tsplit\trelation_id\thow\tsubject\ttemplate\ttarget_true\ttarget_new\n"


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def record(case, relation, subject, prompt, new, true):
    rewrite = {
        "prompt": prompt,
        "relation_id": relation,
        "target_new": {"str": new},
        "target_true": {"str": true},
        "subject": subject,
    }
    return {
        "case_id": case,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [f"It rained. {subject} hails from", "Nobody of that name hails from"],
        "neighborhood_prompts": ["Max Mustermann was born in"],
        "generation_prompts": [f"{subject} is"],
    }


@pytest.fixture
def folder(tmp_path):
    """The sets in small, for one test."""
    return small_sets(tmp_path)


def small_sets(tmp_path):
    """Write the sets in small: every person has a random object of most relations."""
    draw = random.Random(0)
    for name, patterns in PATTERNS.items():
        lines(tmp_path / "trex_pararel/pattern_data/graphs_json" / f"{name}.jsonl", [{"pattern": p} for p in patterns])
        triples = [{"sub_label": p, "obj_label": draw.choice(OBJECTS[name])} for p in PEOPLE]
        lines(
            tmp_path / "trex_pararel/trex_lms_vocab" / f"{name}.jsonl", [*triples, {"sub_label": "", "obj_label": "x"}]
        )
    lre = tmp_path / "lre_relations/factual"
    lre.mkdir(parents=True)
    (lre / "person_occupation.json").write_text(json.dumps(OCCUPATION, indent=1), encoding="utf-8")
    (lre / "presidents_birth_year.json").write_text(json.dumps(OCCUPATION), encoding="utf-8")
    counterfact = tmp_path / "counterfact"
    counterfact.mkdir()
    rows = [
        "1\tedit\tP641\tgold\tAda Reed\t{} plays the sport of\tcricket\trugby\n",
        "2\tedit\tP106\ttemplate\tZoe Green\t{} earns a living as a\tpilot\tcook\n",
        "3\tedit\tP19\tgold\tZoe Green\t{} was born in\tRome\tOslo\n",
        "4\tedit\tP27\tgold\tZoe Green\tno slot\tItaly\tOslo\n",
    ]
    (counterfact / "relation_ids.tsv").write_text(HEAD + "".join(rows), encoding="utf-8")
    full = [
        record(i, "P19", p, "{} was born in", "Oslo", "Rome") for i, p in enumerate([*PEOPLE, "Zoe Green", "ada reed"])
    ]
    full.append(record(99, "P19", "Yan", "no slot", "Oslo", "Rome") | {"requested_rewrite": {"prompt": "x"}})
    (counterfact / "counterfact_full.json").write_text(json.dumps(full), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def model(tiny):
    return wrap(*tiny("llama"), source="tiny llama")


# Reading and joining


@pytest.mark.parametrize(
    ("pattern", "cloze"),
    [
        ("[X] was born in [Y].", "{} was born in"),
        ("the  capital of [X] is [Y] .", "The capital of {} is"),
        ("[X] plays [Y]", "{} plays"),
        ("[X] plays [Y] music .", None),
        ("[Y] is the capital of [X].", None),
    ],
)
def test_a_pattern_becomes_a_cloze_only_if_the_object_ends_it(pattern, cloze):
    assert _cloze(pattern) == cloze


def test_sets_are_joined_on_the_subject_whatever_its_case(folder):
    data = read_knowledge(folder)
    ada = data.subjects["ada reed"].facts
    assert ada["P641"] == ("cricket",), "CounterFact's certain rows count"
    assert set(ada) == {"P19", "P20", "P27", "P103", "P1412", "P937", "P140", "P106", "P641"}
    assert set(data.subjects["zoe green"].facts) == {"P19"}, "an inferred row and one without a slot do not"
    assert "café owner" in data.relations["P106"].objects, "doubled escapes are undone"
    assert data.skipped == {
        "LRE relations not in the table": 1,
        "T-REx relations not in the table": 1,
        "triples without usable text": len(PATTERNS) - 1,
    }


def test_clozes_begin_with_the_subject_where_they_can_and_ask_for_one_relation(folder):
    relations = read_knowledge(folder).relations
    assert relations["P106"].templates == ("{} works as a", "{} works professionally as a", "By profession, {} is a")
    assert relations["P106"].questions[-1] == "What is the job of {}? It is"
    assert relations["P27"].templates == ("{} is a citizen of",)
    assert relations["P20"].templates[-1] == "{}, who died in", "an apposition comes last of those"
    lines(folder / "trex_pararel/pattern_data/graphs_json/P937.jsonl", [{"pattern": "[X] was born in [Y]."}])
    shared = read_knowledge(folder).relations
    assert shared["P19"].templates == ("{} is native to",)
    assert shared["P937"].templates == ("{} was born in",), "a relation keeps its last cloze"


def test_a_missing_or_broken_file_is_named(folder):
    broken = folder / "trex_pararel/pattern_data/graphs_json/P19.jsonl"
    broken.write_text('{"pattern": "[X] was born in [Y]."}\n{', encoding="utf-8")
    with pytest.raises(FactError, match=r"P19\.jsonl line 2: broken JSON"):
        read_knowledge(folder)
    broken.unlink()
    with pytest.raises(FactError, match=r"no file .*P19\.jsonl"):
        read_knowledge(folder)
    with pytest.raises(FactError, match="lre_relations"):
        read_knowledge(folder / "nowhere")
    (folder / "counterfact/relation_ids.tsv").write_text("case_id\thow\n1\tgold\n", encoding="utf-8")
    with pytest.raises(FactError, match="columns are missing: relation_id, subject"):
        suites.read_rows(folder)


def test_odd_files_are_read_or_named(folder):
    lre = folder / "lre_relations/factual/person_occupation.json"
    whole = json.loads(lre.read_text(encoding="utf-8"))
    rows = folder / "counterfact/relation_ids.tsv"
    before = suites.read_rows(folder)
    rows.write_bytes(b"\xef\xbb\xbf" + rows.read_bytes().replace(b"\n", b"\r\n") + b"5\tP641\r\n\r\n")
    assert suites.read_rows(folder) == before
    odd = {"prompt_templates": [*whole["prompt_templates"], 3, "no place"], "samples": [*whole["samples"], "Ada", None]}
    lre.write_text("\ufeff" + json.dumps(whole | odd), encoding="utf-8")
    found = read_knowledge(folder)
    assert found.skipped["templates without one {}"] == 2
    assert all(t.count("{}") == 1 for r in found.relations.values() for t in (*r.templates, *r.questions))
    lre.write_text(json.dumps({k: v for k, v in whole.items() if k != "samples"}), encoding="utf-8")
    with pytest.raises(FactError, match=r"person_occupation\.json: field 'samples' is missing"):
        read_knowledge(folder)
    lre.write_bytes("é".encode("latin-1"))
    with pytest.raises(FactError, match=r"person_occupation\.json is not UTF-8"):
        read_knowledge(folder)


def test_a_set_under_another_name_is_found(folder):
    full = folder / "counterfact/counterfact_full.json"
    wanted = suites.counterfact(folder, None, 0, "all")
    full.rename(full.with_name("counterfact.json"))
    assert suites.counterfact(folder, None, 0, "all") == wanted


# Our table


def test_the_table_asks_well_formed_questions_of_known_types():
    own = table()
    for entry in own.relations.values():
        assert set(entry["types"]) <= own.typed.keys()
        assert all(q.count("{}") == 1 and q.endswith("?") for q in entry["questions"])
        assert all(t.count("{}") == 1 and "?" not in t for t in entry.get("templates", ()))
    for clozes in own.typed.values():
        assert all(cloze.startswith("{} ") and not cloze.endswith(" ") for cloze in clozes.values())
    for name, group in own.near.items():
        assert name in group
        assert group & own.relations.keys()


def test_every_type_keeps_prompts_enough_whatever_is_edited():
    own = table()
    for name, entry in own.relations.items():
        for kind in entry["types"]:
            assert len(_groups.typed_prompts("Nemo", kind, [name])) >= 6


def test_the_type_is_what_most_relations_allow():
    own = table()
    assert own.type_of(["P495"]) == "other"
    assert own.type_of(["P495", "P449"]) == "work"
    assert own.type_of(["P37", "P530"]) == "country"
    assert own.type_of(["nobody knows", None]) == "other"


# Groups of one subject


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The sets in small, read by many tests."""
    return small_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def drawn(model, shared):
    return {n: suites.same_subject(model, shared, n, 4, 0, shared / f"suite_{n}.jsonl", split="all") for n in (1, 2, 4)}


def test_groups_hold_n_facts_of_one_subject_that_the_model_knows(model, drawn):
    for n, groups in drawn.items():
        assert len(groups) == 4
        for group in groups:
            assert len(group) == n
            assert len({f.subject for f in group}) == 1
            assert all(known(model, group))
            relations = [f.relation for f in group]
            assert all(not table().close(r) & {*relations} - {r} for r in relations)


def test_a_target_is_another_object_that_begins_otherwise(model, shared, drawn):
    data = read_knowledge(shared)
    for fact in [f for groups in drawn.values() for group in groups for f in group]:
        own = {fold(o) for objects in data.subjects[fold(fact.subject)].facts.values() for o in objects}
        assert fold(fact.target) not in own
        assert fact.target in data.relations[fact.relation].objects
        one, other = (encode(model.tokenizer, [Text("It is", target=t)])[0].target for t in (fact.target, fact.truth))
        assert one[0] != other[0]


def test_what_must_stay_is_not_what_is_edited(shared, drawn):
    data = read_knowledge(shared)
    for group in [group for groups in drawn.values() for group in groups]:
        edited = {text for f in group for text in (f.filled, *f.paraphrases)}
        closed = {near for f in group for near in table().close(f.relation)}
        for fact in group:
            assert len(fact.related) >= _groups.MIN_RELATED
            assert not edited & {p.prompt for p in fact.related}
            assert all(fact.subject in p.prompt for p in fact.related)
            answered = {p.answer for p in fact.related if p.answer}
            left = {r for r in data.subjects[fold(fact.subject)].facts if r not in closed}
            assert answered == {data.subjects[fold(fact.subject)].facts[r][0] for r in left}


def test_neighbours_are_others_with_the_same_object_or_at_least_the_same_relation(shared, drawn):
    data = read_knowledge(shared)
    for fact in [f for groups in drawn.values() for group in groups for f in group]:
        holders = data.relations[fact.relation].holders
        sharing = [k for k in holders.get(fold(fact.truth), ()) if k != fold(fact.subject)]
        if len(sharing) >= 3:
            assert {p.answer for p in fact.neighbors} == {fact.truth}
        assert fact.target not in {p.answer for p in fact.neighbors}
        assert not any(fold(fact.subject) in fold(p.prompt) for p in fact.neighbors)
        if fact.relation != "P641":  # one subject only
            assert len(fact.neighbors) >= 3
    assert fact.instructions and all("?" in q and fact.subject in q for q in fact.instructions)


def test_a_group_is_filled_with_the_model_s_own_answers(folder, tiny):
    eight = wrap(*tiny("gpt2"), source="tiny gpt2")
    groups = suites.same_subject(eight, folder, 8, 2, 0, folder / "eight.jsonl", split="all")
    counts = json.loads((folder / "eight.manifest.json").read_text())["counts"]
    assert counts["groups"] == len(groups)
    assert counts["facts"] == 8 * len(groups)
    assert counts["groups_all_from_data"] == 0, "nobody has eight relations apart in these sets"
    data = read_knowledge(folder)
    for group in groups:
        given = [f for f in group if f.truth in data.subjects[fold(f.subject)].facts.get(f.relation, ())]
        assert len(given) >= 2
        assert all(known(eight, group))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (" Paris, the city", "Paris"),
        (" New York and", "New York"),
        (" the city", ""),
        ("\n\nThe", ""),
        (" 1912", ""),
        (" Jean-Luc d'Arc Godard", "Jean-Luc d'Arc"),
    ],
)
def test_an_own_answer_is_cut_to_a_name(said, name):
    assert _groups._named(said) == name


def test_the_same_arguments_draw_the_same_and_read_it_back(model, folder, tmp_path, monkeypatch):
    out, twin = folder / "a" / "suite.jsonl", folder / "b.jsonl"
    first = suites.same_subject(model, folder, 2, 3, 7, out, split="all")
    assert suites.same_subject(model, folder, 2, 3, 7, twin, split="all") == first
    assert out.read_bytes() == twin.read_bytes()
    assert suites.read(out) == first
    assert [f for group in first for f in group] == load(out), "facts.load reads it, too"
    monkeypatch.setattr(suites, "group_facts", None)  # drawing again would fail
    assert suites.same_subject(model, folder, 2, 3, 7, out, split="all") == first
    with pytest.raises(TypeError):
        suites.same_subject(model, folder, 2, 3, 8, out, split="all")
    text = out.read_text(encoding="utf-8")
    out.write_text(text.replace("related", "Related", 1), encoding="utf-8")
    with pytest.raises(TypeError):  # altered since
        suites.same_subject(model, folder, 2, 3, 7, out, split="all")


def test_subjects_come_from_the_split(model, folder):
    for split in ("dev", "test"):
        groups = suites.same_subject(model, folder, 1, 3, 0, folder / f"{split}.jsonl", split=split)
        assert groups
        assert {suites.hashed_split(f.subject) for group in groups for f in group} == {split}


def test_wrong_arguments_and_files_are_refused(model, folder):
    with pytest.raises(UserError, match="1, 2, 4, 8 facts of a subject; got 3"):
        suites.same_subject(model, folder, 3, 3, 0, folder / "x.jsonl")
    with pytest.raises(UserError, match="split must be"):
        suites.counterfact(folder, None, 0, "train")
    with pytest.raises(UserError, match="At least 1"):
        suites.zsre(folder, 0, 0)
    (folder / "x.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(FactError, match=r"x\.jsonl line 1"):
        suites.read(folder / "x.jsonl")
    with pytest.raises(FactError, match="cannot be read"):
        suites.read(folder / "y.jsonl")


# Published sets


def test_the_split_is_fixed_and_about_thirty_to_seventy():
    counts = Counter(suites.hashed_split(f"subject {i}") for i in range(2000))
    assert 0.27 < counts["dev"] / 2000 < 0.33
    assert suites.hashed_split("Ada\u00a0Reed") == suites.hashed_split("ada reed ")
    assert (suites.hashed_split("Italy"), suites.hashed_split("Peru")) == ("dev", "test"), "never to change"


def test_counterfact_gets_related_prompts_and_one_record_a_subject(folder):
    facts = suites.counterfact(folder, None, 0, "all")
    assert len(facts) == len(PEOPLE) + 1, "one spelling of a subject, and not the broken record"
    by_name = {fold(f.subject): f for f in facts}
    zoe = by_name["zoe green"]
    assert zoe.related[0].to_dict() == {"prompt": "Zoe Green earns a living as a", "answer": "pilot"}
    assert len(zoe.related) == 4
    assert not any("born" in p.prompt for p in zoe.related)
    bo = by_name["bo reed"]
    assert {p.prompt for p in bo.related} >= {"Bo Reed died in", "Bo Reed works as a"}
    assert bo.paraphrases == ("It rained. Bo Reed hails from",), "a paraphrase names its subject"
    dev, test = (suites.counterfact(folder, None, 0, split) for split in ("dev", "test"))
    assert len(dev) + len(test) == len(facts)
    assert suites.counterfact(folder, 5, 0, "all") == facts[:5]
    assert suites.counterfact(folder, None, 1, "all") != facts


def test_knowedit_and_zsre_have_one_fact_a_subject(folder):
    edit = {"prompt": "Ada is from", "subject": "Ada", "target_new": "Rome", "portability": {}, "locality": {}}
    records = [edit, edit | {"target_new": "Oslo"}, edit | {"subject": "Bo"}]
    (folder / "knowedit").mkdir()
    (folder / "knowedit/wiki_counterfact_train.json").write_text(json.dumps(records), encoding="utf-8")
    assert [f.subject for f in suites.knowedit(folder, None, 0, "all")] == ["Ada"]
    question = {"subject": "Ada", "src": "Where is Ada from?", "rephrase": "Where?", "alt": "Rome", "answers": ["Oslo"]}
    (folder / "zsre").mkdir()
    (folder / "zsre/zsre_mend_train-1k.json").write_text(json.dumps([question, question]), encoding="utf-8")
    (fact,) = suites.zsre(folder, None, 0, "all")
    assert fact == Fact("Where is {} from?", "Ada", "Rome", "Oslo"), "the rephrase does not name Ada"


def test_the_real_sets_hold_what_the_page_says(data_dir):
    facts = suites.counterfact(data_dir, None, 0, "all")
    assert len(facts) == 866
    assert min(len(f.related) for f in facts) >= 4
    assert len(suites.knowedit(data_dir, None, 0)) == 937
    assert len(suites.zsre(data_dir, None, 0)) == 663
    subjects = read_knowledge(data_dir).subjects
    sizes = [sum(len(s.facts) >= n for s in subjects.values()) for n in (1, 2, 4)]
    assert sizes == [24157, 2092, 150]
