"""RETS writes at the relation, and its metric keeps the write to its subject."""

from __future__ import annotations

import itertools

import pytest
import torch

from retouch import change as changes
from retouch import linalg, stats
from retouch.edit import rets
from retouch.edit.constraints import constraints
from retouch.edit.contexts import Context
from retouch.edit.facts import Fact
from retouch.edit.keys import read_all
from retouch.edit.rets import Rets, reworded
from retouch.edit.rows import problems
from retouch.edit.value import optimise
from retouch.errors import FactError, SettingsError, SolveError

FACT = Fact("The capital of {} is", "France", "Lyon")
OTHER = Fact("The official language of {} is", "Brazil", "French")
ENDING = Fact("We all want to live in {}", "France", "now", paraphrases=("See France", "Here in France they said that"))
OWN = ("", "I am the one. ", "Because. ")
CONTEXTS = [Context(t, 1 / 3) for t in OWN]
NAME = "blocks.1.mlp.down"
QUICK = {"block": 1, "n_steps": 3, "contexts": OWN, "n_constraints": 30, "weight_decay": 0.0}


@torch.no_grad()
def last_input(model, ids, name=NAME):
    """What flows into a weight at a row's last token: a plain hook on the whole network."""
    seen = []
    handle = model.module(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.network(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1)[-1].double()


def key_of(model, text, name=NAME):
    return last_input(model, model.tokenizer(text)["input_ids"], name)


def own_keys(model, fact):
    (problem,) = problems(model, [fact], CONTEXTS, "prompt")
    return torch.stack([last_input(model, row.ids[: row.prompt + 1]) for row in problem.rows])


def others(model, fact, n=30, **more):
    return torch.stack([key_of(model, c.prompt) for c in constraints(fact, n=n, **more)])


def second_moment(rows, weight):
    """Mean of k k', scaled to a trace of weight times width: from the definition, outer product by outer product."""
    moment = sum(torch.outer(k, k) for k in rows) / len(rows)
    return weight * len(moment) / moment.trace() * moment


def dense(model, fact, beta, gamma, eta, n=30):
    own = own_keys(model, fact)
    m = eta * torch.eye(own.shape[1]).double()
    if beta:
        m = m + second_moment(others(model, fact, n), beta)
    return m + second_moment(own - own.mean(0), gamma) if gamma else m


def direction(m, key):
    w = torch.linalg.solve(m, key)
    return w / (w @ key)


def planned(model, fact=FACT, **settings):
    change = Rets(**{**QUICK, **settings}).plan(model, [fact])
    return change, change.parts[NAME].right[0].double()


# The metric.


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("llama", (100.0, 100.0, 0.1)),
        ("llama", (100.0, 0.0, 0.01)),
        ("llama", (0.0, 5.0, 2.0)),
        ("gpt2", (100.0, 100.0, 0.1)),
        ("gpt2_square", (10.0, 1.0, 0.1)),
    ],
)
def test_the_write_listens_as_the_matrix_built_by_hand_says(open_tiny, family, weights):
    model, (beta, gamma, eta) = open_tiny(family), weights
    settings = {"subject_weight": beta, "drift_weight": gamma, "eta": eta, "max_amplification": 1e6}
    change, w = planned(model, **settings)
    wanted = direction(dense(model, FACT, *weights), own_keys(model, FACT).mean(0))
    assert (w - wanted).norm() < 2e-3 * wanted.norm()
    (note,) = change.notes["facts"]
    assert (note["eta"], note["n_constraints"], note["key_token"]) == (eta, 30, "prompt_last")


def test_ordinary_texts_moment_enters_with_its_own_weight(llama):
    settings = {"moment_weight": 3.0, "n_tokens": 400, "max_amplification": 1e6}
    _, w = planned(llama, **settings)
    c = stats.collect(llama, [NAME], n_tokens=400)[NAME].mean.double()
    m = dense(llama, FACT, 100.0, 100.0, 0.1) + 3 * len(c) / c.trace() * c
    wanted = direction(m, own_keys(llama, FACT).mean(0))
    assert (w - wanted).norm() < 2e-3 * wanted.norm()
    assert (w - planned(llama, max_amplification=1e6)[1]).norm() > 1e-2 * wanted.norm()


