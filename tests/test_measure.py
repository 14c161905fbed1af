"""What is measured is what the slow obvious way measures, whatever stands beside it."""

from __future__ import annotations

import copy
import functools
import math
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from families import DECODERS
from retouch import _continuations, _likelihood, measure, stats
from retouch.change import Change, Dense, LowRank, apply, side_by_side
from retouch.errors import UserError
from retouch.lanes import Owners
from retouch.model import wrap
from retouch.tokens import Text, encode

PROMPTS = ["The capital of France is", "Big Ben", "The official language of Brazil is the one that most people speak"]
TARGETS = ["Paris", "in London, of course", "Portuguese"]
TEXTS = [Text(p, target=t) for p in PROMPTS for t in TARGETS]
TEXT = stats.bundled_text("neutral")


@pytest.fixture(scope="module")
def open_tiny(tiny):
    return functools.cache(lambda family: wrap(*tiny(family), source=f"tiny {family}"))


@pytest.fixture(scope="module")
def llama(open_tiny):
    return open_tiny("llama")


@functools.cache
def exact(model):
    """The same network in float64."""
    return copy.deepcopy(model.network).double()


@torch.no_grad()
def slow_logp(model, ids):
    """Log probabilities after each token of one unpadded row, in float64."""
    return exact(model)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def slow_answer(model, text):
    (row,) = encode(model.tokenizer, [text])
    logp = slow_logp(model, row.ids)[row.prompt : -1]
    said = [float(logp[i, t]) for i, t in enumerate(row.target)]
    exact_ones = [int(logp[i].argmax()) == t for i, t in enumerate(row.target)]
    return -sum(said) / len(said), -min(said), sum(exact_ones) / len(said)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "phi3"])
def test_answers_are_those_of_one_row_at_a_time_in_float64(open_tiny, family):
    model = open_tiny(family)
    for text, said in zip(TEXTS, measure.answers(model, TEXTS)):
        nll, worst, share = slow_answer(model, text)
        assert said.nll == pytest.approx(nll, abs=1e-4)
        assert said.worst == pytest.approx(worst, abs=1e-4)
        assert said.exact == pytest.approx(share)
        assert said.strict == (share == 1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_the_company_of_other_rows_and_the_order_change_nothing(open_tiny, family):
    model = open_tiny(family)
    together = measure.answers(model, TEXTS)
    backwards = measure.answers(model, TEXTS[::-1])[::-1]
    for text, one, other in zip(TEXTS, together, backwards):
        (alone,) = measure.answers(model, [text])
        for found in (one, other):
            assert found.nll == pytest.approx(alone.nll, abs=1e-5)
            assert found.worst == pytest.approx(alone.worst, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "gptj", "gpt_neox"])
def test_left_and_right_padding_give_equal_logits(open_tiny, family):
    model = open_tiny(family)
    rows = [row.ids for row in encode(model.tokenizer, [Text(p) for p in PROMPTS])]
    with torch.no_grad():
        right, left = model.batch(rows), model.batch(rows, side="left")
        one, two = model.network(**model.inputs(right)).logits, model.network(**model.inputs(left)).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(one[i, : len(row)], two[i, -len(row) :], atol=1e-5, rtol=0)


def test_long_lists_run_in_several_batches_and_keep_their_order(llama, monkeypatch):
    whole = measure.answers(llama, TEXTS)
    monkeypatch.setattr(_likelihood, "ROW_TOKENS", 1)
    for one, other in zip(whole, measure.answers(llama, TEXTS), strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-5)


