"""An edit is planned, proved and certified before anybody gets it; the model it came from stays as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from retouch import apply, edit_facts, plan, registry
from retouch.bound import certify
from retouch.change import Dense
from retouch.edit.api import check_effect
from retouch.edit.constraints import for_facts
from retouch.edit.facts import Fact, Prompt
from retouch.edit.ft_m import FtM
from retouch.edit.harm import CHUNK, bystanders, measure_harm
from retouch.errors import BoundRefused, FactError, ModelError, NoEffect, SettingsError, UnknownName, UserError
from retouch.measure import answers, chunk_nll
from retouch.model import wrap
from retouch.stats import bundled_text
from retouch.tokens import Text

FACT = Fact(
    "The capital of {}",
    "France",
    "is Lyon",
    paraphrases=["France has its capital, which"],
    neighbors=[
        Prompt("Big Ben is located in", "London"),
        Prompt("The Colosseum is located in"),
        Prompt("France has its capital, which"),
    ],
    related=[Prompt("The currency of France is"), Prompt("The currency of France is")],
)
OTHER = Fact("The official language of {}", "Brazil", "is French")
QUICK = {"n_steps": 6, "learning_rate": 0.01}
ROME = {"block": 1, "n_steps": 6, "contexts": "plain", "weight_decay": 0.0}


@dataclass(frozen=True)
class Backwards(FtM):
    """Makes facts rarer."""

    def planned(self, model, facts, previous, unedited):
        change = super().planned(model, facts, previous, unedited)
        return replace(change, parts={n: Dense(-p.difference) for n, p in change.parts.items()})


@pytest.fixture(scope="module")
def llama(tiny):
    return wrap(*tiny("llama"), source="tiny llama")


@pytest.fixture(scope="module")
def edited(llama):
    return edit_facts(llama, [FACT, OTHER], FtM(**QUICK), max_harm=0.999)


@pytest.mark.parametrize(("method", "settings"), [("ft-m", QUICK), ("rome", ROME)])
def test_an_edit_makes_the_fact_likelier_in_a_new_model(llama, method, settings):
    before = {n: p.clone() for n, p in llama.network.named_parameters()}
    done = edit_facts(llama, [FACT], method, **settings)
    assert all(torch.equal(before[n], p) for n, p in llama.network.named_parameters())
    text = Text("The capital of ", "France", "", "is Lyon")
    (old,), (new,) = answers(llama, [text]), answers(done.model, [text])
    assert done.effect == [{"nll_before": old.nll, "nll_after": new.nll}]
    assert new.nll < old.nll
    assert done.harm is None
    assert "harm" not in done.change.report
    again = apply(llama, done.change)
    assert answers(again, [text])[0].nll == new.nll


def test_the_report_of_a_change_holds_what_was_measured(llama, edited):
    report = edited.change.report
    assert report["effect"] == edited.effect
    assert report["harm"] == edited.harm.to_dict()
    assert report["seconds"] >= 0
    assert report["peak_mib"] > 1
    (name,) = edited.change.parts
    share = edited.change.parts[name].difference.norm() / llama.matrix(name).norm()
    assert report["norms"][name]["share_of_weight"] == pytest.approx(float(share), rel=1e-5)
    assert [f["target"] for f in edited.change.facts] == ["is Lyon", "is French"]


def test_a_method_and_its_name_with_settings_plan_the_same(llama):
    assert plan(llama, [FACT], "ft-m", **QUICK).id == plan(llama, [FACT], FtM(**QUICK)).id


def test_a_fact_that_did_not_become_likelier_is_no_edit(llama):
    with pytest.raises(NoEffect, match=r"'is Lyon' is not likelier after 'The capital of France': -log P \d") as caught:
        edit_facts(llama, [FACT], Backwards(**QUICK))
    assert caught.value.exit_code == 1
    with pytest.raises(NoEffect, match="is not likelier"):
        check_effect(llama, llama, [FACT])  # equal is not likelier


def test_of_two_facts_about_the_same_the_last_is_planned_and_proved(llama, caplog):
    other = Fact(FACT.prompt, FACT.subject, "is Nice", FACT.truth)
    done = edit_facts(llama, [other, FACT, FACT], FtM(**QUICK))
    assert done.facts == (FACT,) and len(done.effect) == 1
    assert done.effect == edit_facts(llama, [FACT], FtM(**QUICK)).effect
    assert "2 of 3 facts are left out" in caplog.text


def test_no_contexts_at_all_are_a_wrong_setting(llama):
    with pytest.raises(SettingsError, match="contexts is an empty list"):
        plan(llama, [FACT], "rome", contexts=())


def test_the_fact_that_failed_is_the_one_that_is_named(llama, edited):
    with pytest.raises(NoEffect, match="'zzz' is not likelier after 'Big Ben'"):
        check_effect(llama, edited.model, [FACT, Fact("Big {}", "Ben", "zzz")])


@pytest.mark.parametrize(
    ("facts", "method", "settings", "error", "says"),
    [
        ([FACT], "memitt", {}, UnknownName, "Did you mean 'memit'"),
        ([FACT], "rome", {"n_stepz": 3}, SettingsError, "n_stepz"),
        ([FACT], "rome", {"block": 7}, SettingsError, "blocks 0 to 1; got 7"),
        ([], "rome", {}, FactError, "no facts to edit"),
        ([Fact("No subject here", "", "at all")], "rome", {}, FactError, "has no subject"),
    ],
)
def test_wrong_input_is_named(llama, facts, method, settings, error, says):
    with pytest.raises(error, match=says):
        edit_facts(llama, facts, method, **settings)


def test_an_encoder_says_no_next_token(tiny):
    with pytest.raises(ModelError, match="predict the next token; tiny bert is a bert encoder"):
        edit_facts(wrap(*tiny("bert"), source="tiny bert"), [FACT], "rome")


# Harm


def test_a_tiny_limit_refuses_the_change_with_numbers(llama):
    with pytest.raises(
        BoundRefused, match=r"With 95% confidence the mean of changed answers .* above the limit of 0.001"
    ) as caught:
        edit_facts(llama, [FACT], FtM(**QUICK), max_harm=0.001)
    assert caught.value.exit_code == 3
    assert "The change is refused" in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "confidence"), [(0.0, 0.95), (-1.0, 0.95), (float("nan"), 0.95), (0.1, 1.0), (0.1, 0.0)]
)
def test_a_limit_that_is_none_is_refused_before_any_work(llama, monkeypatch, limit, confidence):
    def work(*_):
        raise AssertionError("it began to plan")

    monkeypatch.setattr(FtM, "plan", work)
    with pytest.raises(UserError, match="must"):
        edit_facts(llama, [FACT], FtM(**QUICK), max_harm=limit, confidence=confidence)


@pytest.mark.parametrize("facts", [[FACT], [OTHER, FACT], [FACT, Fact("The currency of {}", "France", "is gold")]])
@pytest.mark.parametrize("method", ["rome", "memit", "rose", "top"])
def test_a_limit_that_no_step_of_the_search_keeps_refuses_the_change(llama, method, facts):
    settings = {"n_steps": 4, "contexts": "plain", "n_bystanders": 4}
    more = {"memit": {"metric": "identity"}, "rose": {"n_refine": 3}, "top": {"n_steps_subject": 4}}
    chosen = registry.make("edit", method, **settings, **more.get(method, {}))
    with pytest.raises(BoundRefused) as caught:
        edit_facts(llama, facts, chosen, max_harm=1e-9)
    assert caught.value.exit_code == 3
    said = str(caught.value)
    assert f"No step of the search for {facts[0].target!r} after {facts[0].filled!r} kept the drift" in said
    assert "within 1e-09 nats, the limit of max_harm." in said
    assert "Allow a higher max_harm" in said


def test_the_limit_of_the_search_alone_is_named_by_its_setting(llama):
    with pytest.raises(BoundRefused, match=r"within 1e-09 nats, the limit of max_drift\. .* Allow a higher max_drift"):
        edit_facts(llama, [FACT], "rome", **ROME, max_drift=1e-9, n_bystanders=4)
    done = edit_facts(llama, [FACT], "rome", **ROME, max_drift=1e6, n_bystanders=4)
    assert "stopped" not in done.change.notes["facts"][0]


def test_groups_leave_out_what_is_edited_and_what_names_its_subject(llama):
    found = bystanders(llama, [FACT, OTHER])
    assert found.prompts["neighbours"] == ["Big Ben is located in", "The Colosseum is located in"]  # not the paraphrase
    assert found.prompts["same subject"] == ["The currency of France is"]  # once
    held_out = [c.prompt for c in for_facts([FACT, OTHER], n=320, half="certify")]
    assert found.prompts["protected"] == held_out
    planned = {c.prompt for c in for_facts([FACT, OTHER], n=2000, half="plan")}
    assert len(held_out) == 320 and not planned & set(held_out)  # no method has seen them
    for group, prompts in found.prompts.items():
        assert found.logp[group].shape == (len(prompts), llama.anatomy.vocab_size)


def test_facts_without_prompts_have_the_protected_ones_only(llama):
    assert set(bystanders(llama, [OTHER]).prompts) == {"protected"}


def test_certificates_count_the_right_examples(llama, edited):
    before = bystanders(llama, [FACT, OTHER])
    changed, neutral = edited.harm.certificates
    assert changed.n == len(before.prompts["neighbours"]) + len(before.prompts["protected"])  # the subject is apart
    assert neutral.n == len(chunk_nll(llama, bundled_text("neutral"), 2048, CHUNK)) == len(before.neutral)
    assert (changed.method, neutral.method) == ("hoeffding_bentkus", "betting")
    assert changed.limit == neutral.limit == 0.999
    moved = torch.cat([edited.harm.changed[g] for g in ("neighbours", "protected")]).double()
    assert changed.mean == pytest.approx(float(moved.mean()))
    assert changed.upper == certify(moved.numpy(), 0.999, method="hoeffding_bentkus").upper > changed.mean


def test_harm_is_what_the_two_models_say_on_each_prompt(llama, edited):
    before = bystanders(llama, [FACT])
    harm = measure_harm(edited.model, before, 0.999)
    for group, prompts in before.prompts.items():
        for i, prompt in enumerate(prompts[:5]):
            ids = torch.tensor([llama.tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                p = llama.network(input_ids=ids).logits[0, -1].double().log_softmax(-1)
                q = edited.model.network(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            assert bool(harm.changed[group][i]) == (int(p.argmax()) != int(q.argmax()))
            assert float(harm.drift[group][i]) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
    after = chunk_nll(edited.model, bundled_text("neutral"), 2048, CHUNK)
    ratio = float((after.mean() - before.neutral.mean()).exp())
    assert harm.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert harm.certificates[1].mean == pytest.approx(float((after - before.neutral).clamp(0, 1).mean()), rel=1e-5)


def test_an_unchanged_model_does_no_harm_and_still_needs_examples_to_prove_it(llama):
    harm = measure_harm(llama, bystanders(llama, [FACT]), 0.05)
    assert not any(c.any() for c in harm.changed.values())
    assert harm.perplexity_ratio == 1
    assert harm.holds
    harm.require()
    assert all(0 < c.upper < 0.05 for c in harm.certificates)
    few = measure_harm(llama, bystanders(llama, [FACT]), 0.001)
    assert not few.holds
    with pytest.raises(BoundRefused, match="even with no harm at all"):
        few.require()