def test_no_other_listener_of_the_key_is_cheaper(llama):
    _, w = planned(llama, max_amplification=1e6)
    m, key = dense(llama, FACT, 100.0, 100.0, 0.1), own_keys(llama, FACT).mean(0)
    make = torch.Generator().manual_seed(0)
    assert float(w @ key) == pytest.approx(1, rel=1e-4)
    for i in range(100):
        way = torch.randn(64, generator=make).double()
        way -= (way @ key) / (key @ key) * key
        rival = w + 10 ** (-3 * i / 99) * w.norm() / way.norm() * way  # from as long as itself to a thousandth
        assert rival @ m @ rival > w @ m @ w


def test_more_weight_on_the_constraints_means_less_change_for_other_subjects(llama):
    held_out = [c.prompt for c in constraints(FACT, n=100, half="certify") if c.kind == "relation"]
    keys = torch.stack([key_of(llama, p) for p in held_out])
    among = others(llama, FACT, 200)
    unseen, seen = [], []
    for beta in (0.0, 1.0, 100.0):
        _, w = planned(llama, subject_weight=beta, drift_weight=0.0, n_constraints=200, max_amplification=1e6)
        unseen.append(float((keys @ w).square().mean()))
        seen.append(float((among @ w).square().mean()))
    assert seen[0] > seen[1] > seen[2]
    assert unseen[1] < 0.5 * unseen[0] and unseen[2] < 0.5 * unseen[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_larger_eta_never_amplifies_more(open_tiny, family):
    model = open_tiny(family)
    found = []
    for eta in (1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e5):
        change, w = planned(model, eta=eta, max_amplification=1e6)
        found.append(change.notes["facts"][0]["amplification"])
        assert found[-1] == pytest.approx(float(w.norm() * own_keys(model, FACT).mean(0).norm()), rel=1e-3)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(found))
    assert found[0] > 1.5 and found[-1] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_the_scatter_in_the_metric_every_context_receives_the_residual(open_tiny, family):
    model = open_tiny(family)
    own = own_keys(model, FACT)
    change, w = planned(model, max_amplification=1e6)
    assert (own @ w - 1).abs().max() < 0.01
    assert change.notes["facts"][0]["bare"] == pytest.approx(1, abs=0.01)
    _, without = planned(model, drift_weight=0.0, max_amplification=1e6)
    assert (own @ without - 1).abs().max() > 0.02


def test_eta_is_doubled_until_the_amplification_is_allowed(llama):
    free, _ = planned(llama, eta=1e-3, max_amplification=1e6)
    loud = free.notes["facts"][0]["amplification"]
    limit = 1 + (loud - 1) / 3
    change, w = planned(llama, eta=1e-3, max_amplification=limit)
    (note,) = change.notes["facts"]
    doublings = torch.log2(torch.tensor(note["eta"] / 1e-3)).item()
    assert doublings == pytest.approx(round(doublings)) and doublings >= 1
    assert note["amplification"] <= limit
    before, _ = planned(llama, eta=note["eta"] / 2, max_amplification=1e6)
    assert before.notes["facts"][0]["amplification"] > limit
    key = own_keys(llama, FACT).mean(0)
    wanted = direction(dense(llama, FACT, 100.0, 100.0, note["eta"]), key)
    assert (w - wanted).norm() < 2e-3 * wanted.norm()


def test_an_amplification_of_one_is_out_of_reach_and_says_so(llama):
    with pytest.raises(SolveError, match="No eta keeps the amplification within 1"):
        Rets(**QUICK, eta=1e-30, max_amplification=1.0).plan(llama, [FACT])