def test_a_bound_on_logits_cuts_batches_too(llama, monkeypatch):
    whole = measure.answers(llama, TEXTS)
    monkeypatch.setattr(_likelihood, "LOGITS", 1)
    for one, other in zip(whole, measure.answers(llama, TEXTS), strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_prompt_that_others_go_on_from_is_read_in_their_pass(open_tiny, family):
    model = open_tiny(family)
    prompt = Text("The capital of France is")
    longer = [Text(prompt.before, target="Paris, the city of light"), Text(prompt.before, target="Lyon")]
    logp = measure.next_logp(model, [prompt])[0]
    read = []
    count = model.network.register_forward_pre_hook(
        lambda _, args, kw: read.append(kw["input_ids"].shape[0]), with_kwargs=True
    )
    said, (shift,) = measure.look(model, longer, [measure.Before(prompt, logp, 7)])
    count.remove()
    assert sum(read) == 2
    assert shift.same
    assert shift.kl == pytest.approx(0, abs=1e-5)
    assert shift.nll == pytest.approx(-float(logp[7]), abs=1e-4)
    for one, other in zip(said, measure.answers(model, longer)):
        assert one.nll == pytest.approx(other.nll, abs=1e-5)


def test_a_shift_is_that_of_the_two_distributions(llama):
    prompt, other = Text("The capital of France is"), Text("Big Ben is located in")
    before, now = measure.next_logp(llama, [other, prompt])
    _, (shift,) = measure.look(llama, [], [measure.Before(prompt, before, 11)])
    assert shift.kl == pytest.approx(
        float(torch.nn.functional.kl_div(now, before, log_target=True, reduction="sum")), rel=1e-4
    )
    assert shift.same == bool(before.argmax() == now.argmax())
    assert shift.nll == pytest.approx(-float(now[11]), abs=1e-5)


def test_an_answer_names_its_targets_first_token(llama):
    (row,) = encode(llama.tokenizer, TEXTS[:1])
    assert measure.answers(llama, TEXTS[:1])[0].first == row.target[0]


def test_nothing_asked_is_nothing_answered(llama):
    assert measure.answers(llama, []) == []
    assert measure.continuations(llama, [], 3) == []
    assert measure.next_logp(llama, []).shape == (0, llama.anatomy.vocab_size)


def test_next_logp_is_a_distribution_and_that_of_the_last_token(llama):
    found = measure.next_logp(llama, [Text(p) for p in PROMPTS])
    torch.testing.assert_close(found.exp().sum(1), torch.ones(len(PROMPTS)))
    for row, prompt in zip(found, PROMPTS):
        torch.testing.assert_close(
            row.double(), slow_logp(llama, llama.tokenizer(prompt)["input_ids"])[-1], atol=1e-4, rtol=0
        )


# A text in chunks


@pytest.mark.parametrize(("n_tokens", "chunk"), [(64, 16), (70, 16), (65, 16), (10, 32)])
def test_chunks_of_a_text_are_scored_each_alone(llama, n_tokens, chunk):
    ids = llama.tokenizer(TEXT)["input_ids"][:n_tokens]
    wanted = []
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        logp = slow_logp(llama, piece)
        said = [-float(logp[i, token]) for i, token in enumerate(piece[1:])]
        wanted += [sum(said) / len(said)] if said else []  # a chunk of one token predicts nothing
    found = measure.chunk_nll(llama, TEXT, n_tokens, chunk)
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-4, rtol=0)
    mean = sum(wanted) / len(wanted)
    assert measure.perplexity(llama, TEXT, n_tokens, chunk) == pytest.approx(math.exp(mean), rel=1e-4)


# Continuing texts


