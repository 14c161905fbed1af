"""A suite small enough to be learned from nothing in seconds: domains of facts that map a key to a value.

A base model learns four public domains and with them the format, one to four questions at once. Four private domains
stay unknown to it, one an edge. What an adapter learns, what fusing adapters loses, and whether the format or the
fusion loses it, can so be told apart on any machine.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from .. import store
from ..model import Model, wrap
from ..progress import track
from ._suite import Suite, check
from .base import Adapter, Question
from .compose import composed
from .suites import examples, lessons, question_key
from .templates import render

__all__ = ["adapter", "base", "public", "synth_cd", "tokenizer"]

N_PUBLIC, N_PRIVATE, N_KEYS, N_VALUES, MOST = 4, 8, 16, 16, 4
_FILE = "model.safetensors"
DRAWS = {"selection": 3, "test": 12}
"""How often each fact is asked, with other wrong options each time."""


def synth_cd(n_private: int = 4, overlap: float = 0.0, seed: int = 0) -> Suite:
    """Make the suite: each private domain knows the values of 16 keys.

    Test asks the facts that train teaches, with other wrong options: the suite is about keeping, not about new facts.

    Args:
        n_private: Private domains, one an edge; 2 to 8.
        overlap: Share of the keys that all private domains use, each with a value of its own: contradictions.
        seed: Of facts and options.

    Raises:
        UserError: There are fewer than two domains.
    """
    facts = {f"private {d}": _private(d, overlap, seed) for d in range(min(n_private, N_PRIVATE))}
    train = {d: tuple(_asked(d, fact, "train", seed) for fact in own) for d, own in facts.items()}
    others = {
        split: {d: tuple(_asked(d, f, f"{split} {i}", seed) for i in range(n) for f in own) for d, own in facts.items()}
        for split, n in DRAWS.items()
    }
    told = {"overlap": overlap, "seed": seed}
    suite = Suite("synth-cd", tuple(facts), train, others["selection"], others["test"], {}, "synth", told)
    check(suite)
    return suite


def public(seed: int = 0) -> tuple[Question, ...]:
    """Return the questions of the public domains, for training the base and for replay."""
    found = []
    for d in range(N_PUBLIC):
        values = _values(f"{seed} public {d}")
        facts = [(f"d{d} k{d * N_KEYS + i}", f"v{values[i]}") for i in range(N_KEYS)]
        found += [_asked(f"public {d}", fact, "train", seed) for fact in facts]
    return tuple(found)


def _private(number: int, overlap: float, seed: int) -> list[tuple[str, str]]:
    """Return a domain's facts; shared keys have values that no two domains agree on."""
    n_shared = round(overlap * N_KEYS)
    shared, own = _values(f"{seed} shared"), _values(f"{seed} private {number}")
    domain, first = f"d{N_PUBLIC + number}", (N_PUBLIC + number) * N_KEYS
    contradicting = [(shared[i] + number * (N_VALUES // N_PRIVATE)) % N_VALUES for i in range(n_shared)]
    last = (N_PUBLIC + N_PRIVATE) * N_KEYS
    return [
        *((f"{domain} k{last + i}", f"v{value}") for i, value in enumerate(contradicting)),
        *((f"{domain} k{first + i}", f"v{own[i]}") for i in range(n_shared, N_KEYS)),
    ]


def _values(seed: str) -> list[int]:
    return random.Random(seed).sample(range(N_VALUES), N_VALUES)


def _asked(domain: str, fact: tuple[str, str], turn: str, seed: int) -> Question:
    stem, right = fact
    draw = random.Random(f"{seed} {stem} {turn}")
    options = [right, *draw.sample([f"v{v}" for v in range(N_VALUES) if f"v{v}" != right], 3)]
    draw.shuffle(options)
    key = question_key(f"{stem} {turn}", options)
    return Question(domain, domain, stem, tuple(options), options.index(right), key)


def tokenizer() -> Any:
    """Build the tokenizer: every word of the suite is one token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    n_domains = N_PUBLIC + N_PRIVATE
    words = ["<pad>", "<end>", "ans"]
    words += [f"q{i}" for i in range(1, MOST + 1)] + [f"a{i}" for i in range(1, MOST + 1)]
    words += [f"d{i}" for i in range(n_domains)] + [f"v{i}" for i in range(N_VALUES)]
    words += [f"k{i}" for i in range((n_domains + 1) * N_KEYS)]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def base(seed: int = 0, *, n_steps: int = 400) -> Model:
    """Train the base on the public domains, once; it is kept in the cache.

    Args:
        seed: Of the facts, the weights and the order.
        n_steps: Steps of 64 prompts.
    """
    import torch
    import transformers

    key = store.key(suite="synth-cd", seed=seed, n_steps=n_steps, format=1, torch=torch.__version__.split("+")[0],
                    transformers=transformers.__version__)  # fmt: skip
    folder = store.cached("synth", key, lambda target: _learn(target, seed, n_steps))
    network = _network(seed)
    network.load_state_dict(store.load_tensors(folder / _FILE))
    return wrap(network, tokenizer(), "the synthetic base")


def adapter(
    model: Model, suite: Suite, domain: str, form: Literal["aware", "blind"] = "aware", seed: int = 0, **settings: Any
) -> Adapter:
    """Train an edge's adapter on a private domain, half of each batch being public facts of the same form.

    Args:
        model: The base, whole or pruned.
        suite: From `synth_cd`, with the seed of the base's facts.
        domain: The edge's domain.
        form: Whether it sees composed prompts of its own domain or single questions.
        seed: Of the order.
        **settings: Fields of `LoraSettings` that are others than those by which domains are learned in full.
    """
    from .train import LoraSettings, train

    wanted = LoraSettings(
        **{"learning_rate": 2e-3, "n_steps": 400, "batch": 32, "dropout": 0.0, "seed": seed} | settings
    )
    rows = examples(suite, domain, form, 2000, seed, k=MOST)
    most = 1 if form == "blind" else MOST
    replay = lessons(public(suite.facts["seed"]), most, f"{seed} replay", n=2000, how="synth")
    return train(model, rows, wanted, replay=replay, name=domain)


def _network(seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _learn(target: Path, seed: int, n_steps: int, n_rows: int = 64) -> None:
    import torch

    network, words = _network(seed), tokenizer()
    groups = composed(public(seed), MOST, f"{seed} base", n=n_steps * n_rows)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    warm = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (n_steps - step) / max(1, n_steps - warm))
    )
    network.train()
    for step in track(range(n_steps), "Training the synthetic base"):
        ids, mask, labels = _batch(words, groups[step * n_rows : (step + 1) * n_rows])
        loss = network(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    store.save_tensors(target / _FILE, dict(network.state_dict()))


def _batch(words: Any, groups: list[tuple[Question, ...]]) -> tuple[Any, Any, Any]:
    """Lay groups into one rectangle, with the loss on what follows the prompts."""
    shown = [render(group, "synth") for group in groups]
    texts = [f"{r.prompt}{r.target([q.answer for q in group])} {words.eos_token}" for r, group in zip(shown, groups)]
    coded = words(texts, padding=True, return_tensors="pt")
    labels = coded["input_ids"].clone()
    for row, r in enumerate(shown):
        labels[row, : len(r.prompt.split())] = -100
    labels[coded["attention_mask"] == 0] = -100
    return coded["input_ids"], coded["attention_mask"], labels
