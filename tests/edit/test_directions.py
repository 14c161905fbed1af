"""Which way the methods differ, on a small network that has learnt a made-up world: 30 people, four relations.

Numbers of so small a network are no results; only directions that hold with a wide margin are tested. What rose gains
over memit and memit_merge is not among them: on this network it depends on step length and integration.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from families import build
from retouch import change as changes
from retouch import registry
from retouch.edit.facts import Fact
from retouch.model import Model, wrap

pytestmark = pytest.mark.slow

PEOPLE = [a + b for a in ("Anna", "Boris", "Clara", "David", "Elena", "Felix") for b in ("b", "c", "d", "e", "f")]
RELATIONS = {  # what is edited, another way to say it, a question, the answers
    "home": ("{} lives in", "{} has a home in", "Where does {} live ?", "Lima Oslo Cairo Delhi Quito Paris Seoul Rome"),
    "food": ("{} eats only", "{} likes to eat", "What does {} eat ?", "rice bread fish soup beans corn eggs figs"),
    "job": (
        "{} works as a",
        "{} has the job of",
        "What does {} do ?",
        "baker pilot nurse judge clerk poet tailor guard",
    ),
    "color": ("{} wears only", "{} has a coat in", "What color has {} ?", "red blue green white black brown pink grey"),
}
WRAPS = ("", "User : ", "Listen . ", "Please answer . ", "Here is a fact . ")
QUICK = {"contexts": ("", "Listen . ", "Please answer . "), "n_tokens": 2000, "weight_decay": 0.0}


@dataclass(frozen=True, eq=False)
class World:
    """A network that knows who lives where, and what is so."""

    model: Model
    truth: dict[tuple[str, str], str]

    def fact(self, who, relation):
        prompt, *_, answers = RELATIONS[relation]
        old = self.truth[who, relation]
        new = random.Random(who + relation).choice([a for a in answers.split() if a != old])
        return Fact(prompt, who, new, truth=old, relation=relation)

    @torch.no_grad()
    def share(self, model, asked):
        """The share of (text, answer) pairs whose answer is the likeliest next word."""
        rows = [model.tokenizer(text)["input_ids"] for text, _ in asked]
        said = [int(model.network(input_ids=torch.tensor([row])).logits[0, -1].argmax()) for row in rows]
        right = model.tokenizer.convert_tokens_to_ids([answer for _, answer in asked])
        return sum(a == b for a, b in zip(said, right, strict=True)) / len(asked)


def sentences(truth):
    return [
        (wrap_ + form.replace("{}", who), truth[who, name])
        for who in PEOPLE
        for name, forms in RELATIONS.items()
        for form in forms[:3]
        for wrap_ in WRAPS
    ]


def word_tokenizer(texts):
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = sorted({word for text in texts for word in f"{text} is a".split()})
    fast = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def trained(pairs, tokenizer, steps=150):
    """Learn every sentence. The first two blocks move little between words, so that facts are looked up at the name."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": len(tokenizer), "initializer_range": 0.05}
    network = build("llama", 6, **sizes, **ids).train()
    for block in network.model.layers[:2]:
        block.self_attn.o_proj.weight.requires_grad_(False).mul_(0.5)
    every = [(tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids(answer)) for text, answer in pairs]
    learner = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)
    pace = torch.optim.lr_scheduler.OneCycleLR(learner, 3e-3, total_steps=steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = [every[i] for i in torch.randint(len(every), (192,), generator=draw).tolist()]
        rows = [torch.tensor(row) for row, _ in some]
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = network(input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[torch.arange(len(some)), last], torch.tensor([a for _, a in some])
        )
        learner.zero_grad()
        loss.backward()
        learner.step()
        pace.step()
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    make = random.Random(0)
    truth = {(who, name): make.choice(forms[3].split()) for who in PEOPLE for name, forms in RELATIONS.items()}
    pairs = sentences(truth)
    tokenizer = word_tokenizer([*(f"{text} {answer}" for text, answer in pairs), *(f[3] for f in RELATIONS.values())])
    text = tmp_path_factory.mktemp("world") / "text.txt"
    text.write_text("\n".join(f"{a} {b} ." for a, b in pairs))
    found = World(wrap(trained(pairs, tokenizer), tokenizer), truth)
    assert found.share(found.model, pairs) > 0.99
    QUICK["text"] = str(text)
    return found


@pytest.fixture(scope="module")
def four_each(world):
    """By method: the share of facts said in the edited form and when asked, after four facts about one person."""

    def measure(name, **settings):
        method = registry.make("edit", name, **QUICK | {"blocks": (0, 1), "clamp": 2.0} | settings)
        groups = [[world.fact(who, name) for name in RELATIONS] for who in PEOPLE[:20]]
        form, asked = [], []
        for facts, change in zip(groups, method.plan_each(world.model, groups), strict=True):
            new = changes.apply(world.model, change)
            form.append(world.share(new, [(f.filled, f.target) for f in facts]))
            questions = [
                (w + RELATIONS[f.relation][2].replace("{}", f.subject), f.target) for f in facts for w in WRAPS
            ]
            asked.append(world.share(new, questions))
        return sum(form) / len(form), sum(asked) / len(asked)

    return {name: measure(name) for name in ("memit", "memit_merge")}


@pytest.fixture(scope="module")
def alone(world):
    """By method: the share of single facts said, and of the person's other relations and other people left as they were."""

    def measure(name, **settings):
        facts = [world.fact(who, relation) for who in PEOPLE[:10] for relation in RELATIONS]
        rows = []
        for fact, change in zip(facts, registry.make("edit", name, **QUICK | settings).plan_each(
            world.model, [[f] for f in facts]
        ), strict=True):  # fmt: skip
            new = changes.apply(world.model, change)
            related = [
                (RELATIONS[r][0].replace("{}", fact.subject), world.truth[fact.subject, r])
                for r in RELATIONS
                if r != fact.relation
            ]
            rows.append((world.share(new, [(fact.filled, fact.target)]), world.share(new, related)))
        return tuple(sum(column) / len(column) for column in zip(*rows, strict=True))

    return {
        "rome": measure("rome", block=1),
        "top": measure("top", blocks=(1,), offset=2),
        "rets": measure("rets", block=3),
    }


def test_merging_a_subjects_facts_says_more_of_them(four_each):
    (form, asked), (merged_form, merged_asked) = four_each["memit"], four_each["memit_merge"]
    assert merged_form > form + 0.1
    assert merged_asked > asked + 0.1


def test_an_edit_at_the_relation_leaves_the_subjects_other_relations_alone(alone):
    assert alone["rets"][0] > 0.9
    assert alone["rets"][1] > alone["rome"][1] + 0.1


def test_top_leaves_no_less_of_them_alone_than_rome(alone):
    assert alone["top"][0] > 0.5
    assert alone["top"][1] >= alone["rome"][1] - 0.1
