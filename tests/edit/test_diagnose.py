"""Drift, delivered fractions, the loss around a value and the shortcut index against closed forms and whole passes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import typer

import families
from retouch import linalg
from retouch.change import Change, LowRank, apply, save
from retouch.cli import locate as commands
from retouch.edit import diagnose as d
from retouch.edit._causal import ask, blur, effects, spread_of
from retouch.edit._delivery import drift_metric, listeners
from retouch.edit._drift import LEAD, keys_of, reference, wrapped
from retouch.edit._landscape import _Leads
from retouch.edit._search import Search
from retouch.edit.contexts import Context, chat_header
from retouch.edit.facts import Fact
from retouch.edit.rome import Rome
from retouch.edit.rows import problems
from retouch.edit.value import optimise
from retouch.errors import FactError, ModelError, SettingsError, UserError
from retouch.model import wrap
from retouch.tokens import Text, encode

CAPITAL = Fact("The capital of {} is", "France", "Lyon")
LANGUAGE = Fact("The official language of {} is", "France", "Danish")
OTHER = Fact("The capital of {} is", "Japan", "Rome")
FACTS = [CAPITAL, LANGUAGE, OTHER]
TEXTS = ("User: ", "Answer: ", "Hello there. ", "Task one. ", "In a word: ", "Quiz. ")
ENDS = "is was in and where of the to by on with for from at as has had will can may also now then here there"
QUICK = Rome(contexts="plain", n_steps=4)


def row_of(model, fact, context="", target=""):
    return encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after, target, context)])[0]


@torch.no_grad()
def key(model, ids, at, block):
    """What flows into the weight: a plain hook on the whole network, one unpadded row."""
    seen = []
    handle = model.module(f"blocks.{block}.mlp.down").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.network(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1)[at]


def said(model, fact=CAPITAL):
    """A fact that the model already says."""
    for end in ENDS.split():
        row = row_of(model, asked := Fact(f"The capital of {{}} {end}", fact.subject, "x"))
        with torch.no_grad():
            token = int(model.network(input_ids=torch.tensor([row.ids])).logits[0, -1].argmax())
        word = model.tokenizer.decode([token])
        if word.strip() and ask(model, [known := Fact(asked.prompt, fact.subject, word)])[0]:
            return known
    raise AssertionError("this tiny model says nothing that can be written")


# ---------------------------------------------------------------- wrappings


def test_wrappings_are_many_and_end_before_a_word():
    assert len(set(d.WRAPPINGS)) == len(d.WRAPPINGS) >= 20
    assert all(t[-1].isspace() and "{}" not in t for t in d.WRAPPINGS)


def test_the_chat_header_is_what_the_template_puts_in_front(llama, open_tiny):
    assert chat_header(llama) == "user: "
    assert d.wrappings(llama)[-1] == "user: "
    assert chat_header(open_tiny("mistral")) == "", "a tokenizer without a template has no header"
    assert d.wrappings(open_tiny("mistral")) == list(d.WRAPPINGS)


def test_the_chat_header_does_not_repeat_the_tokenizers_own_beginning(tiny):
    network, words = tiny("mistral")
    words.chat_template = "{{ bos_token }}[ask]{{ messages[0]['content'] }}[end]"
    assert chat_header(wrap(network, words)) == "[ask]"


# ---------------------------------------------------------------- drift and cosines


@pytest.mark.parametrize("family", families.DECODERS)
def test_drift_is_that_of_single_passes(open_tiny, family):
    model = open_tiny(family)
    found = d.drift(model, [CAPITAL, OTHER], texts=TEXTS[:2])
    for w, text in enumerate(TEXTS[:2]):
        for block in (0, 2):
            sizes = {"subject": 0.0, "prompt": 0.0}
            for fact in (CAPITAL, OTHER):
                bare, moved = row_of(model, fact), row_of(model, fact, text)
                for place in sizes:
                    old = key(model, bare.ids, getattr(bare, place), block)
                    new = key(model, moved.ids, getattr(moved, place), block)
                    sizes[place] += float((new - old).norm() / old.norm()) / 2
            assert found.subject[w][block] == pytest.approx(sizes["subject"], rel=1e-3)
            assert found.prompt[w][block] == pytest.approx(sizes["prompt"], rel=1e-3)


def test_nothing_in_front_is_no_drift(llama):
    found = d.drift(llama, [CAPITAL], texts=[""])
    assert max(*found.subject[0], *found.prompt[0]) < 1e-6


def test_whitened_drift_under_the_identity_is_plain_drift(llama):
    metrics = {1: linalg.Identity(4.0)}
    found = d.drift(llama, [CAPITAL, OTHER], texts=TEXTS, metrics=metrics)
    assert found.whitened == {1: pytest.approx(found.by_block()[0][1], rel=1e-5)}


def test_a_subject_that_opens_the_text_gets_a_lead(llama):
    opens = Fact("{} is located in", "a", "Rome")
    assert row_of(llama, opens).subject == 0
    assert reference(llama, opens).ids == row_of(llama, opens, LEAD).ids
    assert reference(llama, CAPITAL).ids == row_of(llama, CAPITAL).ids


def test_cosines_are_symmetric_and_those_of_the_keys(llama):
    one = d.cosines(llama, [CAPITAL], ["Japan"])
    other = d.cosines(llama, [OTHER], ["France"])
    assert one.subject == pytest.approx(other.subject, abs=1e-6)
    assert one.prompt == pytest.approx(other.prompt, abs=1e-6)
    a, b = row_of(llama, CAPITAL), row_of(llama, OTHER)
    for block in range(3):
        wanted = torch.cosine_similarity(
            key(llama, a.ids, a.subject, block), key(llama, b.ids, b.subject, block), dim=0
        )
        assert one.subject[block] == pytest.approx(float(wanted), abs=1e-5)


def test_other_subjects_come_from_the_facts_then_from_the_samples(llama):
    assert d.cosines(llama, [CAPITAL, OTHER]).others == {CAPITAL.filled: ("Japan",), OTHER.filled: ("France",)}
    samples = d.cosines(llama, [LANGUAGE], most=3).others[LANGUAGE.filled]
    assert len(samples) == 3
    assert "France" not in samples
    assert d.cosines(llama, FACTS, ["Peru"]).others[OTHER.filled] == ("Peru",)


# ---------------------------------------------------------------- delivered fraction


def moved_keys(model, fact, block, texts=TEXTS):
    rows = [row_of(model, fact), *(row_of(model, fact, t) for t in texts)]
    keys = torch.stack([key(model, r.ids, r.subject, block) for r in rows]).double()
    return keys[0], keys[1:]


def test_the_identity_delivers_the_cosine_times_the_ratio_of_lengths(llama):
    found = d.deliver(llama, [CAPITAL], 1, texts=TEXTS)
    bare, moved = moved_keys(llama, CAPITAL, 1)
    alpha = torch.cosine_similarity(moved, bare[None], dim=1) * moved.norm(dim=1) / bare.norm()
    row = found.rows["identity"]
    assert row.alpha == pytest.approx(float(alpha[1::2].mean()), rel=1e-4)
    assert row.off == pytest.approx(float((alpha[1::2] - 1).abs().mean()), rel=1e-4)
    assert row.expected == pytest.approx(float((alpha[::2] - 1).square().mean().sqrt()), rel=1e-4)
    assert (row.amplification, row.bound, row.cross_talk) == (pytest.approx(1.0), 1.0, None)
    assert found.n_texts == (3, 3)


def test_every_metric_is_exact_at_its_own_keys_and_within_kantorovichs_bound(llama):
    moment = torch.cov(
        torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 65)[:, None]
    )
    found = d.deliver(llama, FACTS, 1, moment=moment, texts=TEXTS)
    assert set(found.rows) == {"identity", "covariance", "nullspace", "drift"}
    for row in found.rows.values():
        assert 1 <= row.amplification <= row.bound * (1 + 1e-9)
        assert math.isfinite(row.cross_talk)
    keys = torch.stack([moved_keys(llama, f, 1)[0] for f in FACTS], 1)
    listen = listeners(keys, linalg.Covariance.from_moment(moment))
    assert torch.allclose(listen @ keys, torch.eye(3).double(), atol=1e-4)


def test_drift_along_one_direction_is_what_the_drift_metric_shuts_out():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(20, 2, generator=generator).double()
    way = torch.randn(20, generator=generator).double()
    moved = keys.T[:, None] + torch.tensor([1.0, -2.0, 0.5])[None, :, None] * way
    plain, shut = (listeners(keys, m) @ way for m in (linalg.Identity(), drift_metric(keys, moved)))
    assert float(shut.norm()) < 0.02 * float(plain.norm())


def test_facts_that_share_their_key_are_one(llama):
    same = [Fact("The capital of {} is", "France", "Lyon"), Fact("The capital of {} was", "France", "Rome")]
    found = d.deliver(llama, same, 1, texts=TEXTS)
    assert found.n_keys == 1
    assert found.rows == d.deliver(llama, same[:1], 1, texts=TEXTS).rows
    assert d.deliver(llama, FACTS, 1, texts=TEXTS).n_keys == 3


def test_a_metric_that_fails_is_left_out_and_named(llama):
    bad = torch.eye(64).double()
    bad[0, 0] = -100
    found = d.deliver(llama, [CAPITAL], 1, moment=bad, texts=TEXTS)
    assert "covariance" not in found.rows
    assert any(n.startswith("Metric covariance: ") for n in found.notes)


def test_the_prediction_is_the_least_expected_error_and_the_winner_the_least_found(llama):
    found = d.deliver(llama, FACTS, 1, texts=TEXTS)
    assert found.rows[found.predicted].expected == min(r.expected for r in found.rows.values())
    assert found.rows[found.observed].off == min(r.off for r in found.rows.values())
    told = json.loads(json.dumps(found.to_dict()))
    assert (told["predicted"], told["observed"]) == (found.predicted, found.observed)


def test_a_rank_one_change_delivers_what_its_key_hears(llama):
    bare, moved = moved_keys(llama, CAPITAL, 1)
    left = torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    part = LowRank(left, (bare / bare.square().sum())[None].float())
    change = Change("rome", llama.base_fingerprint, {"blocks.1.mlp.down": part})
    found = d.delivered_by(llama, change, [CAPITAL], texts=TEXTS)["blocks.1.mlp.down"]
    alpha = moved @ bare / bare.square().sum()
    assert found.place == "subject"
    assert found.alpha == pytest.approx(float(alpha.mean()), rel=1e-4)
    assert found.off == pytest.approx(float((alpha - 1).abs().mean()), rel=1e-4)
    row = row_of(llama, CAPITAL)
    last = key(llama, row.ids, row.prompt, 1)
    change = Change("rets", llama.base_fingerprint, {"blocks.1.mlp.down": LowRank(left, last[None])})
    assert d.delivered_by(llama, change, [CAPITAL], texts=TEXTS)["blocks.1.mlp.down"].place == "prompt"


# ---------------------------------------------------------------- landscape


def test_power_iteration_finds_the_eigenvalue_of_largest_size():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    for top in (9.0, -9.0):
        hessian = basis @ torch.diag(torch.tensor([top, *torch.linspace(0, 3, 11)])) @ basis.T
        found = d.top_curvature(lambda x, h=hessian: x @ h + 5.0, torch.randn(3, 12, generator=generator), step=0.5)
        assert found.tolist() == pytest.approx([top] * 3, rel=1e-3)


def test_sharpness_is_the_top_eigenvalue_of_the_whole_hessian(llama):
    settings = Rome(contexts="plain", kl_factor=0.0, n_steps=3)
    found = d.landscape(llama, [CAPITAL, LANGUAGE], 1, settings=settings, texts=TEXTS[:1])
    asked = problems(llama, [CAPITAL, LANGUAGE], [Context("", 1.0)], "subject")
    (value,) = optimise(llama, asked, 1, "residual", settings, groups=[[0, 1]])
    search = Search(llama, asked, 1, "residual", settings, groups=[[0, 1]])

    def slope(at):
        moved = at.clone().requires_grad_(True)
        return torch.autograd.grad(search.per_group(search.terms(moved[None]).nll).sum(), moved)[0]

    step = 1e-2 * float(search.initial.norm())
    hessian = torch.stack(
        [(slope(value.delta + step * e) - slope(value.delta - step * e)) / (2 * step) for e in torch.eye(32)]
    )
    values = torch.linalg.eigvalsh((hessian + hessian.T).double() / 2)
    top = values[values.abs().argmax()]
    (subject,) = found.subjects
    assert subject.sharpness == pytest.approx(float(top), rel=0.1)
    assert subject.norm_ratio == pytest.approx(float(value.delta.norm() / search.initial.norm()), rel=1e-4)
    slopes = []
    for fact in (CAPITAL, LANGUAGE):
        alone = Search(llama, problems(llama, [fact], [Context("", 1.0)], "subject"), 1, "residual", settings)
        zero = torch.zeros(1, 32, requires_grad=True)
        slopes.append(torch.autograd.grad(alone.terms(zero).nll.sum(), zero)[0][0])
    wanted = torch.cosine_similarity(slopes[0], slopes[1], dim=0)
    assert subject.cosines_before == pytest.approx((float(wanted),), abs=1e-4)
    assert len(subject.cosines) == 1


def test_bisection_on_a_linear_lead_finds_the_closed_form():
    slopes = torch.tensor([0.5, 1.0, 2.0, 0.1, -1.0])
    found = d.crossing(lambda rho: 1 - rho * slopes, 4.0, 5)
    assert found[:3].tolist() == pytest.approx([2.0, 1.0, 0.5], abs=4 / 2**12 + 1e-6)
    assert found[3:].tolist() == [4.0, 4.0], "where the lead holds, the distance is the largest one"


def test_auc_by_hand():
    assert d.auc([3, 2, 1, 0], [True, True, False, False]) == 1.0
    assert d.auc([0, 1, 2, 3], [True, True, False, False]) == 0.0
    assert d.auc([1, 1, 1], [True, False, False]) == 0.5
    assert d.auc([4, 1, 3, 2], [True, True, False, False]) == 0.5
    assert d.auc([4, 2, 3, 1, 0], [True, True, False, False, False]) == pytest.approx(5 / 6)
    assert d.auc([1, 2], [True, True]) is None


@pytest.mark.parametrize("family", families.DECODERS)
def test_leads_are_those_of_whole_passes_with_the_state_moved(open_tiny, family):
    model = open_tiny(family)
    rows = [row_of(model, f, c, f.target) for f, c in ((CAPITAL, ""), (LANGUAGE, "Hello there. "))]
    leads = _Leads(model, rows, 1)
    push = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = leads(leads.state + push)
    network = copy.deepcopy(model.network).double()
    for i, row in enumerate(rows):

        def add(_, __, out, row=row, i=i):
            state = out[0] if isinstance(out, tuple) else out
            moved = state.clone()
            moved[0, row.subject] += push[i].double()
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        handle = network.get_submodule(model.anatomy.path("blocks.1")).register_forward_hook(add)
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([row.ids[: row.prompt + 1]]), use_cache=False).logits[0, -1]
        handle.remove()
        own = logits[row.target[0]].item()
        logits[row.target[0]] = -torch.inf
        assert float(found[i]) == pytest.approx(own - float(logits.max()), abs=1e-3)


def test_tolerance_of_an_answer_that_the_model_gives(llama):
    known = said(llama)
    found = d.landscape(llama, [known], 1, delta=torch.zeros(1, 32), texts=["", *TEXTS])
    (fact,) = found.facts
    assert fact.lead > 0
    assert 0 < fact.least <= fact.median
    assert fact.first_order > 0
    assert len(fact.ratios) == len(fact.hits) == 7
    assert fact.hits[0] and fact.ratios[0] > 1e3, "nothing in front: no drift, and the answer stays"
    assert found.auc == d.auc(fact.ratios, fact.hits) == found.aucs["least"] == found.aucs["first_order"]
    right = [(r > 1) == h for r, h in zip(fact.ratios, fact.hits)]
    assert found.accuracy == pytest.approx(sum(right) / 7)
    row = row_of(llama, known, target=known.target)
    leads = _Leads(llama, [row], 1)
    unit = torch.nn.functional.normalize(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    reach = 4 * float(leads.state.norm())
    with torch.no_grad():  # no direction loses the lead before the least distance
        assert all(float(leads(leads.state + 0.5 * fact.least * u)[0]) > 0 for u in unit)
        ended = [float(leads(leads.state + reach * u)[0]) <= 0 for u in unit]
    assert fact.n_capped == 16 - sum(ended)


def test_an_answer_without_a_lead_bears_no_drift(llama):
    found = d.landscape(llama, [CAPITAL], 1, delta=torch.zeros(1, 32), texts=TEXTS[:2])
    (fact,) = found.facts
    assert fact.lead < 0
    assert (fact.first_order, fact.least, fact.median, fact.n_capped) == (0.0, 0.0, 0.0, 0)
    assert fact.ratios == (0.0, 0.0)


# ---------------------------------------------------------------- shortcut index


def test_the_shortcut_index_compares_the_two_traces(llama):
    known = said(llama)
    found = d.shortcut(llama, [known, CAPITAL], n_samples=3, window=2)
    (one,) = found.facts
    assert len(found.left_out) == 1
    (asked,), _ = ask(llama, [known])
    spread = 3 * spread_of(llama, [asked])
    sizes = []
    for corrupt, place in ((asked.subject, asked.subject[-1]), (asked.others, len(asked.ids) - 1)):
        noise = blur(llama, len(corrupt), 3, spread, 0)
        effect = effects(llama, asked, [place], corrupt, noise, "mlp", 2).effect
        sizes.append(max(0.0, float(effect.max())))
    assert (one.subject, one.relation) == tuple(sizes)
    assert one.index == pytest.approx(sizes[0] / sum(sizes)) if sum(sizes) else one.index is None
    assert found.index == one.index
    assert set(asked.others).isdisjoint(asked.subject)


def test_without_noise_there_is_no_index(llama):
    found = d.shortcut(llama, [said(llama)], n_samples=2, noise=0.0)
    (one,) = found.facts
    assert one.subject < 1e-6
    assert one.relation < 1e-6
    assert d.shortcut(llama, [CAPITAL]).index is None


# ---------------------------------------------------------------- all of it


def test_a_diagnosis_of_a_change_has_numbers_tables_and_pictures(llama):
    pytest.importorskip("matplotlib")
    known = said(llama)
    facts = [known, LANGUAGE]
    change = Rome(block=1, n_steps=6, contexts="plain", weight_decay=0.0).plan(llama, [LANGUAGE])
    found = d.diagnose(llama, facts, change, n_tokens=600, n_samples=2, settings=QUICK)
    assert (found.method, found.block) == ("rome", 1)
    told = json.loads(json.dumps(found.to_dict()))
    parts = {"drift", "cosines", "delivery", "delivered", "landscape", "shortcut", "shortcut_after"}
    assert parts <= set(told)
    assert set(told["delivery"]["rows"]) <= {"identity", "covariance", "nullspace", "drift"}
    assert {"identity", "covariance", "drift"} <= set(told["delivery"]["rows"])
    assert set(told["drift"]["whitened"]) == {"1"}
    assert found.landscape.subjects[0].norm_ratio == 0.0, "an edited model is looked at where it stands"
    made = found.report()
    titles = [t.title for t in made.tables]
    assert titles[:3] == ["Keys", "Delivered fraction", "What the change delivers behind an instruction"]
    assert {"Loss around the values", "Tolerance", "Shortcut index"} <= set(titles)
    assert len(made.pictures) >= 4
    assert "metric delivers best" in made.summary


def test_the_landscape_of_a_change_is_that_of_the_edited_model(llama):
    change = Rome(block=1, n_steps=6, contexts="plain").plan(llama, [LANGUAGE])
    found = d.diagnose(llama, [LANGUAGE], change, what=["landscape"])
    alone = d.landscape(apply(llama, change), [LANGUAGE], 1, delta=torch.zeros(1, 32))
    assert found.landscape == alone
    assert found.drift is None and found.delivery is None


def test_without_statistics_two_metrics_remain(llama):
    found = d.diagnose(llama, [CAPITAL], what=["delivery", "drift"], statistics=False, block=2)
    assert set(found.delivery.rows) == {"identity", "drift"}
    assert found.drift.whitened == {}
    assert found.block == 2
    assert "shortcut" not in found.to_dict()


def test_wrong_input_is_named(llama, tiny):
    with pytest.raises(UserError, match=r"no diagnostic 'drifts'\. Known: drift, delivery, landscape, shortcut"):
        d.diagnose(llama, [CAPITAL], what=["drifts"])
    with pytest.raises(FactError, match="no facts"):
        d.diagnose(llama, [], what=["drift"])
    with pytest.raises(FactError, match="no facts"):
        d.landscape(llama, [])
    with pytest.raises(FactError, match="has no subject"):
        d.drift(llama, [Fact("The capital is", "", "Paris")])
    with pytest.raises(FactError, match="at least 4 texts"):
        d.deliver(llama, [CAPITAL], texts=TEXTS[:3])
    with pytest.raises(FactError, match=r"a row of 32 for each of 2 subjects; got \(1, 32\)"):
        d.landscape(llama, FACTS, 1, delta=torch.zeros(1, 32))
    with pytest.raises(SettingsError, match="blocks 0 to 2"):
        d.deliver(llama, [CAPITAL], 7)
    with pytest.raises(ModelError, match="encoder"):
        d.diagnose(wrap(*tiny("bert")), [CAPITAL])


def test_keys_of_reads_both_places_in_every_block(llama):
    rows = wrapped(llama, CAPITAL, TEXTS[:2], "tokenizer")
    found = keys_of(llama, rows)
    assert found.subject.shape == found.prompt.shape == (2, 3, 64)
    assert torch.allclose(found.prompt[1, 2], key(llama, rows[1].ids, rows[1].prompt, 2), atol=1e-5)


@pytest.mark.filterwarnings("ignore:'click.*is deprecated:DeprecationWarning")
def test_the_command_writes_numbers_and_a_page(llama, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    llama.save_files(tmp_path / "tiny", "float32")
    save(Rome(block=1, n_steps=4, contexts="plain").plan(llama, [CAPITAL]), tmp_path / "lyon")
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f.to_dict()) + "\n" for f in FACTS), encoding="utf-8")
    app = typer.Typer()
    commands.add_to(app)
    asked = ["diagnose", "tiny", "--facts", "facts.jsonl", "--n", "1", "--what", "delivery,shortcut", "--no-statistics"]
    app([*asked, "--change", "lyon", "--samples", "1", "--json", "--report", "page.html"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert set(told["delivery"]["rows"]) == {"identity", "drift"}
    assert told["delivered"]["blocks.1.mlp.down"]["place"] == "subject"
    assert "<svg" in (tmp_path / "page.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"--report missing/page\.html must be a file"):
        app([*asked, "--report", "missing/page.html"], standalone_mode=False)
    with pytest.raises(UserError, match="Give either --facts"):
        app([*asked, "--prompt", "x"], standalone_mode=False)
