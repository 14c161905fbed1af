import json
import logging
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retouch.edit import facts
from retouch.edit.facts import Fact, Prompt
from retouch.errors import FactError

DATA = Path(os.environ.get("RETOUCH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))

words = st.text(alphabet="abAB{} .'é", min_size=1, max_size=12).filter(lambda s: s.strip() and "{}" not in s)
names = st.text(alphabet="xyzXYZ", min_size=1, max_size=6)

REWRITE = {
    "prompt": "The capital of {} is",
    "relation_id": "P36",
    "target_new": {"str": "Cusco", "id": "Q5582"},
    "target_true": {"str": "Lima", "id": "Q2868"},
    "subject": "Peru",
}
PLAIN = {"prompt": "The capital of {} is", "relation": "capital", "target_true": "Lima", "target_new": "Cusco"}
SAMPLES = {
    "retouch": {"prompt": "The capital of Peru is", "subject": "Peru", "target": "Cusco", "truth": "Lima"},
    "counterfact": {
        "case_id": 7,
        "pararel_idx": 1,
        "requested_rewrite": REWRITE,
        "paraphrase_prompts": ["Peru's capital,"],
        "neighborhood_prompts": ["The seat of Lima's mayor is in"],
        "attribute_prompts": ["The Incas lived in"],
        "generation_prompts": ["Peru's parliament", "Peru's parliament"],
        "relation_specific_prompts": ["The language of Peru is", {"prompt": "Peru lies in", "answer": "South America"}],
    },
    "flat": {
        "case_id": 7,
        "prompt": "The capital of Peru is",
        "subject": "Peru",
        "target_new": "Cusco",
        "ground_truth": "Lima",
        "rephrase_prompt": "Peru's capital,",
        "locality_prompt": "The mayor of Lima works in",
        "locality_ground_truth": "Lima",
    },
    "knowedit": {
        "subject": "Peru",
        "prompt": "The capital of Peru is",
        "target_new": "Cusco",
        "ground_truth": [["Lima", "City of Kings"]],
        "rephrase_prompt": "Peru's capital,",
        "portability": {"Reasoning": [{"prompt": "x", "ground_truth": "y"}]},
        "locality": {
            "Relation_Specificity": [
                {"prompt": "Peru speaks", "ground_truth": [["Spanish", "Castilian"], ["Quechua"]]}
            ],
            "Forgetfulness": [{"prompt": "The capital of Peru, which is not Lima, is", "ground_truth": []}],
        },
    },
    "zsre": {
        "subject": "Peru",
        "src": "What is the capital of Peru?",
        "pred": "Lima",
        "rephrase": "Which city is Peru's capital?",
        "alt": "Cusco",
        "answers": ["Lima", "City of Kings"],
        "loc": "nq question: who wrote it",
        "loc_ans": "Stephen King",
        "cond": "Lima >> Cusco",
    },
    "s2rke": {
        "subjectID": "Q419",
        "class": "country",
        "subject": {"name": "Peru", "URL": "", "original_name": "Perú", "description": ""},
        "Star_Topology": [
            {
                "requested_rewrite": PLAIN,
                "paraphrase_prompts": ["Peru's capital,"],
                "neighborhood_prompts": ["Chile is"],
            },
            {"requested_rewrite": PLAIN | {"prompt": "In {}, people speak", "relation": "language"}},
        ],
    },
    "mquake": {
        "case_id": 7,
        "requested_rewrite": [REWRITE | {"question": "What is the capital of Peru?"}],
        "questions": ["Which mayor?"],
        "answer": "A",
        "answer_alias": [],
        "new_answer": "B",
        "new_answer_alias": [],
        "new_single_hops": [{"question": "What is the capital of Peru?", "answer": "Cusco", "answer_alias": ["Qosqo"]}],
    },
    "known": {
        "known_id": 7,
        "subject": "Peru",
        "attribute": "Lima",
        "template": "{} has the capital",
        "prediction": " Lima, which",
        "prompt": "The capital of Peru is",
        "relation_id": "P36",
    },
}


def write(folder, *records, lines=True, name="set.json"):
    path = folder / name
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


# Fact


@given(before=words, subject=names, after=words)
def test_a_filled_prompt_and_its_template_are_the_same_fact(before, subject, after):
    template, filled = f"{before} {{}} {after}", f"{before} {subject} {after}"
    a, b = Fact.of(template, subject, "t"), Fact.of(filled, subject, "t")
    assert a == b
    assert (a.before, a.after, a.filled) == (f"{before} ", f" {after}", filled)


@given(
    prompt=words,
    subject=names,
    target=words,
    truth=st.none() | words,
    aliases=st.lists(words, max_size=2),
    related=st.lists(st.builds(Prompt, words, st.none() | words, st.lists(words, max_size=2)), max_size=2),
)
def test_to_dict_and_back_is_the_same_fact(prompt, subject, target, truth, aliases, related):
    fact = Fact(prompt + " {}", subject, target, truth, aliases=aliases, related=related)
    data = json.loads(json.dumps(fact.to_dict()))
    assert Fact.from_dict(data) == fact
    assert all(value not in (None, "", []) for value in data.values())


def test_the_last_occurrence_becomes_the_slot():
    assert Fact.of("Rome is old; Rome is in", "Rome", "France").prompt == "Rome is old; {} is in"


def test_a_part_of_a_longer_word_is_no_occurrence():
    assert Fact.of("Of Iran, an Iranian says it is", "Iran", "t").prompt == "Of {}, an Iranian says it is"
    assert Fact.of("Iran's capital, an Iranian says, is", "Iran", "t").prompt == "{}'s capital, an Iranian says, is"
    assert Fact.of("日本国の首都は", "日本", "t").prompt == "{}国の首都は"
    assert Fact.of("Iranians speak", "Iran", "t").prompt == "{}ians speak"


def test_braces_are_plain_text():
    fact = Fact('In {"a": {0}} the {} is {x}', "{key}", "{value}")
    assert fact.filled == 'In {"a": {0}} the {key} is {x}'
    assert Fact.from_dict(fact.to_dict()) == fact


def test_a_fact_without_a_subject_keeps_its_prompt():
    fact = Fact.of("Two and two make", "", "five")
    assert (fact.filled, fact.before, fact.after, fact.subject) == ("Two and two make", "Two and two make", "", "")
    assert Fact.from_dict({"prompt": "Two and two make", "target": "five"}) == fact


def test_a_missing_subject_names_the_near_one():
    with pytest.raises(FactError) as error:
        Fact.of("The Eiffel Tower is in", "Eifel Tower", "Rome")
    assert str(error.value) == (
        "subject 'Eifel Tower' is not in the prompt 'The Eiffel Tower is in'. Did you mean 'Eiffel Tower'?"
    )
    with pytest.raises(FactError, match=r"Did you mean 'FRANCE'\?"):
        Fact.of("The capital of FRANCE, is", "France", "Lyon")
    with pytest.raises(FactError, match=r"'The Louvre is in'\.$"):
        Fact.of("The Louvre is in", "Danube", "Rome")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"target": ""}, "field 'target' is empty"),
        ({"target": "  "}, "field 'target' is empty"),
        ({"prompt": " "}, "field 'prompt' is empty"),
        ({"prompt": 3}, "field 'prompt' must be text; got 3"),
        ({"subject": None}, "field 'subject' must be text; got None"),
        ({"subject": " "}, "field 'subject' is blank"),
        ({"prompt": "{} and {} are"}, "exactly one {} for the subject; it has 2"),
        ({"prompt": "Peru is"}, "exactly one {} for the subject; it has 0. Fact.of also takes a filled prompt"),
        ({"subject": ""}, "has {} but no subject"),
        ({"truth": ""}, "field 'truth' is empty"),
        ({"id": 7}, "field 'id' must be text; got 7"),
        ({"aliases": "Qosqo"}, "field 'aliases' must be a list; got 'Qosqo'"),
        ({"paraphrases": ["a", 1]}, "field 'paraphrases[1]' must be text; got 1"),
        ({"related": [{"answer": "x"}]}, "field 'related[0].prompt' is missing; found: answer"),
        ({"related": [{"prompt": "x", "answer": ""}]}, "in related[0]: field 'answer' is empty"),
        ({"neighbors": ["x", 5]}, "field 'neighbors[1]' must be text or an object"),
        ({"target": "\ud83d"}, "half of a character"),
        ({"subject": "Fra\ud83dnce"}, "half of a character"),
    ],
)
def test_a_wrong_field_is_named(values, says):
    with pytest.raises(FactError, match=re.escape(says)):
        Fact(**({"prompt": "The capital of {} is", "subject": "Peru", "target": "Cusco"} | values))


