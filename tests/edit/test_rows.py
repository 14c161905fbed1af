"""Facts as rows: where the value goes in, which rows count, and which sentence guards the subject."""

from __future__ import annotations

import copy

import pytest

from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.rows import grouped, problems
from retouch.errors import FactError
from retouch.model import wrap
from retouch.tokens import Text, encode

PLAIN = [Context("", 1.0)]
CONTEXTS = [Context("", 0.5), Context("I am the one. ", 0.3), Context("Because. ", 0.2)]
FACT = Fact("The capital of {} is", "France", "Lyon")
SHORT = Fact("{} is the capital of", "A", "France")  # one token, and it opens the prompt


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama"))


@pytest.fixture(scope="module")
def gemma(tiny):
    return wrap(*tiny("gemma2"))


def said(model, row, end):
    return model.tokenizer.decode(list(row.ids[: end + 1]))


def test_each_context_makes_a_row_that_holds_the_whole_target(llama):
    (problem,) = problems(llama, [FACT], CONTEXTS, "subject")
    assert problem.weights == pytest.approx([0.5, 0.3, 0.2])
    for row, anchor, context in zip(problem.rows, problem.anchors, CONTEXTS, strict=True):
        assert llama.tokenizer.decode(list(row.ids)) == f"{context.text}The capital of France is Lyon"
        assert said(llama, row, anchor) == f"{context.text}The capital of France"
        assert said(llama, row, row.prompt) == f"{context.text}The capital of France is"


def test_at_the_prompts_end_the_value_goes_in_at_its_last_token(llama):
    (problem,) = problems(llama, [FACT], CONTEXTS, "prompt")
    assert problem.anchors == [row.prompt for row in problem.rows]


def test_a_row_that_the_edited_token_opens_is_left_out_and_its_weight_is_shared(llama):
    (problem,) = problems(llama, [SHORT], CONTEXTS, "subject")
    assert len(problem.rows) == 2
    assert problem.weights == pytest.approx([0.6, 0.4])


def test_at_the_prompts_end_a_subject_that_opens_the_prompt_costs_no_row(llama):
    (problem,) = problems(llama, [SHORT], CONTEXTS, "prompt")
    assert len(problem.rows) == 3 and not problem.notes


# The row that guards the subject.


def test_a_subject_of_several_tokens_is_guarded_bare(llama):
    (problem,) = problems(llama, [FACT], CONTEXTS, "subject")
    assert llama.tokenizer.decode(list(problem.kl.ids)) == "France is a"
    assert problem.kl_at == problem.kl.subject > 0
    assert said(llama, problem.kl, problem.kl_at) == "France"


def test_a_subject_of_one_token_is_guarded_behind_the_first_context_that_has_words(llama):
    (problem,) = problems(llama, [SHORT], CONTEXTS, "subject")
    assert llama.tokenizer.decode(list(problem.kl.ids)) == "I am the one. A is a"
    assert said(llama, problem.kl, problem.kl_at) == "I am the one. A"


def test_behind_a_beginning_of_text_it_needs_no_context(gemma):
    (problem,) = problems(gemma, [SHORT], CONTEXTS, "subject")
    assert problem.kl.ids == encode(gemma.tokenizer, [Text("", "A", " is a")])[0].ids
    assert problem.kl_at == problem.kl.subject == 1


def test_a_value_at_the_prompts_end_goes_in_at_the_guarding_rows_last_token(llama):
    (problem,) = problems(llama, [FACT], CONTEXTS, "prompt")
    assert problem.kl_at == len(problem.kl.ids) - 1


def test_without_words_before_it_a_lone_token_stays_where_it_is(llama):
    (problem,) = problems(llama, [SHORT], PLAIN, "subject")
    assert problem.kl_at == 0 and len(problem.rows) == 1 and problem.notes


def test_without_words_before_it_a_lone_token_is_guarded_behind_a_beginning_of_text_if_there_is_one(tiny):
    network, words = tiny("llama")
    words = copy.deepcopy(words)
    words.bos_token = "<|end|>"
    model = wrap(network, words)
    (problem,) = problems(model, [SHORT], PLAIN, "subject")
    assert (problem.kl_at, problem.kl.ids[0]) == (1, words.bos_token_id)
    assert problems(model, [SHORT], PLAIN, "subject", "never")[0].kl_at == 0


@pytest.mark.parametrize("rule", ["always", "never"])
def test_the_rule_for_the_beginning_of_text_holds_for_all_rows(gemma, rule):
    (problem,) = problems(gemma, [FACT], CONTEXTS, "subject", rule)
    begins = [row.ids[0] == gemma.tokenizer.bos_token_id for row in (*problem.rows, problem.kl)]
    assert begins == [rule == "always"] * 4


# Refusals, notes, groups.


def test_a_subject_is_needed_only_where_the_value_goes_in_at_it(llama):
    bare = Fact("The currency of Japan is the", "", "franc")
    with pytest.raises(FactError, match="has no subject"):
        problems(llama, [FACT, bare], PLAIN, "subject")
    assert problems(llama, [FACT, bare], PLAIN, "prompt")[1].kl is None


def test_a_token_that_straddles_the_subjects_end_is_told(llama):
    (problem,) = problems(llama, [Fact("They said that {}e was", "th", "late")], CONTEXTS, "subject")
    assert problem.rows[0].merged
    assert any("merged_token" in note for note in problem.notes)


def test_facts_of_one_subject_stand_together_in_order_of_appearance():
    facts = [
        FACT,
        Fact("They live in {} and", "Brazil", "sing"),
        Fact("The currency of Japan is the", "", "franc"),
        Fact("{} borders", "France ", "Peru"),
        Fact("The currency of Japan is the", "", "mark"),
        Fact("In {} they speak", "Brazil", "Dutch"),
    ]
    assert grouped(facts) == [[0, 3], [1, 5], [2], [4]]