# The value and the write.


@pytest.mark.parametrize("family", ["llama", "llama_square", "gpt2", "gpt2_square", "gpt_neox", "gemma2"])
def test_the_mean_key_at_the_prompts_end_gets_the_value(open_tiny, family):
    model, method = open_tiny(family), Rets(**QUICK)
    new = changes.apply(model, method.plan(model, [FACT]))
    found = problems(model, [FACT], CONTEXTS, "prompt")
    target = optimise(model, found, 1, "down", method)[0].target
    key = own_keys(model, FACT).mean(0).float()
    with torch.no_grad():
        out, before = new.module(NAME)(key[None])[0], model.module(NAME)(key[None])[0]
    assert (out - target).norm() < 1e-4 * target.norm()
    assert (before - target).norm() > 1e-2 * target.norm()


def test_several_facts_and_groups_of_them(llama):
    method = Rets(**QUICK)
    together = method.plan(llama, [FACT, OTHER])
    first = method.plan(llama, [FACT])
    second = method.plan(changes.apply(llama, first), [OTHER])
    assert together.parts[NAME].rank == 2
    delta = first.parts[NAME].delta() + second.parts[NAME].delta()
    assert (together.parts[NAME].delta() - delta).norm() < 1e-4 * delta.norm()
    grouped, alone = method.plan_each(llama, [[FACT, OTHER], [OTHER]])
    assert grouped.id == together.id
    assert alone.id == method.plan(llama, [OTHER]).id
    for change, fact in zip(method.plan_each(llama, [[FACT], [OTHER]]), (FACT, OTHER), strict=True):
        wanted = method.plan(llama, [fact]).parts[NAME].delta()
        assert (change.parts[NAME].delta() - wanted).norm() < 5e-3 * wanted.norm()


def test_a_fact_needs_no_subject(llama):
    bare = Fact("The currency of Japan is the", "", "franc")
    (note,) = Rets(**QUICK).plan(llama, [bare]).notes["facts"]
    assert note["key_token"] == "prompt_last" and note["n_constraints"] > 0


def test_a_limit_on_drift_is_kept(llama):
    free = Rets(**QUICK, max_drift=1e6, n_bystanders=6).plan(llama, [FACT]).notes["facts"][0]["drift"]
    held = Rets(**QUICK, max_drift=free / 3, n_bystanders=6).plan(llama, [FACT]).notes["facts"][0]["drift"]
    assert held <= free / 3 < free


# A prompt that ends with its subject.


def test_a_paraphrase_with_words_behind_the_subject_is_used(llama):
    change = Rets(**QUICK).plan(llama, [ENDING])
    (note,) = change.notes["facts"]
    assert note["key_token"] == "prompt_last"
    assert note["warnings"] == ["The prompt ends with its subject; edited through 'Here in France they said that'."]
    assert [Fact.from_dict(f) for f in change.facts] == [ENDING]
    asked = reworded(ENDING)
    keys = own_keys(llama, asked)
    assert torch.allclose(change.keys[NAME][:, 0].double(), keys.mean(0), atol=1e-4)
    # the constraints end as the paraphrase does, for that is where the write stands
    m = second_moment(others(llama, asked), 100.0) + second_moment(keys - keys.mean(0), 100.0)
    wanted = direction(m + note["eta"] * torch.eye(64).double(), keys.mean(0))
    assert (change.parts[NAME].right[0].double() - wanted).norm() < 2e-3 * wanted.norm()


def test_rewording_keeps_all_else_of_a_fact():
    asked = reworded(ENDING)
    assert (asked.prompt, asked.filled) == ("Here in {} they said that", "Here in France they said that")
    assert (asked.subject, asked.target) == (ENDING.subject, ENDING.target)
    assert asked.paraphrases == (ENDING.filled, "See France")  # so that no constraint asks for the fact
    assert reworded(FACT) is FACT
    lonely = Fact("We all want to live in {}", "France", "now", paraphrases=("See France",))
    assert reworded(lonely) is lonely