def test_a_misspelt_field_is_an_error_and_a_foreign_one_is_not():
    with pytest.raises(FactError, match=r"no field 'neighbours'. Did you mean 'neighbors'\?"):
        Fact.from_dict({"prompt": "a", "target": "b", "neighbours": []})
    assert Fact.from_dict({"prompt": "a", "target": "b", "source": "me", "id": 4}).id == "4"


# Loading


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "known"])
def test_each_format_gives_the_same_fact(tmp_path, name, lines):
    fact = facts.load(write(tmp_path, SAMPLES[name], lines=lines, name="any.name"))[0]
    assert (fact.subject, fact.target, fact.truth) == ("Peru", "Cusco", "Lima")
    assert fact.filled == ("What is the capital of Peru?" if name == "zsre" else "The capital of Peru is")


def test_counterfact_fields(tmp_path):
    (fact,) = facts.load(write(tmp_path, SAMPLES["counterfact"]))
    assert (fact.id, fact.relation) == ("7", "P36")
    assert fact.paraphrases == ("Peru's capital,",)
    assert fact.neighbors == (Prompt("The seat of Lima's mayor is in"),)
    assert fact.related == (Prompt("The language of Peru is"), Prompt("Peru lies in", "South America"))
    assert fact.generation == ("Peru's parliament",) * 2


