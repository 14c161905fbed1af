"""What a bundle keeps of instructions, fusion and the source of knowledge, and how they are built again from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import store
from ..errors import StoreError, UserError
from ._adaptor import FixedKnowledge
from ._bundle_files import AGAIN, RECORD, load_part
from ._fitting import _titles
from .base import Run
from .fusion import Fusion
from .instruction import GlobalInstructions, Instructions, PromptInstructions
from .knowledge import LanguageKnowledge, TextKnowledge

if TYPE_CHECKING:
    from ..model import Model
    from .lwgr import LWGR
    from .policy import AnyInstructions, Policy

__all__ = [
    "asked_of",
    "describe_knowledge",
    "knowledge_tensors",
    "load_parts",
    "load_source",
    "titles_read",
]

VECTORS = "text_vectors"

Facts = Mapping[str, Any]


def asked_of(source: object) -> LanguageKnowledge | None:
    """Return who reads the titles; None where no language model does."""
    inner = source._source[0] if isinstance(source, FixedKnowledge) else source
    return inner if isinstance(inner, LanguageKnowledge) else None


def titles_read(source: object, method: LWGR, run: Run) -> tuple[str, ...]:
    """Return what the language model reads of each item, proved by what it was given.

    Raises:
        UserError: It was given something else than the method says.
    """
    titles, inner = _titles(method, run), asked_of(source)
    if inner is not None:
        told = {"how": inner.titles_as, "most": method.max_title_tokens, "order": inner.order}
        if store.key(titles=titles, **told) != inner._titles:
            raise UserError(
                "The language model of this policy read other titles than the data's items have under the recorded "
                "settings. Give the data and the fitted policy of one run."
            )
    return tuple(titles)


def describe_knowledge(policy: Policy, method: LWGR) -> dict[str, Any] | None:
    """Return what is needed to build the parts again that the reference does not have; None where there are none."""
    parts, fusion, source = policy.instructions, policy.fusion, policy.source
    if parts is None or fusion is None or source is None:
        return None
    return {
        "context": policy.context, "d_llm": source.d_llm, "instructions": _describe_instructions(parts),
        "fusion": {"n_layers": len(fusion.looks), "heads": fusion.looks[0].heads, "residual": fusion.residual,
                   "gate": fusion.gate is not None},
        "source": _describe_source(source, method),
    }  # fmt: skip


def _describe_instructions(parts: AnyInstructions) -> dict[str, Any]:
    if isinstance(parts, GlobalInstructions):
        return {"kind": "global", "n_books": len(parts.free)}
    if isinstance(parts, PromptInstructions):
        return {"kind": "prompt", "n_books": len(parts.tokens)}
    return {
        "kind": "books", "n_books": parts.n_books, "n_codewords": parts.n_codewords, "d_code": parts.words.shape[2],
        "temperature": parts.temperature, "quantise": parts.quantise,
    }  # fmt: skip


def _describe_source(source: object, method: LWGR) -> dict[str, Any]:
    if isinstance(source, TextKnowledge):
        return {"kind": "text"}
    inner = asked_of(source)
    if inner is None:
        raise UserError(f"Knowledge of {type(source).__name__} cannot be saved in a bundle.")
    return {
        "kind": "fixed" if inner is not source else "llm", "llm": inner.model.fingerprint,
        "llm_name": inner.model.source, "order": inner.order, "titles_as": inner.titles_as,
        "n_llm_layers": inner.n_blocks, "max_title_tokens": method.max_title_tokens,
        "text_cache_mib": method.text_cache_mib,
    }  # fmt: skip


def knowledge_tensors(policy: Policy) -> dict[str, Tensor]:
    """Return everything that the reference does not have, and the text vectors where they are the source."""
    tensors = policy.knowledge_tensors()
    if isinstance(policy.source, TextKnowledge):
        tensors[VECTORS] = policy.source.vectors[1:]
    return tensors


def load_parts(path: Path, facts: Facts, d_model: int) -> tuple[AnyInstructions, Fusion, dict[str, Tensor]]:
    """Build instructions and fusion again; no language model is needed.

    Returns:
        Both, and the tensors that belong to the source of knowledge.

    Raises:
        StoreError: The description or a tensor does not fit.
    """
    tensors = store.load_tensors(path)
    groups: dict[str, dict[str, Tensor]] = {"instructions": {}, "fusion": {}, "source_part": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        if name != VECTORS and group not in groups:
            raise StoreError(f"{path} also holds {name!r}. {AGAIN}")
        groups[group if name != VECTORS else "source_part"][rest or name] = value
    try:
        with torch.random.fork_rng(devices=[]):
            instructions = _build_instructions(facts["instructions"], d_model, facts["d_llm"])
            fusion = Fusion(d_model, facts["d_llm"], **facts["fusion"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path} does not fit the description in {RECORD}: {error!r}. {AGAIN}") from error
    load_part(path, instructions, groups["instructions"], "instructions.")
    load_part(path, fusion, groups["fusion"], "fusion.")
    return instructions.eval(), fusion.eval(), groups["source_part"]


def _build_instructions(facts: Facts, d_model: int, d_llm: int) -> AnyInstructions:
    if facts["kind"] == "global":
        return GlobalInstructions(d_llm, facts["n_books"])
    if facts["kind"] == "prompt":
        return PromptInstructions(torch.zeros(facts["n_books"], d_llm))
    names = ("n_books", "n_codewords", "d_code", "temperature", "quantise")
    return Instructions(d_model, d_llm, **{name: facts[name] for name in names})


def load_source(
    path: Path, facts: Facts, tensors: Mapping[str, Tensor], model: Model | None, titles: Sequence[str],
    instructions: AnyInstructions, n_history: int,
) -> LanguageKnowledge | TextKnowledge | FixedKnowledge | None:  # fmt: skip
    """Build the source of knowledge again; None where it is a language model and none is given.

    Raises:
        StoreError: The language model is another one, or a tensor does not fit.
    """
    kind, own = facts["source"]["kind"], dict(tensors)
    if kind == "text":
        vectors = own.pop(VECTORS, None)
        if vectors is None or tuple(vectors.shape) != (len(titles), facts["d_llm"]):
            raise StoreError(f"{path} lacks the text vectors of {len(titles)} items. {AGAIN}")
        text = TextKnowledge(vectors.numpy(), n_history)
        load_part(path, text, own, "source_part.")
        return text.eval()
    if model is None:
        return None
    source = _ask(facts["source"], model, titles)
    if kind == "llm":
        return source
    with torch.random.fork_rng(devices=[]):
        fixed = FixedKnowledge(source)
    fixed.ask(instructions.state_dict()["tokens"].to(model.device))
    load_part(path, fixed, own, "source_part.")
    return fixed.eval()


def _ask(facts: Facts, model: Model, titles: Sequence[str]) -> LanguageKnowledge:
    if model.fingerprint != facts["llm"]:
        raise StoreError(
            f"This bundle's knowledge was learnt with the language model {facts['llm_name']} ({facts['llm'][:6]}); the "
            f"one given is {model.source} ({model.fingerprint[:6]}). Open the model it was learnt with."
        )
    return LanguageKnowledge(
        model, titles, order=facts["order"], titles_as=facts["titles_as"], n_llm_layers=facts["n_llm_layers"],
        max_title_tokens=facts["max_title_tokens"], text_cache_mib=facts["text_cache_mib"],
    )  # fmt: skip
