"""What every editing method keeps to, on every family: a new method is found and held to it without a line here."""

from __future__ import annotations

import dataclasses
import functools
import typing

import pytest
import torch

from families import DECODERS, ENCODERS
from retouch import change as changes
from retouch import registry
from retouch.edit.facts import Fact
from retouch.errors import FactError, ModelError, SettingsError
from retouch.model import wrap
from retouch.settings import fields_of
from retouch.tokens import Text, encode

METHODS = [entry.name for entry in registry.methods("edit")]
# In a random model the keys of all tokens are alike, so that a write at the subject is heard at the prompt's end too, and
# louder there. With the subject at the end the target's likelihood is the one that a method has searched.
FACT = Fact("The capital of {}", "France", "is Lyon")
OTHERS = [
    Fact("The official language of {}", "Brazil", "is French"),
    Fact("They all looked at {}", "Big Ben", "in Rome"),
]
# Enough for a target to become likelier; a method takes those of them that it has. The published decay is a length
# over a squared length: values as short as those of tiny models would hardly move under it.
QUICK = {"n_steps": 6, "contexts": "plain", "n_tokens": 256, "weight_decay": 0.0}


def quick(name, **settings):
    known = {f.name for f in fields_of(registry.load("edit", name))}
    return registry.make("edit", name, **{k: v for k, v in QUICK.items() if k in known} | settings)


def bits(model):
    return {n: p.detach().clone() for n, p in model.network.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def nll(model, fact):
    """Mean negative log-likelihood of the target, by one plain pass of the network."""
    (row,) = encode(model.tokenizer, [Text(fact.before, fact.subject, fact.after, fact.target)])
    logp = model.network(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logp[row.prompt + i, t]) for i, t in enumerate(row.target)) / len(row.target)


@dataclasses.dataclass(eq=False)
class Case:
    """One method's plan on one family, made once."""

    method: typing.Any
    model: typing.Any
    before: dict
    change: changes.Change

    @functools.cached_property
    def new(self):
        return changes.apply(self.model, self.change)


@pytest.fixture(scope="module")
def open_tiny(tiny):
    return functools.cache(lambda family: wrap(*tiny(family, n_blocks=3), source=f"tiny {family}"))


@pytest.fixture(scope="module")
def cases(open_tiny):
    planned = {}

    def case(name, family):
        if (name, family) not in planned:
            method, model = quick(name), open_tiny(family)
            before = bits(model)
            planned[name, family] = Case(method, model, before, method.plan(model, [FACT]))
        return planned[name, family]

    return case


@pytest.fixture(params=[(m, f) for m in METHODS for f in DECODERS], ids="-".join)
def case(request, cases):
    return cases(*request.param)


def test_a_plan_leaves_the_model_bit_equal_and_says_where_it_comes_from(case):
    after = bits(case.model)
    assert all(torch.equal(after[n], t) for n, t in case.before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.network.modules())
    assert not any(p.requires_grad or p.grad is not None for p in case.model.network.parameters())
    change = case.change
    assert (change.method, change.base) == (case.method.name, case.model.fingerprint)
    assert change.settings == case.method.to_dict()
    assert [Fact.from_dict(f) for f in change.facts] == [FACT]


def test_applying_makes_a_new_model_that_shares_the_rest_and_says_the_target(case):
    new = case.new
    anatomy = case.model.anatomy
    touched = {f"{anatomy.path(n[:-5])}.bias" if n.endswith(":bias") else anatomy.weight(n) for n in case.change.parts}
    for name, old in case.model.network.named_parameters(remove_duplicate=False):
        parameter = new.network.get_parameter(name)
        assert torch.equal(old, case.before[name])
        assert parameter.dtype == old.dtype and parameter.shape == old.shape
        assert (parameter is old) == (name not in touched), name
    tied = case.model.network.get_input_embeddings().weight is case.model.network.get_output_embeddings().weight
    assert tied == (new.network.get_input_embeddings().weight is new.network.get_output_embeddings().weight)
    assert nll(new, FACT) < nll(case.model, FACT)


def test_a_saved_plan_makes_the_same_model(case, tmp_path):
    changes.save(case.change, tmp_path / "change")
    again = changes.load(tmp_path / "change")
    assert again.id == case.change.id
    assert changes.apply(case.model, again).fingerprint == case.new.fingerprint


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bits(cases, tiny, name, family):
    anew = wrap(*tiny(family, n_blocks=3))
    with torch.no_grad():  # as many callers do; it must not matter
        assert quick(name).plan(anew, [FACT]).id == cases(name, family).change.id


@pytest.mark.parametrize("name", METHODS)
def test_facts_planned_together_all_become_likelier(open_tiny, name):
    facts = [FACT, *OTHERS]
    model = open_tiny("llama")
    method = quick(name)
    change = method.plan(model, facts)
    new = changes.apply(model, change)
    assert len(change.facts) == 3
    assert sum(nll(new, f) for f in facts) < sum(nll(model, f) for f in facts)
    for fact, alone in zip(facts, method.plan_each(model, [[f] for f in facts]), strict=True):
        assert [Fact.from_dict(f) for f in alone.facts] == [fact]
        assert nll(changes.apply(model, alone), fact) < nll(model, fact)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_already_carries_a_change_is_planned_on_as_it_is(cases, open_tiny, name):
    model = open_tiny("llama")
    carrying = changes.apply(model, cases("ft_m", "llama").change)
    change = quick(name).plan(carrying, OTHERS[:1])
    assert change.base == model.fingerprint


@pytest.mark.parametrize("headless", [False, True], ids=["masked", "headless"])
@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_refused_with_the_method_and_the_family(tiny, family, headless):
    model = wrap(*tiny(family, headless=headless))
    for name in METHODS:
        with pytest.raises(ModelError, match=f"'{name}'.*{model.anatomy.family} encoder"):
            quick(name).plan(model, [FACT])


@pytest.mark.parametrize("name", METHODS)
def test_no_facts_are_an_error(open_tiny, name):
    with pytest.raises(FactError, match="no facts"):
        quick(name).plan(open_tiny("llama"), [])


def _wrong_values(cls, field):
    """Values that a field must refuse, read from its own declaration."""
    hint = typing.get_type_hints(cls)[field.name]
    bounds = next(f for f in dataclasses.fields(cls) if f.name == field.name).metadata["bounds"]
    outside = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
    values = [bounds[kind] + step for kind, step in outside.items() if kind in bounds]
    if hint in (int, float):
        values += [float("nan") if hint is float and bounds else "many", None]
    elif hint is bool:
        values += ["perhaps", 2]
    else:
        values += [17.5, None]
    return values


@pytest.mark.parametrize("name", METHODS)
def test_every_wrong_setting_names_its_field(name):
    cls = registry.load("edit", name)
    for field in fields_of(cls):
        for value in _wrong_values(cls, field):
            with pytest.raises(SettingsError, match=f"{field.name} must be"):
                registry.make("edit", name, **{field.name: value})
    with pytest.raises(SettingsError, match=r"has no setting 'sede'\. Did you mean 'seed'"):
        registry.make("edit", name, sede=1)


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_their_plain_form_and_are_described(name):
    method = registry.make("edit", name)
    assert registry.make("edit", name, **method.to_dict()) == method
    assert all(field.doc.endswith(".") for field in fields_of(type(method)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.seed = 1


@pytest.mark.parametrize("entry", registry.methods("edit"), ids=lambda e: e.name)
def test_the_documentation_says_what_when_and_whence(entry):
    assert entry.summary.endswith(".") and entry.source
    for part in ("Use when:", "Known problems:", "Shapes:", "Example:"):
        assert part in entry.doc
