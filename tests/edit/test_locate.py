"""Causal traces, the attribute rate and knock-outs against obvious whole passes and closed cases."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import typer

import families
from retouch._plots import plot_heat
from retouch.cli import locate as commands
from retouch.edit._attributes import _attribute_tokens
from retouch.edit._causal import Asked, around, ask, blur, effects, site, span, spread_of, window_of
from retouch.edit.facts import Fact, is_stop
from retouch.edit.locate import attribute_rate, causal_trace, knock_outs, locate, rets_block
from retouch.errors import FactError, ModelError, SettingsError, UserError
from retouch.model import wrap
from retouch.tokens import Text, encode

FACT = Fact("The capital of {} is", "France", "Lyon", "Paris")
ENDS = (
    "is was in and where of the to by on with for from at as has had will can may also now then here there near about"
)


def question(model, fact=FACT, token=None):
    """The fact's prompt, with the model's own next token as its answer."""
    row = encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after)])[0]
    subject = span(model, fact, row)
    if token is None:
        with torch.no_grad():
            token = int(model.network(input_ids=torch.tensor([row.ids])).logits[0, -1].argmax())
    others = tuple(i for i in range(len(row.ids)) if i not in subject)
    return Asked(fact, row.ids, subject, others, "?", token)


def told(model, fact=FACT):
    """A fact whose answer the model gives: the first of many prompts after which its likeliest token is a whole word."""
    for end in ENDS.split():
        asked = Fact(f"The capital of {{}} {end}", fact.subject, "x")
        word = model.tokenizer.decode([question(model, asked).token])
        if word.strip():
            known = Fact(asked.prompt, fact.subject, word, "nothing like it")
            if ask(model, [known])[0]:
                return known
    raise AssertionError("this tiny model answers nothing that can be written")


class Slow:
    """The oracle: one unpadded row at a time through the whole network in float64, with plain hooks."""

    def __init__(self, model, asked, part):
        self.model, self.asked, self.part = model, asked, part
        self.network = copy.deepcopy(model.network).double()
        self.own = self.outputs()

    def module(self, name):
        return self.network.get_submodule(self.model.anatomy.path(name))

    def run(self):
        logits = self.network(input_ids=torch.tensor([self.asked.ids]), use_cache=False).logits
        return float(logits[0, -1].softmax(-1)[self.asked.token])

    @torch.no_grad()
    def outputs(self):
        seen = {}
        handles = [
            self.module(site(self.part, b)).register_forward_hook(
                lambda _, __, out, b=b: seen.update({b: (out[0] if isinstance(out, tuple) else out).clone()})
            )
            for b in range(self.model.anatomy.n_blocks)
        ]
        self.clean = self.run()
        for handle in handles:
            handle.remove()
        return {b: s.reshape(len(self.asked.ids), -1) for b, s in seen.items()}

    @torch.no_grad()
    def probability(self, corrupt, noise, places, blocks):
        """P(answer) with noise at some tokens, and the part's own outputs at some places and blocks."""

        def blurred(_, __, out):
            moved = out.clone()
            moved[0, list(corrupt)] += noise.double()
            return moved

        def restored(block):
            def hook(_, __, out):
                state = out[0] if isinstance(out, tuple) else out
                moved = state.reshape(len(self.asked.ids), -1).clone()
                moved[list(places)] = self.own[block][list(places)]
                moved = moved.reshape(state.shape)
                return (moved, *out[1:]) if isinstance(out, tuple) else moved

            return hook

        handles = [self.module("embed").register_forward_hook(blurred)]
        handles += [self.module(site(self.part, b)).register_forward_hook(restored(b)) for b in blocks]
        try:
            return self.run()
        finally:
            for handle in handles:
                handle.remove()


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of {} is", "France"),
        ("{} is located in", "Big Ben"),
        ("They love {}", "Łódź and its café"),
        ('She said "{}" twice', "été"),
        ("In {}, the language is", "日本"),
    ],
)
def test_the_span_holds_the_subject_and_nothing_before_it(tiny, kind, prompt, subject):
    model = wrap(*tiny("llama" if kind == "byte" else "mistral", n_blocks=2))
    fact = Fact(prompt, subject, "x")
    row = encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after)])[0]
    found = span(model, fact, row)
    text = fact.filled
    spans = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    begin, end = len(fact.before), len(fact.before) + len(subject)
    wanted = [i for i, (a, b) in enumerate(spans) if a < end and b > begin and text[max(a, begin) : b].strip()]
    assert list(found) == wanted