@torch.no_grad()
def slow_ids(model, prompt, n):
    ids = list(model.tokenizer(prompt)["input_ids"])
    begin = len(ids)
    for _ in range(n):
        ids.append(int(model.network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    return ids[begin:]


def slow_greedy(model, prompt, n):
    return model.tokenizer.decode(slow_ids(model, prompt, n), skip_special_tokens=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_greedy_continuations_are_those_of_an_argmax_loop(open_tiny, family):
    model = open_tiny(family)
    assert measure.continuations(model, PROMPTS, 9) == [slow_greedy(model, p, 9) for p in PROMPTS]


def test_greedy_is_greedy_whatever_the_models_own_generation_settings_say(tiny):
    network, words = tiny("llama")
    network.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, repetition_penalty=3.0)
    model = wrap(network, words)
    assert measure.continuations(model, PROMPTS, 9) == [slow_greedy(model, p, 9) for p in PROMPTS]
    assert network.generation_config.repetition_penalty == 3.0


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone(llama):
    before = torch.get_rng_state()
    one = measure.continuations(llama, PROMPTS, 12, top_k=5, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert measure.continuations(llama, PROMPTS, 12, top_k=5, seed=3) == one
    assert measure.continuations(llama, PROMPTS, 12, top_k=5, seed=4) != one


def test_token_ids_are_continued_as_they_are(open_tiny):
    model = open_tiny("gemma2")  # its tokenizer puts a beginning-of-text token in front
    ids = tuple(model.tokenizer("The capital of France is")["input_ids"])
    text, as_ids, bare = measure.continuations(model, ["The capital of France is", ids, ids[1:]], 8)
    assert text == as_ids != bare


def test_each_prompt_has_its_own_number_of_new_tokens(llama):
    prompts = [*PROMPTS[:2], PROMPTS[0]]
    found = measure.continuations(llama, prompts, [3, 9, 7])
    assert found == [measure.continuations(llama, [p], n)[0] for p, n in zip(prompts, (3, 9, 7))]
    assert found[2].startswith(found[0])
    with pytest.raises(UserError, match="at least 1; got 0"):
        measure.continuations(llama, prompts, [3, 0, 7])


def test_a_text_ends_at_a_token_that_stops_it(llama):
    (whole,) = measure.continuations(llama, PROMPTS[:1], 8)
    ids = slow_ids(llama, PROMPTS[0], 8)
    stop = ids[4]
    (cut,) = measure.continuations(llama, PROMPTS[:1], 8, stop=[stop])
    assert cut == llama.tokenizer.decode(ids[: ids.index(stop)])
    assert whole.startswith(cut)


def test_batches_of_continuations_are_bounded_and_change_nothing(llama, monkeypatch):
    whole = measure.continuations(llama, PROMPTS, 6)
    monkeypatch.setattr(_continuations, "CACHE_MIB", 0)
    assert measure.continuations(llama, PROMPTS, 6) == whole


def test_total_counts_the_prompt_too(llama):
    prompt = "The capital of France is"
    used = len(llama.tokenizer(prompt)["input_ids"])
    greedy = slow_greedy(llama, prompt, 30 - used)
    assert measure.continuations(llama, [prompt], 30, total=True) == [greedy]
    assert measure.continuations(llama, [prompt], 2, total=True) == [slow_greedy(llama, prompt, 1)]


def test_an_empty_text_cannot_be_continued(llama):
    with pytest.raises(UserError, match="An empty text cannot be continued"):
        measure.continuations(llama, ["The", "  "], 3)
    with pytest.raises(UserError, match="half of a character"):
        measure.continuations(llama, ["The", "The \udcff is"], 3)


# Fluency


def test_the_entropy_of_a_known_text():
    # bigrams: ab, ba, ab, ba, ab: 3/5 and 2/5; trigrams: aba, bab, aba, bab: halves, one bit
    bigrams = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert measure.ngram_entropy("a b a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1.0) / 2)
    # all different: log2 5 and log2 4
    assert measure.ngram_entropy("a b c d e f") == pytest.approx((2 / 3 * math.log2(5) + 4 / 3 * 2.0) / 2)


@pytest.mark.parametrize("text", ["", "one", "same same same same"])
def test_a_text_that_says_one_thing_has_no_entropy(text):
    assert measure.ngram_entropy(text) == 0


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=20))
@settings(max_examples=50, deadline=None)
def test_entropy_lies_between_nothing_and_all_different(words):
    most = (2 / 3 * math.log2(len(words) - 1) + 4 / 3 * math.log2(len(words) - 2)) / 2
    assert -1e-12 <= measure.ngram_entropy(" ".join(words)) <= most + 1e-12


# Sizes and costs


@pytest.mark.parametrize("family", DECODERS)
def test_flops_of_one_token_are_those_that_torch_counts(open_tiny, family):
    model = open_tiny(family)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.network(input_ids=torch.tensor([[5]]), use_cache=False)
    assert measure.flops_per_token(model) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_from_a_block_on_leave_out_what_lies_below(llama):
    whole, above = measure.flops_per_token(llama, head=False), measure.flops_per_token(llama, 1, head=False)
    assert above == pytest.approx(whole / 2)
    assert measure.flops_per_token(llama) - whole == 2 * llama.anatomy.vocab_size * 32


def test_tied_weights_count_once(open_tiny):
    model = open_tiny("qwen2")
    assert measure.n_parameters(model) == sum(p.numel() for p in dict(model.network.named_parameters()).values())
    assert measure.n_parameters(model) < sum(p.numel() for p in model.network.state_dict().values())


def test_watched_sees_a_peak_that_is_gone_again():
    with measure.watched() as idle:
        pass
    # Straight from the system: an allocator may hand out memory that the process already holds.
    with measure.watched() as cost, mmap.mmap(-1, 64 * 2**20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert cost.peak_mib - cost.start_mib > 56
    assert 0 <= idle.seconds < cost.seconds


def test_watched_is_filled_in_after_an_error_too():
    with pytest.raises(ZeroDivisionError), measure.watched() as cost:
        raise ZeroDivisionError
    assert cost.seconds > 0
    assert cost.peak_mib > 0


def test_where_the_system_has_no_such_counter_the_lifetime_peak_serves(monkeypatch):
    monkeypatch.setattr(measure, "_reset_peak", lambda: False)
    with measure.watched() as cost:
        pass
    assert cost.peak_mib > 30


# Many changes at once


def _random(*shape, seed):
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _part(model, name, kind, seed):
    out, into = model.anatomy.shape(name)
    if kind == "dense":
        return Dense(_random(out, into, seed=seed))
    return LowRank(_random(out, kind, seed=seed), _random(kind, into, seed=seed + 100))


ONE, TWO = "blocks.0.mlp.down", "blocks.1.mlp.down"
PLANS = {
    "ranks that differ": [{ONE: 1}, {ONE: 3}, {ONE: 2}],
    "weights that differ": [{ONE: 2}, {TWO: 1}, {ONE: 1, TWO: 3}],
    "whole differences": [{TWO: "dense"}, {TWO: "dense"}],
    "both kinds and none": [{ONE: 2}, {ONE: "dense", TWO: 1}, {TWO: "dense"}],
}


def planned(model, plan, seed):
    parts = {n: _part(model, n, kind, seed + i) for i, (n, kind) in enumerate(plan.items())}
    return Change("test", model.base_fingerprint, parts)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_changes_side_by_side_are_each_change_alone(open_tiny, family, plan):
    model = open_tiny(family)
    changes = [planned(model, p, 10 * i) for i, p in enumerate(PLANS[plan])]
    rows = [row.ids for row in encode(model.tokenizer, [Text(p) for p in PROMPTS[:2]])]
    plain = measure.continuations(model, PROMPTS[:2], 6)
    with side_by_side(model, changes), torch.no_grad():
        logits = model.network(**model.inputs(model.batch(rows * len(changes)))).logits
        said = measure.continuations(model, PROMPTS[:2] * len(changes), 6)
    differs = False
    for i, change in enumerate(changes):
        alone = apply(model, change)
        with torch.no_grad():
            wanted = alone.network(**alone.inputs(alone.batch(rows))).logits
        torch.testing.assert_close(logits[2 * i : 2 * i + 2], wanted, atol=1e-4, rtol=1e-4)
        assert said[2 * i : 2 * i + 2] == measure.continuations(alone, PROMPTS[:2], 6)
        differs = differs or said[2 * i : 2 * i + 2] != plain
    assert differs
    assert measure.continuations(model, PROMPTS[:2], 6) == plain


def test_biases_side_by_side(open_tiny):
    model = open_tiny("gpt2")
    changes = [
        Change("test", model.base_fingerprint, parts)
        for parts in (
            {f"{ONE}:bias": Dense(_random(32, 1, seed=1))},
            {ONE: _part(model, ONE, 2, 2), f"{ONE}:bias": Dense(_random(32, 1, seed=3))},
        )
    ]
    row = encode(model.tokenizer, [Text(PROMPTS[0])])[0].ids
    with side_by_side(model, changes), torch.no_grad():
        logits = model.network(input_ids=torch.tensor([row, row])).logits
    for i, change in enumerate(changes):
        with torch.no_grad():
            wanted = apply(model, change).network(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[i], wanted, atol=1e-4, rtol=1e-4)


MIXED = [{ONE: 2}, {ONE: 20, TWO: 1}, {TWO: "dense"}, {}]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_each_row_carries_the_change_that_it_is_given(open_tiny, family):
    model = open_tiny(family)
    changes = [planned(model, p, 10 * i) for i, p in enumerate(MIXED)]
    each = [3, 1, 0, 2, 1, 0]
    texts = [Text(PROMPTS[i % 2], target="Paris and London") for i in range(len(each))]
    before = measure.next_logp(model, texts)
    prompts = [measure.Before(Text(t.before), logp, 5) for t, logp in zip(texts, before)]
    with side_by_side(model, changes) as lanes:
        owners = Owners(lanes, each * 2)
        said, shifts = measure.look(model, texts, prompts, owners=owners)
        ratio = measure.perplexities(model, stats.bundled_text("neutral"), Owners(lanes, range(4)), 40, 20)
        text = measure.continuations(model, [t.before for t in texts], 5, owners=owners)
        assert lanes.index.tolist() == [0, 1, 2, 3]  # equal groups again
    for i, k in enumerate(each):
        alone = apply(model, changes[k]) if MIXED[k] else model
        (one,), (shift,) = measure.look(alone, [texts[i]], [prompts[i]])
        assert said[i].nll == pytest.approx(one.nll, abs=1e-4)
        assert (shifts[i].kl, shifts[i].nll) == pytest.approx((shift.kl, shift.nll), abs=1e-4)
        assert text[i] == measure.continuations(alone, [texts[i].before], 5)[0]
        assert ratio[k] == pytest.approx(measure.perplexity(alone, stats.bundled_text("neutral"), 40, 20), rel=1e-4)
    assert len({round(r, 3) for r in ratio}) == 4


def test_a_change_that_several_rows_carry_is_kept_once(open_tiny):
    model = open_tiny("llama")
    one, two = planned(model, {ONE: 1}, 0), planned(model, {ONE: "dense"}, 5)
    with side_by_side(model, [one, two, one]) as lanes:
        assert lanes.n_lanes == 2
        assert lanes.index.tolist() == [0, 1, 0]
        assert {lane: rows.tolist() for lane, rows in lanes.rows.items()} == {0: [0, 2], 1: [1]}


def test_groups_come_back_after_an_error(open_tiny):
    model = open_tiny("llama")
    with side_by_side(model, [planned(model, {ONE: 1}, i) for i in range(2)]) as lanes:
        with pytest.raises(ZeroDivisionError), lanes.carrying([1, 1, 0]):
            raise ZeroDivisionError
        assert lanes.index.tolist() == [0, 1]