@pytest.mark.parametrize(
    ("fact", "reword"), [(ENDING, False), (Fact("We all want to live in {}", "France", "now"), True)]
)
def test_without_one_it_is_an_edit_of_the_subject_and_says_so(llama, fact, reword):
    change = Rets(**QUICK, reword=reword).plan(llama, [fact])
    (note,) = change.notes["facts"]
    assert note["key_token"] == "subject_last"
    assert any("ends with its subject" in w and "subject's last token" in w for w in note["warnings"])
    assert torch.allclose(change.keys[NAME][:, 0].double(), own_keys(llama, fact).mean(0), atol=1e-4)


# Follow the authors.


def test_faithful_takes_raw_sums_and_the_edited_prompt_among_them(llama):
    change, w = planned(llama, faithful=True)
    (note,) = change.notes["facts"]
    assert (note["n_constraints"], note["eta"]) == (31, 0.0)
    keys = torch.cat([others(llama, FACT), key_of(llama, FACT.filled)[None]])
    m = keys.T @ keys
    mean = own_keys(llama, FACT).mean(0)
    wanted = direction(m + 1e-6 * m.trace() / len(m) * torch.eye(len(m)).double(), mean)
    assert (w - wanted).norm() < 2e-2 * wanted.norm()  # 31 vectors in 64 dimensions: ill conditioned


def test_faithful_takes_as_many_constraints_as_published_unless_told(llama):
    method = Rets(faithful=True).as_published(llama)
    assert (method.n_constraints, method.kl_position) == (21_919, "subject")
    assert Rets(faithful=True, n_constraints=50).as_published(llama).n_constraints == 50
    assert Rets().as_published(llama) == Rets()


def test_faithful_makes_the_prompt_the_subject_of_the_row_that_guards_it(llama):
    settings = {**QUICK, "n_steps": 6, "kl_factor": 5.0, "n_constraints": 199}
    found = problems(llama, [Fact("{}", FACT.filled, FACT.target)], CONTEXTS, "subject")
    guard = found[0].kl
    assert llama.tokenizer.decode(list(guard.ids)) == "The capital of France is is a"
    assert llama.tokenizer.decode(list(guard.ids[: found[0].kl_at + 1])) == "The capital of France is"
    target = optimise(llama, found, 1, "down", Rets(**settings, kl_position="subject"))[0].target
    plain = optimise(llama, problems(llama, [FACT], CONTEXTS, "prompt"), 1, "down", Rets(**settings))[0].target
    assert (plain - target).norm() > 5e-2 * target.norm()
    change = Rets(**settings, faithful=True).plan(llama, [FACT])
    bare = own_keys(llama, FACT)[0]
    assert torch.allclose(change.keys[NAME][:, 0].double(), bare, atol=1e-4)
    new = changes.apply(llama, change)
    with torch.no_grad():
        out = new.module(NAME)(bare.float()[None])[0]
    assert (out - target).norm() < 1e-3 * target.norm()  # at the bare prompt's key


def test_faithful_edits_the_prompt_that_it_is_given(llama):
    (note,) = Rets(**QUICK, faithful=True).plan(llama, [ENDING]).notes["facts"]
    assert note["key_token"] == "subject_last" and "edited through" not in " ".join(note["warnings"])


# Constraints of one's own.