def test_flat_fields(tmp_path):
    (fact,) = facts.load(write(tmp_path, SAMPLES["flat"]))
    assert fact.neighbors == (Prompt("The mayor of Lima works in", "Lima"),)
    assert fact.paraphrases == ("Peru's capital,",)


def test_knowedit_fields(tmp_path):
    (fact,) = facts.load(write(tmp_path, SAMPLES["knowedit"]))
    assert fact.related == (
        Prompt("Peru speaks", "Spanish", ("Castilian", "Quechua")),
        Prompt("The capital of Peru, which is not Lima, is"),
    )
    assert fact.paraphrases == ("Peru's capital,",)
    record = SAMPLES["knowedit"] | {"target_new": ["Cusco", "Qosqo"], "ground_truth": "Lima"}
    (fact,) = facts.load(write(tmp_path, record))
    assert (fact.target, fact.aliases, fact.truth) == ("Cusco", ("Qosqo",), "Lima")


def test_zsre_fields(tmp_path):
    (fact,) = facts.load(write(tmp_path, SAMPLES["zsre"]))
    assert fact.neighbors == (Prompt("nq question: who wrote it", "Stephen King"),)
    assert fact.paraphrases == ("Which city is Peru's capital?",)


def test_s2rke_is_a_group_of_facts(tmp_path):
    capital, language = facts.load(write(tmp_path, SAMPLES["s2rke"]))
    assert (capital.id, language.id) == ("Q419-0", "Q419-1")
    assert (capital.relation, language.relation) == ("capital", "language")
    assert capital.neighbors == (Prompt("Chile is"),)
    assert capital.related == (Prompt("In Peru, people speak", "Lima"),)


def test_mquake_gives_one_fact_an_edit(tmp_path):
    (fact,) = facts.load(write(tmp_path, SAMPLES["mquake"]))
    assert (fact.id, fact.relation, fact.aliases) == ("7-0", "P36", ("Qosqo",))
    assert fact.instructions == ("What is the capital of Peru?",)


def test_known_facts_are_to_be_located(tmp_path):
    (fact,) = facts.load(write(tmp_path, SAMPLES["known"]))
    assert (fact.filled, fact.target, fact.truth) == ("The capital of Peru is", "Lima", None)
    assert (fact.id, fact.relation) == ("7", "P36")