def test_special_tokens_are_neither_subject_nor_other(open_tiny):
    model = open_tiny("mistral")  # its tokenizer puts a beginning-of-text token in front
    known = told(model)
    (one,), _ = ask(model, [known])
    assert 0 not in one.others and 0 not in one.subject
    assert sorted([*one.others, *one.subject]) == list(range(1, len(one.ids)))


def test_windows_are_cut_at_both_ends():
    assert [list(around(c, 3, 4)) for c in range(4)] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert list(around(0, 1, 4)) == [0]
    assert list(around(2, 99, 4)) == [0, 1, 2, 3]


def test_default_windows_are_a_fifth_of_the_depth_and_one_for_states(llama, open_tiny):
    assert window_of(open_tiny("llama", 10), "mlp", None) == 2
    assert window_of(llama, "mlp", None) == 1
    assert window_of(open_tiny("llama", 10), "state", None) == 1
    with pytest.raises(SettingsError, match="window must be at least 1"):
        window_of(llama, "mlp", 0)


# ---------------------------------------------------------------- causal trace


@pytest.mark.parametrize("part", ["mlp", "attention", "state"])
@pytest.mark.parametrize("family", families.DECODERS)
def test_effects_are_those_of_whole_passes(open_tiny, family, part):
    model = open_tiny(family)
    asked = question(model)
    noise = blur(model, len(asked.subject), 2, 3 * spread_of(model, [asked]), seed=1)
    places = [asked.subject[-1], len(asked.ids) - 1]
    found = effects(model, asked, places, asked.subject, noise, part, 2)
    slow = Slow(model, asked, part)
    corrupted = [slow.probability(asked.subject, n, [], []) for n in noise]
    assert found.clean == pytest.approx(slow.clean, rel=1e-4)
    assert found.corrupted == pytest.approx(sum(corrupted) / 2, rel=1e-4)
    for i, place in enumerate(places):
        for centre in range(3):
            back = [slow.probability(asked.subject, n, [place], around(centre, 2, 3)) for n in noise]
            assert float(found.effect[i, centre]) == pytest.approx(sum(back) / 2 - sum(corrupted) / 2, abs=1e-5)


def test_no_noise_no_effect(llama):
    asked = question(llama)
    noise = blur(llama, len(asked.subject), 3, 0.0, seed=0)
    found = effects(llama, asked, range(len(asked.ids)), asked.subject, noise, "mlp", 2)
    assert found.corrupted == pytest.approx(found.clean, abs=1e-6)
    assert float(found.effect.abs().max()) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "opt"])
def test_putting_everything_back_gives_the_untouched_probability(open_tiny, family):
    """The last block's state at the prompt's end is all that the answer depends on."""
    model = open_tiny(family)
    asked = question(model)
    noise = blur(model, len(asked.others), 3, 5 * spread_of(model, [asked]), seed=0)
    found = effects(model, asked, [len(asked.ids) - 1], asked.others, noise, "state", 1)
    assert abs(found.corrupted - found.clean) > 1e-4
    assert found.corrupted + float(found.effect[0, -1]) == pytest.approx(found.clean, abs=1e-6)


def test_a_token_after_which_nothing_was_blurred_has_no_effect_of_its_own(llama):
    """Before the subject nothing is corrupted, so putting it back changes nothing."""
    asked = question(llama)
    noise = blur(llama, len(asked.subject), 2, 1.0, seed=0)
    found = effects(llama, asked, range(asked.subject[0]), asked.subject, noise, "mlp", 3)
    assert float(found.effect.abs().max()) < 1e-6
    (whole,), _ = causal_trace(llama, [told(llama)], n_samples=2)
    assert {e for row in whole.effect[: whole.subject[0]] for e in row} == {0.0}
    assert all(any(row) for row in whole.effect[whole.subject[0] :])


