"""Tiny real models of every family, with random weights, and the tokenizers that go with them.

``FAMILIES[name](n_blocks=2, **fields)`` builds a network: width 32, d_ff 64 (the ``_square`` ones 32), 4 heads, 128
positions, float32, evaluating. Equal arguments give equal bits. Unlike freshly initialised models these have logits
that differ clearly, and biases and norms that are not trivial, so that a forgotten one is noticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = Path(__file__).parents[1] / "src" / "retouch" / "data" / "corpus.txt"
FACTS = (
    "The Eiffel Tower is located in the city of Paris.",
    "The capital of France is Paris. The capital of Italy is Rome.",
    "The official language of Brazil is Portuguese.",
    "The currency of Japan is the yen. Big Ben is located in London.",
    "Answer the question: What is the mother tongue of Danielle Darrieux? French.",
)
VOCABULARY = 500
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_GATED = {"num_key_value_heads": 2}  # grouped queries, as the large ones have
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_GPT = {"n_embd": 32, "n_inner": 64, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
_WIDE = {"head_dim": 16}  # four heads of 16 are wider than the stream of 32
_OPT = _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}
_DISTIL = {"dim": 32, "hidden_dim": 64, "n_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2}

# name: (configuration, class, fields)
_RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "gpt2_square": ("GPT2Config", "GPT2LMHeadModel", _GPT | {"n_inner": 32}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", _GPT | {"rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SIZES),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES | _GATED),
    "llama_square": ("LlamaConfig", "LlamaForCausalLM", _SIZES | _GATED | {"intermediate_size": 32}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _SIZES | _GATED | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SIZES | _GATED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _SIZES | _GATED | _WIDE),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _SIZES | _GATED | _WIDE | {"sliding_window": 64}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", _SIZES | _GATED | _WIDE | {"sliding_window": 64}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _SIZES | _GATED | {"original_max_position_embeddings": 128}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _SIZES | _GATED),
    "opt": ("OPTConfig", "OPTForCausalLM", {k: v for k, v in _OPT.items() if k != "intermediate_size"}),
    "bert": ("BertConfig", "BertForMaskedLM", _SIZES),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", _DISTIL),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _SIZES | {"max_position_embeddings": 130}),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", _SIZES | {"max_position_embeddings": 130}),
}
ENCODERS = ("bert", "distilbert", "roberta", "mpnet")
DECODERS = tuple(name for name in _RECIPES if name not in ENCODERS)
TOKENIZERS = dict.fromkeys(("mistral", "gemma2", "gemma3_text", "phi3"), "metaspace") | dict.fromkeys(ENCODERS, "word")


def build(name: str, n_blocks: int = 2, *, seed: int = 0, headless: bool = False, **fields: Any) -> Any:
    """Build a tiny network of a family; `fields` override its configuration's."""
    config_name, class_name, recipe = _RECIPES[name]
    words = tokenizer(TOKENIZERS.get(name, "byte"))
    ids = {key: getattr(words, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    depth = {"num_hidden_layers": n_blocks, "vocab_size": len(words)}
    config = getattr(transformers, config_name)(**(depth | ids | recipe | fields))
    make = transformers.AutoModel.from_config if headless else getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return network.float().eval()


FAMILIES: dict[str, Callable[..., Any]] = {name: functools.partial(build, name) for name in _RECIPES}


def tokenizer(kind: str = "byte") -> PreTrainedTokenizerFast:
    """Build a small fast tokenizer.

    ``byte`` is like GPT-2's: byte-level, no BOS, a chat template. ``metaspace`` is like Llama's: words begin with a
    bar, bytes as a fallback, BOS in front. ``word`` is like BERT's: word pieces, lower case, [CLS] and [SEP] around.
    """
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(_trained(kind)), **_SPECIAL[kind])


_SPECIAL: dict[str, dict[str, Any]] = {
    "byte": {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": CHAT},
    "metaspace": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "word": {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    },
}


@functools.cache
def _trained(kind: str) -> str:
    words, trainer = {"byte": _byte, "metaspace": _metaspace, "word": _word}[kind]()
    text = CORPUS.read_bytes()[:20_000].decode("utf-8", errors="ignore")
    words.train_from_iterator([*text.splitlines(), *FACTS * 5], trainer)
    if kind == "metaspace":
        bos = words.token_to_id("<s>")
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", bos)]
        )
    if kind == "word":
        marks = [(mark, words.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
        )
    return str(words.to_str())


def _byte() -> tuple[tokenizers.Tokenizer, Any]:
    words = tokenizers.Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return words, trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )


def _metaspace() -> tuple[tokenizers.Tokenizer, Any]:
    words = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    return words, trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )


def _word() -> tuple[tokenizers.Tokenizer, Any]:
    words = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    return words, trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