def test_white_space_around_names_is_dropped(tmp_path):
    own = {"prompt": "The capital of Peru is", "subject": " Peru ", "target": " Cusco\n"}
    (fact,) = facts.load(write(tmp_path, own))
    assert (fact.prompt, fact.subject, fact.target) == ("The capital of {} is", "Peru", " Cusco")
    (fact,) = facts.load(write(tmp_path, SAMPLES["zsre"] | {"subject": "Peru ", "alt": " Cusco "}))
    assert (fact.subject, fact.target) == ("Peru", "Cusco")


def test_prompts_about_the_subject_may_be_templates_and_those_about_others_may_not(tmp_path):
    asked = {"paraphrases": ["{} has its capital in"], "related": ["{} lies in", {"prompt": "{} speaks", "answer": "Q"}],
             "instructions": ["What is the capital of {}?"], "generation": ["{} is"]}  # fmt: skip
    (fact,) = facts.load(write(tmp_path, SAMPLES["retouch"] | asked))
    assert (*fact.paraphrases, *fact.instructions, *fact.generation) == (
        "Peru has its capital in", "What is the capital of Peru?", "Peru is"
    )  # fmt: skip
    assert fact.related == (Prompt("Peru lies in"), Prompt("Peru speaks", "Q"))
    with pytest.raises(FactError, match=r"line 1: field 'neighbors\[1\]' holds \{\}: write out the other subject"):
        facts.load(write(tmp_path, SAMPLES["retouch"] | {"neighbors": ["Chile is", "The capital of {} is"]}))


def test_the_old_answer_of_a_flat_set_may_be_a_list(tmp_path):
    (fact,) = facts.load(write(tmp_path, SAMPLES["flat"] | {"ground_truth": ["Lima", "City of Kings"]}))
    assert fact.truth == "Lima"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("retouch", "target"),
        ("retouch", "prompt"),
        ("counterfact", "requested_rewrite"),
        ("counterfact", "requested_rewrite.prompt"),
        ("counterfact", "requested_rewrite.subject"),
        ("counterfact", "requested_rewrite.target_new"),
        ("flat", "prompt"),
        ("flat", "subject"),
        ("flat", "target_new"),
        ("knowedit", "prompt"),
        ("knowedit", "subject"),
        ("knowedit", "target_new"),
        ("zsre", "src"),
        ("zsre", "subject"),
        ("zsre", "alt"),
        ("known", "subject"),
        ("s2rke", "subject.name"),
        ("mquake", "requested_rewrite"),
    ],
)
def test_a_missing_field_names_itself(tmp_path, name, field):
    record = json.loads(json.dumps(SAMPLES[name]))
    *path, last = field.split(".")
    inner = record
    for key in path:
        inner = inner[key]
    del inner[last]
    path = write(tmp_path, record)
    with pytest.raises(FactError, match=rf"set\.json line 1: field '{re.escape(field)}' is missing; found: "):
        facts.load(path)


def test_fields_inside_a_list_are_named_with_their_place(tmp_path):
    record = json.loads(json.dumps(SAMPLES["mquake"]))
    record["requested_rewrite"].append(REWRITE | {"target_new": {"id": "Q1"}})
    with pytest.raises(FactError, match=r"field 'requested_rewrite\[1\]\.target_new\.str' is missing; found: id"):
        facts.load(write(tmp_path, record))


def test_a_wrong_type_is_named(tmp_path):
    wrong = [
        ("flat", {"subject": 5}, "field 'subject' must be text; got 5"),
        ("counterfact", {"paraphrase_prompts": {"a": 1}}, "field 'paraphrase_prompts' must be a list"),
        ("counterfact", {"requested_rewrite": "x"}, "field 'requested_rewrite' must be an object; got 'x'"),
        ("knowedit", {"locality": {"Forgetfulness": [{"ground_truth": "a"}]}}, "locality.Forgetfulness[0].prompt"),
        ("zsre", {"answers": [1]}, "field 'answers[0]' must be text; got 1"),
        ("zsre", {"alt": ""}, "field 'alt' is empty"),
        ("s2rke", {"Star_Topology": [3]}, "field 'Star_Topology[0]' must be an object; got 3"),
    ]
    for name, change, says in wrong:
        with pytest.raises(FactError, match=re.escape(says)):
            facts.load(write(tmp_path, SAMPLES[name] | change))