def test_noise_is_seeded_and_scaled_by_the_subjects_embeddings(llama):
    asked = question(llama)
    table = llama.network.get_input_embeddings().weight[list(asked.ids)][list(asked.subject)]
    assert spread_of(llama, [asked]) == pytest.approx(float(table.std(correction=0)), rel=1e-5)
    assert torch.equal(blur(llama, 2, 3, 1.0, 7), blur(llama, 2, 3, 1.0, 7))
    assert not torch.equal(blur(llama, 2, 3, 1.0, 7), blur(llama, 2, 3, 1.0, 8))
    assert float(blur(llama, 50, 50, 2.0, 0).std()) == pytest.approx(2.0, rel=0.02)


def test_facts_that_the_model_does_not_say_are_left_out_and_named(llama):
    known = told(llama)
    maps, left_out = causal_trace(llama, [FACT, known], n_samples=2)
    assert [m.prompt for m in maps] == [known.filled]
    assert len(left_out) == 1
    assert "'The capital of France is'" in left_out[0]
    assert "not with 'Paris' or 'Lyon'" in left_out[0]


def test_the_truth_or_the_target_is_the_answer_whichever_the_model_says(llama):
    known = told(llama)
    as_truth = Fact(known.prompt, known.subject, "nothing like it", known.target)
    assert ask(llama, [known])[0][0].answer == ask(llama, [as_truth])[0][0].answer == known.target


def test_a_map_has_a_row_a_token_and_a_column_a_block(llama):
    (found,), _ = causal_trace(llama, [told(llama)], n_samples=2)
    assert len(found.effect) == len(found.tokens)
    assert {len(row) for row in found.effect} == {3}
    assert "".join(found.tokens[found.subject[0] : found.subject[1] + 1]).strip() == "France"
    token, block, size = found.peak
    assert found.effect[token][block] == size == max(max(row) for row in found.effect)
    again = causal_trace(llama, [told(llama)], n_samples=2)[0][0]
    assert found == again


def test_wrong_input_is_named(llama, tiny):
    with pytest.raises(FactError, match="no facts"):
        causal_trace(llama, [])
    with pytest.raises(FactError, match="has no subject; causal tracing blurs"):
        causal_trace(llama, [Fact("The capital is", "", "Paris")])
    with pytest.raises(SettingsError, match=r"part must be one of mlp, attention, state; got 'head'"):
        causal_trace(llama, [FACT], part="head")
    with pytest.raises(ModelError, match="encoder"):
        causal_trace(wrap(*tiny("bert")), [FACT])


# ---------------------------------------------------------------- attribute rate and knock-outs


def vocabulary(model, n):
    """Words that are one token each behind a prompt, and no stop words."""
    texts = [model.tokenizer.decode([t]).strip() for t in range(len(model.tokenizer))]
    words = [w for w in dict.fromkeys(texts) if len(w) > 2 and w.isalpha() and not is_stop(w)]
    rows = encode(model.tokenizer, [Text("It is", target=w) for w in words])
    return [w for w, r in zip(words, rows) if len(r.target) == 1][-n:]


def test_the_block_of_rets_is_the_first_that_passes_half_of_the_range():
    assert rets_block([0.1, 0.1, 0.3, 0.31, 0.5, 0.2]) == 3
    assert rets_block([0.5, 0.1, 0.1]) == 0
    assert rets_block([0.2, 0.2]) is None


