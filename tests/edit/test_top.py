"""TOP asks the subject for a state at the relation, never for the answer."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from retouch import change as changes
from retouch.anatomy import describe
from retouch.edit.constraints import constraints
from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.rome import Rome
from retouch.edit.rows import problems
from retouch.edit.top import Top
from retouch.edit.value import Aim, Search, optimise
from retouch.errors import FactError, SettingsError
from retouch.measure import answers
from retouch.tokens import Text

N_BLOCKS = 4


FACT = Fact("The capital of {} is", "France", "London")
WORD = replace(FACT, target="the")  # one token: all of it can be said from the state at the relation
# in a random model the subject hardly reaches a later token through attention
NEAR = Fact("The capital of {}", "France", "London")
OTHER = Fact("The official language of {} is", "Brazil", "French")
OWN = ("", "I am the one. ", "Because. ")
CONTEXTS = [Context(t, 1 / 3) for t in OWN]
QUICK = {
    "nll_weight": 0.0,
    "blocks": (1,),
    "offset": 1,
    "contexts": OWN,
    "n_steps": 25,
    "n_steps_subject": 12,
    "weight_decay": 0.0,
    "clamp": 8.0,
}
NAME, RELATION = "blocks.1.mlp.down", "blocks.2"


@torch.no_grad()
def passed(model, ids, path, add=None, at=None):
    """Input, output of a part and the logits, of one unpadded row; `add` goes to its output at one token."""
    seen = {}

    def hook(_, args, out):
        state = out[0] if isinstance(out, tuple) else out
        seen["in"], seen["out"] = args[0] if args else None, state
        if add is None:
            return None
        moved = state.clone().reshape(len(ids), -1)
        moved[at] += add
        moved = moved.reshape(state.shape)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = model.network.get_submodule(model.anatomy.path(path)).register_forward_hook(hook)
    logits = model.network(input_ids=torch.tensor([ids])).logits[0]
    handle.remove()
    flat = {k: v.reshape(len(ids), -1) for k, v in seen.items() if v is not None}
    return flat.get("in"), flat["out"], logits


def stage_1(model, method, fact=FACT, contexts=CONTEXTS):
    """What the state at the relation is to gain, by the search that the sheet of the method asks for."""
    relation = problems(model, [fact], contexts, "prompt")
    first = replace(method, learning_rate=0.2, stop_loss=0.3, kl_position="last")
    return relation[0], optimise(model, relation, 2, "residual", first)[0]


# Stage 1.


def test_stage_1_makes_the_target_the_likeliest_under_the_hook(llama):
    method = Top(**QUICK)
    before = {n: p.clone() for n, p in llama.network.named_parameters()}
    change = method.plan(llama, [WORD])
    assert all(torch.equal(p, before[n]) for n, p in llama.network.named_parameters())
    problem, value = stage_1(llama, method, WORD)
    for row in problem.rows:
        *_, plain = passed(llama, row.ids, RELATION)
        *_, logits = passed(llama, row.ids, RELATION, value.delta, row.prompt)
        assert int(logits[row.prompt].argmax()) == row.target[0] != int(plain[row.prompt].argmax())
    told = change.notes["facts"][0]["stage_1"]
    assert told["reached"] is value.reached is True
    assert told["losses"] == pytest.approx(value.losses, abs=1e-3)
    assert change.notes["facts"][0]["relation_block"] == 2


@pytest.mark.parametrize("faithful", [False, True])
def test_stage_1_is_guarded_by_a_term_that_is_not_always_zero(llama, faithful):
    method = Top(**QUICK, faithful=faithful)
    relation = [method._relation(p) for p in problems(llama, [FACT], CONTEXTS, "prompt")]
    assert (relation[0].kl_at == len(relation[0].kl.ids) - 1) == (len(relation[0].rows[0].target) == 1 or not faithful)
    search = Search(llama, relation, 2, "residual", replace(method, kl_position="last"))
    terms = search.terms(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    assert float(terms.kl[0]) > 1e-3


# Stage 2 and the write.


def test_the_distance_falls_and_is_that_of_the_wanted_state(llama):
    change = Top(**QUICK).plan(llama, [FACT])
    (note,) = change.notes["facts"]
    assert note["distance"][1] < note["distance"][0]
    problem, value = stage_1(llama, Top(**QUICK))
    lengths = [float(passed(llama, row.ids, RELATION)[1][row.prompt].norm()) for row in problem.rows]
    start = sum(float(value.delta.norm()) / length for length in lengths) / len(lengths)
    assert note["distance"][0] == pytest.approx(start, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "llama_square", "gpt2", "gpt2_square", "gpt_neox", "gemma2"])
def test_the_mean_key_gets_the_value(open_tiny, family):
    model, method = open_tiny(family), Top(**{**QUICK, "n_steps": 6, "n_steps_subject": 5})
    change = method.plan(model, [FACT])
    new = changes.apply(model, change)
    _, wanted = stage_1(model, method)
    found = problems(model, [FACT], CONTEXTS, "subject")
    second = replace(method, n_steps=5, weight_decay=0.0)
    (value,) = optimise(model, found, 1, "down", second, aim=Aim(2, wanted.delta[None]))
    keys = [passed(model, r.ids, NAME)[0][a] for r, a in zip(found[0].rows, found[0].anchors)]
    mean = torch.stack(keys).mean(0)
    with torch.no_grad():
        out, before = new.module(NAME)(mean[None])[0], model.module(NAME)(mean[None])[0]
    assert (out - value.target).norm() < 1e-3 * value.target.norm()
    assert (before - value.target).norm() > 1e-2 * value.target.norm()
    # and what the change says that its key receives, it receives to the last digits
    key, gain = change.keys[NAME][:, 0].double(), change.targets[NAME][:, 0].double()
    assert (change.parts[NAME].delta() @ key - gain).norm() < 1e-5 * gain.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_edited_model_is_nearer_to_the_wanted_state_than_after_rome(open_tiny, family):
    model = open_tiny(family)
    method = Top(**{**QUICK, "n_steps_subject": 40})
    problem, value = stage_1(model, method, NEAR)
    row = problem.rows[0]
    wanted = passed(model, row.ids, RELATION)[1][row.prompt] + value.delta
    rome = Rome(block=1, contexts=OWN, n_steps=25, weight_decay=0.0, clamp=8.0)
    away = {}
    for name, plan in (("top", method), ("rome", rome)):
        new = changes.apply(model, plan.plan(model, [NEAR]))
        away[name] = float((passed(new, row.ids, RELATION)[1][row.prompt] - wanted).norm())
    assert away["top"] < away["rome"]
    assert away["top"] < 0.5 * float(value.delta.norm())  # where the unedited model stands


def test_the_report_tells_what_the_model_says_under_the_value(llama):
    method = Top(**QUICK)
    change = method.plan(llama, [FACT])
    (note,) = change.notes["facts"]
    json.dumps(change.notes, allow_nan=False)
    found = problems(llama, [FACT], CONTEXTS, "subject")
    _, wanted = stage_1(llama, method)
    second = replace(method, n_steps=12, weight_decay=0.0)
    (value,) = optimise(llama, found, 1, "down", second, aim=Aim(2, wanted.delta[None]))
    leads = []
    for row, anchor in zip(found[0].rows, found[0].anchors):
        logits = passed(llama, row.ids, NAME, value.delta, anchor)[2][row.prompt : -1]
        for here, token in zip(logits, row.target, strict=True):
            leads.append(float(here[token] - torch.cat([here[:token], here[token + 1 :]]).max()))
    assert note["margin"] == pytest.approx(min(leads), abs=2e-2)
    assert note["reached"] == (min(leads) > 0)


# Follow the authors.


def test_faithful_measures_the_first_row_alone_and_absolutely(llama):
    method = Top(**QUICK, faithful=True, vec_factor=0.25)
    (note,) = method.plan(llama, [FACT]).notes["facts"]
    # 25 steps of 0.5 down to a loss of 0.02; the guarding row's token is shifted by the target's length less one
    relation = [method._relation(p) for p in problems(llama, [FACT], CONTEXTS, "prompt")]
    first = replace(method, learning_rate=0.5, stop_loss=0.02, kl_position="last")
    (value,) = optimise(llama, relation, 2, "residual", first)
    assert note["distance"][0] == pytest.approx(0.25 * float(value.delta.norm()), rel=1e-3)
    assert note["stage_1"]["losses"] == pytest.approx(value.losses, abs=1e-3)


def test_faithful_gives_the_bare_prompts_key_the_value(llama):
    change = Top(**QUICK, faithful=True).plan(llama, [FACT])
    (problem,) = problems(llama, [FACT], CONTEXTS[:1], "subject")
    key = passed(llama, problem.rows[0].ids, NAME)[0][problem.anchors[0]]
    assert torch.allclose(change.keys[NAME][:, 0], key, atol=1e-4)


def test_faithful_takes_the_published_steps_but_not_over_ones_own(llama):
    method = Top(faithful=True, n_steps=17).as_published(llama)
    assert (method.relation_rate, method.relation_stop, method.n_steps_subject, method.subject_decay) == (
        0.5, 0.02, 17, 0.5,
    )  # fmt: skip
    assert Top(faithful=True, relation_rate=0.1).as_published(llama).relation_rate == 0.1
    assert Top().as_published(llama) == Top()


def test_faithful_drops_contexts_with_the_word_import(llama):
    texts = ("", "We import tea.", "This is important.")
    found = [c.text for c in Top(faithful=True, contexts=texts)._contexts(llama)]
    assert found == ["", "This is important. "]
    assert len(Top(contexts=texts)._contexts(llama)) == 3


# Several blocks, several facts.


def test_each_block_is_a_complete_edit_before_the_next(llama):
    settings = {**QUICK, "offset": 1, "n_steps": 6, "n_steps_subject": 5}
    both = Top(**{**settings, "blocks": (0, 2)}).plan(llama, [FACT])
    first = Top(**{**settings, "blocks": (0,)}).plan(llama, [FACT])
    second = Top(**{**settings, "blocks": (2,)}).plan(changes.apply(llama, first), [FACT])
    for name, alone in (("blocks.0.mlp.down", first), ("blocks.2.mlp.down", second)):
        delta = alone.parts[name].delta()
        assert both.parts[name].rank == 1
        assert (both.parts[name].delta() - delta).norm() < 1e-4 * delta.norm()
    (note,) = both.notes["facts"]  # one fact, one note, whatever the number of blocks
    assert [n["relation_block"] for n in note["blocks"]] == [1, 3]
    assert note["margin"] == note["blocks"][-1]["margin"]


def test_facts_together_and_groups_of_them(llama):
    method = Top(**{**QUICK, "n_steps": 5, "n_steps_subject": 4})
    together = method.plan(llama, [FACT, OTHER])
    assert together.parts[NAME].rank == 2 and len(together.notes["facts"]) == 2
    (grouped, alone) = method.plan_each(llama, [[FACT, OTHER], [OTHER]])
    assert grouped.id == together.id
    first, second = method.plan_each(llama, [[FACT], [OTHER]])
    for change, fact in ((first, FACT), (second, OTHER), (alone, OTHER)):
        wanted = method.plan(llama, [fact]).parts[NAME].delta()
        assert (change.parts[NAME].delta() - wanted).norm() < 5e-3 * wanted.norm()


def test_a_limit_on_drift_is_kept_and_told_as_it_is(llama):
    bare = {**QUICK, "contexts": "plain", "n_bystanders": 6}
    prompts = [c.prompt for c in constraints(FACT, n=6)]
    rows = [llama.tokenizer(p)["input_ids"] for p in prompts]

    def planned(limit):
        change = Top(**bare, max_drift=limit).plan(llama, [FACT])
        new = changes.apply(llama, change)
        kls = []
        for ids in rows:
            before, after = (passed(m, ids, NAME)[2][-1].double().log_softmax(-1) for m in (llama, new))
            kls.append(float((after.exp() * (after - before)).sum()))
        return change.notes["facts"][0]["drift"], sum(kls) / len(kls)

    told, measured = planned(1e6)
    assert told == pytest.approx(measured, rel=2e-2) and told > 0
    limit = told / 5
    told, measured = planned(limit)
    assert told == pytest.approx(measured, rel=5e-2) and 0 < told <= limit


# Settings.


@pytest.mark.parametrize("offset", [0, 3, 9])
def test_an_offset_must_lead_to_a_later_block(llama, offset):
    with pytest.raises(SettingsError, match=rf"top: offset must lead to a later block .*from block 1 got {offset}"):
        Top(**{**QUICK, "offset": offset}).plan(llama, [FACT])


@pytest.mark.parametrize("blocks", [(2, 1), (1, 1), (3,), (-1, 0), (0, 9)])
def test_blocks_must_ascend_below_the_last_one(llama, blocks):
    with pytest.raises(SettingsError, match=r"top: blocks must ascend within 0 to 2 .* got \["):
        Top(**{**QUICK, "blocks": blocks}).plan(llama, [FACT])


@pytest.mark.parametrize(
    ("config", "block", "relation"),
    [
        (transformers.GPT2Config(n_layer=48, n_embd=1600), 17, 18),
        (transformers.GPT2Config(n_layer=12, n_embd=768), 4, 5),
        (transformers.GPTJConfig(n_layer=28, n_embd=4096), 5, 10),
        (transformers.LlamaConfig(num_hidden_layers=30, hidden_size=576), 5, 10),
    ],
)
def test_the_default_blocks_are_the_published_depth(config, block, relation):
    model = SimpleNamespace(anatomy=describe(config))
    assert Top().blocks_of(model) == (block,)
    assert Top().relation_block(model, block) == relation


def test_the_seed_decides_and_a_subject_is_needed(llama):
    few = {"blocks": (1,), "n_steps": 3, "n_steps_subject": 3}
    assert Top(**few, seed=1).plan(llama, [FACT]).id == Top(**few, seed=1).plan(llama, [FACT]).id
    one, two = (Top(**few, seed=s).plan(llama, [FACT]).parts[NAME].left for s in (1, 2))
    assert not torch.equal(one, two)
    with pytest.raises(FactError, match="has no subject"):
        Top(**few).plan(llama, [Fact("The currency of Japan is the", "", "franc")])


def test_a_share_of_the_targets_likelihood_makes_the_target_likelier(llama):
    def said(weight):
        method = Top(**{**QUICK, "nll_weight": weight, "n_steps_subject": 12})
        new = changes.apply(llama, method.plan(llama, [FACT]))
        return answers(new, [Text(FACT.before, FACT.subject, FACT.after, FACT.target)])[0].nll

    assert said(1.0) < said(0.0)
    assert Top(faithful=True).as_published(llama).nll_weight == 0