def test_an_error_says_where(tmp_path):
    bad = SAMPLES["flat"] | {"subject": "Perru"}
    says = "subject 'Perru' is not in the prompt 'The capital of Peru is'. Did you mean 'Peru'?"
    with pytest.raises(FactError, match=re.escape(f"set.json line 2: {says}")):
        facts.load(write(tmp_path, SAMPLES["flat"], bad))
    with pytest.raises(FactError, match=re.escape(f"set.json record 1 (from 0): {says}")):
        facts.load(write(tmp_path, SAMPLES["flat"], bad, lines=False))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "set.json is empty. Facts are JSON Lines, an object a line, or one JSON array."),
        (" \n\n", "set.json is empty"),
        ("[]", "holds an empty list"),
        ("[1, 2", "set.json: broken JSON at column 6: Expecting ',' delimiter"),
        ('[\n{"a" 1}]', "set.json: broken JSON at line 2, column 6"),
        ('{"prompt": "a b", "target": "c"}\n\n{"prompt": }\n', "set.json line 3: broken JSON at column 12"),
        (
            "hello\nworld",
            "set.json line 1: broken JSON at column 1: Expecting value. Facts are JSON Lines, an object a li",
        ),
        ('{"question": "a", "answer": "b"}', "unknown format. Fields found: question, answer. Known formats:"),
        ("[3]", "Fields found: none"),
        ('[{"prompt": "a", "target": "b"}, 3]', "record 1 (from 0): a record must be an object; got 3"),
        ("[" * 100_000, "unreadable JSON"),
        ("9" * 5_000, "unreadable JSON"),
    ],
)
def test_a_broken_file_says_how(tmp_path, text, says):
    path = tmp_path / "set.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FactError, match=re.escape(says)):
        facts.load(path)


def test_the_unknown_format_lists_every_known_one(tmp_path):
    with pytest.raises(FactError) as error:
        facts.load(write(tmp_path, {"question": "a"}))
    assert all(f"\n  {name}: {about}" in str(error.value) for name, about in facts.formats().items())
    assert set(facts.formats()) == set(SAMPLES)


def test_a_file_that_cannot_be_opened(tmp_path):
    write(tmp_path, SAMPLES["flat"], name="facts.jsonl")
    with pytest.raises(FactError, match=r"there is no file .*Did you mean 'facts.jsonl'\?"):
        facts.load(tmp_path / "fact.jsonl")
    with pytest.raises(FactError, match="there is no file"):
        facts.load(tmp_path / "nowhere" / "facts.jsonl")
    with pytest.raises(FactError, match="cannot be read"):
        facts.load(tmp_path)
    (tmp_path / "latin").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(FactError, match="latin is not UTF-8 text: byte 12"):
        facts.load(tmp_path / "latin")


def test_a_byte_order_mark_windows_line_ends_and_a_pretty_object_are_read(tmp_path):
    path = tmp_path / "set"
    lines = [json.dumps(SAMPLES["retouch"] | {"target": t}, ensure_ascii=False) for t in ("a\u2028b", "c")]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    assert [f.target for f in facts.load(path)] == ["a\u2028b", "c"]
    path.write_text(json.dumps(SAMPLES["retouch"], indent=2), encoding="utf-8")
    assert [f.target for f in facts.load(path)] == ["Cusco"]


def test_bad_records_are_left_out_and_counted(tmp_path, caplog):
    path = write(tmp_path, SAMPLES["zsre"], SAMPLES["zsre"] | {"alt": ""}, SAMPLES["zsre"] | {"subject": "Chile"})
    path.write_text(path.read_text(encoding="utf-8") + '\n{"src": ', encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="retouch"):
        assert len(facts.load(path, bad="skip")) == 1
    assert "left out 3 of 4 records" in caplog.text
    assert all(s in caplog.text for s in ("line 2: field 'alt' is empty", "line 3: subject 'Chile'", "line 4: broken"))
    with pytest.raises(FactError, match="none of the 1 records can be used"):
        facts.load(write(tmp_path, SAMPLES["zsre"] | {"alt": ""}), bad="skip")
    with pytest.raises(FactError, match="bad must be 'error' or 'skip'; got 'ignore'"):
        facts.load(path, bad="ignore")