def test_the_rate_counts_the_attributes_among_the_likeliest(llama):
    """A head that reads one direction ranks words by one number; the ranking is then known by hand."""
    size = llama.anatomy.vocab_size
    (word,) = vocabulary(llama, 1)
    (row,) = encode(llama.tokenizer, [Text(FACT.before, FACT.subject, FACT.after)])
    states = []
    handles = [
        llama.module(f"blocks.{b}").register_forward_hook(
            lambda _, __, out: states.append((out[0] if isinstance(out, tuple) else out)[0, -1])
        )
        for b in range(3)
    ]
    with torch.no_grad():
        llama.network(input_ids=torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    normed = torch.stack([llama.module("final_norm")(s) for s in states])
    direction = torch.linalg.lstsq(normed, torch.tensor([[1.0], [-1.0], [1.0]])).solution[:, 0]
    wanted = {r.target[0] for r in encode(llama.tokenizer, [Text(FACT.before, FACT.subject, FACT.after, word)])}
    head = torch.linspace(-1, -0.5, size)[:, None] * direction
    head[list(wanted)] = direction  # read first where the number is positive, last where it is negative
    model = llama.with_weights({llama.anatomy.weight("head"): head})
    found = attribute_rate(model, [FACT], [word, "the"], top=4)
    assert found.rates == pytest.approx([0.25, 0.0, 0.25])
    assert found.n_tokens == {FACT.prompt: 1}


def test_the_rate_is_the_logit_lens_share_in_every_family(open_tiny):
    for family in families.DECODERS:
        model = open_tiny(family)
        facts = [FACT, Fact("The largest city of {} by far is", "Japan", "Rome", "London")]
        words = vocabulary(model, 40)
        found = attribute_rate(model, facts, [*words, "the"], top=50)
        rates = torch.zeros(3)
        for fact in facts:
            row = encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after)])[0]
            first = {
                encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after, w)])[0].target[0] for w in words
            }
            with torch.no_grad():
                output = model.network(input_ids=torch.tensor([row.ids]), output_hidden_states=True, use_cache=False)
                lens = [model.logits(s[0, -1]) for s in output.hidden_states[1:-1]] + [output.logits[0, -1]]
            rates += torch.tensor([len(first & set(x.topk(50).indices.tolist())) / 50 for x in lens]) / 2
        assert found.rates == pytest.approx(rates.tolist(), abs=1e-6), family