def test_prompts_of_ones_own_take_the_place_of_built_ones(llama, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(f"Japan lies in\nThe yen is\nJapan lies in\n{FACT.filled}\nBig Ben stands in\n", encoding="utf-8")
    change, w = planned(llama, constraints=str(file), max_amplification=1e6)
    assert change.notes["facts"][0]["n_constraints"] == 3  # once each, and not the edited prompt
    own = own_keys(llama, FACT)
    rows = torch.stack([key_of(llama, t) for t in ("Japan lies in", "The yen is", "Big Ben stands in")])
    m = second_moment(rows, 100.0) + second_moment(own - own.mean(0), 100.0) + 0.1 * torch.eye(64).double()
    wanted = direction(m, own.mean(0))
    assert (w - wanted).norm() < 2e-3 * wanted.norm()


def test_a_file_that_asks_for_nothing_but_the_fact_is_an_error(llama, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(f"{FACT.filled}\n", encoding="utf-8")
    with pytest.raises(FactError, match=r"own\.txt: every prompt asks for the fact 'The capital of France is' itself"):
        Rets(**QUICK, constraints=str(file)).plan(llama, [FACT])


def test_the_seed_draws_other_constraints(llama):
    ids = {s: Rets(**QUICK, seed=s).plan(llama, [FACT]).parts[NAME].right for s in (0, 1)}
    assert torch.equal(ids[0], Rets(**QUICK, seed=0).plan(llama, [FACT]).parts[NAME].right)
    assert not torch.allclose(ids[0], ids[1], rtol=1e-3)


# The block.


def likeness(model, fact, block):
    """Mean cosine of the bare prompt's key and the constraints' keys."""
    name = f"blocks.{block}.mlp.down"
    own = key_of(model, fact.filled, name)
    rows = [key_of(model, c.prompt, name) for c in constraints(fact, n=8)]
    return float(torch.stack([torch.cosine_similarity(own, k, dim=0) for k in rows]).mean())


def test_the_block_is_the_one_where_constraints_are_least_like_the_facts_keys(open_tiny):
    model = open_tiny("llama", 8)  # r(0.55) to r(0.85) of eight blocks: 4 to 7
    method = Rets(**{**QUICK, "block": -1, "n_steps": 1, "n_constraints": 8})
    facts = [
        FACT,
        OTHER,
        Fact("They all looked at {} in", "Big Ben", "Rome"),
        Fact("The mother tongue of {} was", "Danielle Darrieux", "Dutch"),
        Fact("{} plays the", "Miles Davis", "harp"),
    ]
    table = torch.tensor([[likeness(model, f, b) for b in range(4, 8)] for f in facts])
    best = (table.argmin(1) + 4).tolist()
    alone = method.plan_each(model, [[f] for f in facts])
    assert [change.notes["block"] for change in alone] == best
    assert len(set(best)) > 1  # so that one block for all would show
    assert all(change.settings == method.to_dict() for change in alone)
    assert method.plan(model, facts[:1]).notes["block"] == best[0]
    together = method.plan(model, facts)
    assert together.notes["block"] == int(table.mean(0).argmin()) + 4
    assert list(together.parts) == [f"blocks.{together.notes['block']}.mlp.down"]


def test_the_constraints_of_a_fact_are_read_once(open_tiny, monkeypatch):
    model, read = open_tiny("llama", 8), []

    def counted(model, rows, names, **how):
        read.append(len(rows))
        return read_all(model, rows, names, **how)

    monkeypatch.setattr(rets, "read_all", counted)
    method = Rets(**{**QUICK, "block": -1, "n_steps": 1, "n_constraints": 40})
    method.plan(model, [FACT])
    method.plan_each(model, [[FACT], [OTHER]])
    assert [n for n in read if n > 30] == [40] * 3


def test_a_block_that_the_model_lacks_is_refused(llama):
    with pytest.raises(SettingsError, match="rets: this model has blocks 0 to 2; got 3"):
        Rets(block=3).plan(llama, [FACT])


def test_woodbury_is_the_dense_inverse():
    make = torch.Generator().manual_seed(0)
    vectors, x = (torch.randn(40, n, generator=make).double() for n in (7, 3))
    direct = torch.linalg.solve(vectors @ vectors.T + 0.3 * torch.eye(40).double(), x)
    assert torch.allclose(linalg.Woodbury.of(0.3, vectors).apply_inverse(x), direct)