def test_a_first_record_with_a_missing_field_does_not_mislead(tmp_path):
    short = {key: SAMPLES["zsre"][key] for key in ("subject", "src")}
    with pytest.raises(FactError, match="line 1: field 'alt' is missing; found: subject, src"):
        facts.load(write(tmp_path, short, SAMPLES["zsre"]))


def test_n_and_seed(tmp_path, caplog):
    path = write(tmp_path, *({"prompt": f"Number {i} is", "target": "odd", "id": i} for i in range(50)))

    def ids(**how):
        return [int(f.id) for f in facts.load(path, **how)]

    assert ids(n=3) == [0, 1, 2]
    assert ids(n=10, seed=1) == ids(n=10, seed=1) == sorted(ids(n=10, seed=1))
    assert ids(n=10, seed=1) != ids(n=10, seed=2)
    assert len(ids(n=99, seed=1)) == 50
    assert "holds 50 facts; 99 were asked for" in caplog.text
    with pytest.raises(FactError, match="n must be at least 1 fact; got 0"):
        ids(n=0)


# Same subject


def fact_of(prompt, truth, subject="Peru", **more):
    return {"prompt": prompt, "subject": subject, "target": "x", "truth": truth} | more


def test_other_records_of_the_subject_serve_as_related(tmp_path):
    path = write(
        tmp_path,
        fact_of("The capital of {} is", "Lima"),
        fact_of("The language of {} is", "Spanish"),
        fact_of("The seat of {} is", "LIMA"),  # one answer: the same relation in other words
        fact_of("The language of {} is", "Spanish"),
        fact_of("The coins of {} are", None, subject="PERU"),
        fact_of("The capital of {} is", "Quito", subject="Ecuador"),
    )
    related = [[p.prompt for p in f.related] for f in facts.load(path)]
    capital, language, seat, coins = (
        f"The {x}" for x in ("capital of Peru is", "language of Peru is", "seat of Peru is", "coins of PERU are")
    )
    assert related == [
        [language, coins],
        [capital, seat, coins],
        [language, coins],
        [capital, seat, coins],
        [capital, language, seat],
        [],
    ]
    (first,) = facts.load(path, n=1)
    assert first.related == (Prompt(language, "Spanish"), Prompt(coins))


def test_known_relations_decide(tmp_path):
    path = write(
        tmp_path,
        fact_of("The capital of {} is", "Lima", relation="P36"),
        fact_of("The seat of {} is", "Callao", relation="P36"),
        fact_of("The port of {} is", "Lima", relation="P99"),
    )
    assert [p.prompt for p in facts.load(path)[0].related] == ["The port of Peru is"]


def test_a_set_with_related_prompts_is_left_alone(tmp_path):
    path = write(tmp_path, fact_of("The capital of {} is", "Lima"), fact_of("The coin of {} is", "sol", related=["r"]))
    assert [f.related for f in facts.load(path)] == [(), (Prompt("r"),)]


def test_disjoint_drops_only_what_is_edited():
    shared = Prompt("The coin of Peru is")
    capital = Fact("The capital of {} is", "Peru", "x", related=[shared, Prompt("Peru lies in")], neighbors=[shared])
    coin = Fact("The coin of {} is", "Peru", "y", related=[Prompt("Peru's capital,")])
    assert facts.disjoint([capital]) == [capital]
    first, second = facts.disjoint([capital, coin])
    assert (first.related, first.neighbors) == ((Prompt("Peru lies in"),), ())
    assert second == coin


def test_ten_thousand_records_of_one_subject_stay_linear(tmp_path):
    path = write(tmp_path, *(fact_of(f"Property {i} of {{}} is", f"value {i}") for i in range(10_000)))
    assert {len(f.related) for f in facts.load(path)} == {10}


# Words and texts that ship