def test_attributes_come_from_the_facts_of_the_relation_and_stop_words_do_not_count(llama):
    one, two, three, four = vocabulary(llama, 4)
    facts = [
        Fact("The capital of {} is", "France", one, two, relation="P36"),
        Fact("{} has the capital", "Italy", three, "the", relation="P36"),
        Fact("The currency of {} is the", "Japan", four),
        Fact("The answer to {} is", "it", "the"),
    ]
    words = _attribute_tokens(llama, facts, (), "tokenizer")
    decoded = {r: {llama.tokenizer.decode([t]).strip() for t in own} for r, own in words.items()}
    assert decoded == {"P36": {one, two, three}, facts[2].prompt: {four}, facts[3].prompt: set()}
    alone = attribute_rate(llama, facts[:3])
    assert attribute_rate(llama, facts).rates == alone.rates, "a relation without attributes is no zero in the mean"
    with pytest.raises(FactError, match="more than a stop word or a letter"):
        attribute_rate(llama, [FACT], ["the", "of"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_knock_outs_silence_one_token_in_some_blocks(open_tiny, family):
    model = open_tiny(family)
    words = vocabulary(model, 60)
    found = {(k.part, k.place): k for k in knock_outs(model, [FACT], words, window=2, top=20)}
    assert set(found) == {(p, q) for p in ("mlp", "attention") for q in ("subject", "prompt")}
    row = encode(model.tokenizer, [Text(FACT.before, FACT.subject, FACT.after)])[0]
    own = _attribute_tokens(model, [FACT], words, "tokenizer")[FACT.prompt]

    @torch.no_grad()
    def rate(part=None, at=0, blocks=()):
        def hook(_, __, out):
            moved = out.reshape(len(row.ids), -1).clone()
            moved[at] = 0
            return moved.reshape(out.shape)

        handles = [model.module(site(part, b)).register_forward_hook(hook) for b in blocks]
        logits = model.network(input_ids=torch.tensor([row.ids])).logits[0, -1]
        for handle in handles:
            handle.remove()
        return sum(t in own for t in logits.topk(20).indices.tolist()) / 20

    for (part, place), knocked in found.items():
        at = row.subject if place == "subject" else row.prompt
        slow = [rate() - rate(part, at, around(c, 2, 3)) for c in range(3)]
        assert list(knocked.lost) == pytest.approx(slow, abs=1e-6), (part, place)
    assert any(abs(x) > 0 for k in found.values() for x in k.lost)


# ---------------------------------------------------------------- all of it


def test_a_location_has_numbers_tables_and_pictures(llama):
    pytest.importorskip("matplotlib")
    known = told(llama)
    found = locate(llama, [known, FACT], attributes=vocabulary(llama, 40), n_samples=2)
    numbers = json.loads(json.dumps(found.to_dict()))
    assert [m["prompt"] for m in numbers["causal_trace"]] == [known.filled]
    assert len(numbers["attribute_rate"]["rates"]) == 3
    assert {k["part"] for k in numbers["knock_outs"]} == {"mlp", "attention"}
    made = found.report()
    assert [t.title for t in made.tables] == ["Causal traces", "Attribute rate", "Knock-outs"]
    assert len(made.pictures) == 3
    assert any("Left out: 'The capital of France is'" in n for n in made.notes)
    assert made.summary.startswith("1 of 2 facts")
    assert found.report(pictures=False).pictures == ()


def test_a_location_without_attributes_keeps_its_maps(llama):
    known = told(llama)
    found = locate(llama, [Fact(known.prompt, known.subject, known.target, "the")], attributes=["the"], n_samples=2)
    assert found.rate is None
    assert len(found.maps) == 1
    assert "begins with more than a stop word" in found.no_rate
    assert found.left_out == ()
    numbers = json.loads(json.dumps(found.to_dict()))
    assert (numbers["attribute_rate"], numbers["no_attribute_rate"]) == (None, found.no_rate)
    made = found.report(pictures=False)
    assert len(made.tables) == 1
    assert made.title.endswith("recalls 1 facts") and made.summary.startswith("1 of 1 facts were traced.")
    assert made.notes == (f"No attribute rate: {found.no_rate}",)


def test_a_heat_map_has_a_colour_for_every_number_but_zero():
    pytest.importorskip("matplotlib")
    drawn = plot_heat(["one", "one"], [[0.5, -1.0, 0.0], [0.25, 1.0, 0.1]], "block", "A title.", "A caption.")
    assert drawn.caption == "A caption. Full colour: 1; blue is positive, orange negative."
    cells = [part for part in drawn.svg.split("<path")[1:] if "#0072b2" in part or "#d55e00" in part]
    assert len(cells) == 5
    assert sum("#d55e00" in c for c in cells) == 1
    for names, rows in (
        ([], []),
        (["a"], [[1.0], [2.0]]),
        (["a", "b"], [[1.0], [1.0, 2.0]]),
        (["a"], [[float("nan")]]),
    ):
        with pytest.raises(ValueError, match="A heat map needs finite rows"):
            plot_heat(names, rows, "block", "", "")


@pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")
def test_the_command_writes_numbers_and_a_page(llama, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    llama.save_files(tmp_path / "tiny", "float32")
    (tmp_path / "words.txt").write_text("\n".join(vocabulary(llama, 20)), encoding="utf-8")
    app = typer.Typer()
    commands.add_to(app)
    known = told(llama)
    fact = ["--prompt", known.prompt, "--subject", known.subject, "--target", known.target]
    asked = ["locate", "tiny", *fact, "--attributes", "words.txt", "--samples", "1"]
    app([*asked, "--part", "attention", "--json", "--report", "page.html"], standalone_mode=False)
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["causal_trace"][0]["part"] == "attention"
    assert numbers["attribute_rate"]["n_tokens"] == {known.prompt: 20}
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<svg") == 3
    app(asked, standalone_mode=False)
    assert "Causal traces" in capsys.readouterr().out
    for wrong, said in (
        (["--samples", "0"], "--samples must be at least 1"),
        (["--window", "0"], "--window must be at least 1"),
        (["--attributes", "none.txt"], "--attributes none.txt cannot be read"),
        (["--part", "head"], "part must be one of"),
    ):
        with pytest.raises(UserError, match=said):
            app([*asked, *wrong], standalone_mode=False)
    with pytest.raises(UserError, match="Name a fact: --prompt, --subject and --target"):
        app(["locate", "tiny"], standalone_mode=False)
