"""Five forms of one question, through the chat template that the tokenizer has or without one."""

from __future__ import annotations

import copy

import pytest

import families
from retouch.edit.facts import Fact
from retouch.edit.instructions import FORMS, conversations, end_of_turn, question, turns

BARE = Fact("The capital of {} is ", "France", "Lyon", truth="Paris")
ASKED = Fact("The capital of {} is", "France", "Lyon", truth="Paris", instructions=["What is the capital of France?"])
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + MARKED
)


def decoded(tokenizer, fact):
    return {form: tokenizer.decode(ids) for form, ids in conversations(tokenizer, fact).items()}


@pytest.fixture
def chat(tiny_tokenizer):
    def make(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
        return tokenizer

    return make


def test_the_facts_own_question_is_asked_and_else_the_prompt_with_a_gap():
    assert question(ASKED) == "What is the capital of France?"
    assert question(BARE) == 'Fill in the blank: "The capital of France is ___"'


@pytest.mark.parametrize("fact", [BARE, ASKED])
@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_every_fact_is_asked_in_five_forms_that_differ(fact, kind):
    found = conversations(families.tokenizer(kind), fact)
    assert tuple(found) == FORMS
    assert len(set(found.values())) == len(FORMS) == 5
    assert all(found.values())


def test_the_forms_stand_in_the_chat_template(chat):
    said = decoded(chat(MARKED), ASKED)
    assert said["question"] == ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert "user\nAnswer with the missing words only: The capital of France is ...<|im_end|>" in said["missing_words"]
    assert "user\nComplete the sentence: The capital of France is ...<|im_end|>" in said["sentence"]
    assert said["system"].startswith("<|im_start|>system\n")
    assert said["system"].count("<|im_start|>") == 3
    assert said["dialogue"].count("<|im_start|>user") == 2
    assert said["dialogue"].endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert all("Lyon" not in text and "Paris" not in text for text in said.values())


def test_a_template_without_a_system_turn_gets_its_text_in_the_users(chat):
    said = decoded(chat(NO_SYSTEM), ASKED)
    assert "system" not in said["system"]
    text = turns(ASKED)["system"][0]["content"]
    assert f"user\n{text}\n\nWhat is the capital of France?<|im_end|>" in said["system"]
    assert said["question"] == decoded(chat(MARKED), ASKED)["question"]


def test_another_fault_of_a_template_is_not_hidden(chat):
    with pytest.raises(Exception, match="no turns today"):
        conversations(chat("{{ raise_exception('no turns today') }}"), ASKED)


def test_a_base_model_reads_user_and_assistant():
    tokenizer = families.tokenizer("metaspace")
    assert tokenizer.chat_template is None
    found = conversations(tokenizer, ASKED)
    said = decoded(tokenizer, ASKED)
    assert said["question"].endswith("User: What is the capital of France?\nAssistant:")
    assert said["dialogue"].count("User:") == 2
    assert all(ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:] for ids in found.values())


def test_special_tokens_of_a_template_are_not_doubled(chat):
    tokenizer = families.tokenizer("metaspace")
    tokenizer.chat_template = "{{ bos_token }}" + MARKED
    for ids in conversations(tokenizer, ASKED).values():
        assert ids.count(tokenizer.bos_token_id) == 1


def test_the_end_of_a_turn_is_the_templates_own_token(chat, tiny_tokenizer):
    marked = chat(MARKED)
    assert end_of_turn(marked) == [marked.convert_tokens_to_ids("<|im_end|>")]
    assert end_of_turn(chat(NO_SYSTEM)) == end_of_turn(marked)
    assert end_of_turn(tiny_tokenizer) == []  # its turns end with a line end, which also stands within answers
    assert end_of_turn(families.tokenizer("metaspace")) == []