def test_stop_words():
    assert 300 <= len(facts.stop_words()) <= 450
    assert all(word == word.casefold().strip() for word in facts.stop_words())


@pytest.mark.parametrize(
    "text", ["the", " The", "THE\n", "don't", " Don’t", "", "  ", "...", " \u00a0", '"', "a", "ourselves"]
)
def test_stops(text):
    assert facts.is_stop(text)


@pytest.mark.parametrize("text", ["Paris", " yen", "7", "é1", "東京", "Italy."])
def test_names_are_no_stops(text):
    assert not facts.is_stop(text)


def test_the_sample_facts_have_everything_a_report_measures():
    samples = facts.demo()
    assert len(samples) == len({f.id for f in samples}) == len({f.subject for f in samples}) == 14
    for fact in samples:
        assert fact.before, f"{fact.id}: the subject stands at the very start"
        assert fact.truth and fact.relation and fact.truth != fact.target
        lengths = [len(x) for x in (fact.paraphrases, fact.neighbors, fact.related, fact.instructions, fact.generation)]
        assert all(have >= want for have, want in zip(lengths, (2, 4, 3, 3, 2), strict=True)), fact.id
        own = (*fact.paraphrases, *fact.instructions, *fact.generation, *(p.prompt for p in fact.related))
        assert all(fact.subject in text for text in own), fact.id
        assert all(p.answer and fact.subject not in p.prompt for p in fact.neighbors), fact.id
        assert fact.filled not in fact.paraphrases
        prompts = (*fact.paraphrases, *(p.prompt for p in (*fact.neighbors, *fact.related)))
        assert all(text == text.strip() and not text.endswith("?") for text in prompts)
        assert len(set(prompts)) == len(prompts), fact.id


def test_the_protected_prompts_are_held_out():
    kept = facts.protected()
    texts = [p.prompt for p in kept]
    assert 300 <= len(set(texts)) == len(texts)
    assert all(p.answer and p.prompt == p.prompt.strip() for p in kept)
    samples = facts.demo()
    about = [re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for f in samples for name in (f.subject, f.target)]
    assert not [text for text in texts if any(name.search(text) for name in about)]
    measured = {p.prompt for f in samples for p in (*f.neighbors, *f.related)}
    assert not measured & set(texts)
    kept.clear()
    assert facts.protected()


# The published sets


@pytest.mark.parametrize(
    ("name", "n", "with_related", "skipped"),
    [
        ("counterfact/counterfact_full.json", 869, 0, 0),
        ("counterfact/counterfact_flat.jsonl", 18_733, 1_268, 0),
        ("knowedit/wiki_recent_train.json", 570, 415, 0),
        ("knowedit/wiki_counterfact_train.json", 1_428, 1_428, 0),
        ("zsre/zsre_mend_train-1k.json", 998, 2, 2),
        ("counterfact/known_1000.json", 1_209, 26, 0),
        ("mquake/MQuAKE-hard.json", 1_716, 402, 0),
    ],
)
def test_the_published_sets_load_whole(name, n, with_related, skipped):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no research data at {path}; set RETOUCH_DATA to its folder")
    if skipped:
        with pytest.raises(FactError, match=r"record 534 .*field 'alt' is empty"):
            facts.load(path)
    loaded = facts.load(path, bad="skip" if skipped else "error")
    assert (len(loaded), sum(bool(f.related) for f in loaded)) == (n, with_related)
    assert all(f.subject in f.filled and f.target for f in loaded)
    assert all(p.prompt != f.filled for f in loaded for p in f.related)


def test_counterfact_has_its_published_counts():
    path = DATA / "counterfact" / "counterfact_full.json"
    if not path.exists():
        pytest.skip(f"no research data at {path}; set RETOUCH_DATA to its folder")
    loaded = facts.load(path)
    assert {len(f.neighbors) for f in loaded} == {10}
    assert min(len(f.paraphrases) for f in loaded) >= 2
    assert all(f.truth and f.relation and f.generation for f in loaded)
    assert Counter(bool(re.fullmatch(r"P\d+", f.relation)) for f in loaded) == {True: len(loaded)}
