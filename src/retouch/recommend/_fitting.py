"""From settings and a run to a fitted policy: build the parts, prepare what is computed once, train."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import checkpoint, store
from ..bound import upper_bound
from ..errors import UserError
from ..model import Model
from ._adaptor import FixedKnowledge
from ._draws import LAGS, Asked, Pool, partners
from ._duality import Duality
from ._plan import Plan, Prices
from ._watch import Watch
from .base import Run
from .fitted import PolicyScorer
from .fusion import Fusion
from .generator_fit import _judges
from .instruction import GlobalInstructions, Instructions, PromptInstructions
from .knowledge import LanguageKnowledge, TextKnowledge
from .policy import Policy
from .splits import Samples
from .vectors import load_vectors, text_vectors

if TYPE_CHECKING:
    from .data import Interactions
    from .generator import Generator
    from .lwgr import LWGR, Settled
    from .splits import Splits

__all__ = ["build", "fit_policy", "require_watched"]

AnySource = LanguageKnowledge | TextKnowledge | FixedKnowledge
_FORMAT = 2
_BEGIN_ROWS = 20_000
_SMALL, _LARGE = 2_000, 1_000_000
"""Numbers of users that decide how many words a book has."""
_SPREAD_ROWS = 512
"""Histories whose knowledge says how knowledge is spread over users."""
_PRICED_STEPS, _HASTE = 800, 8.0
"""A training of fewer steps moves its prices faster, but never by more than the second: they would only swing."""


def fit_policy(method: LWGR, run: Run) -> PolicyScorer:
    """Train a policy as the method says; see `retouch.recommend.lwgr.LWGR.fit`."""
    settled, reference, catalogue = method.settled(), run.needs_reference().eval(), run.needs_catalogue()
    require_watched(method, run.data, run.splits)
    devices = [torch.device(run.device)] if run.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):  # the caller's generators are left as they were
        torch.manual_seed(method.seed)
        pool = _pool(method, settled, run)
        own = Asked(run.data, run.splits, reference.n_history)
        other = Asked(run.data, run.splits, reference.n_history, partners(run.splits, run.data.lengths, method.seed))
        asked = other if method.knowledge == "shuffled" else own
        judged = other if method.knowledge.startswith("shuffled") else own
        policy = build(method, run)
        _begin(policy, pool, own, method.seed)
        judges = _judges(run.splits.valid, method.n_validation, method.seed)
        watched = pool.samples if settled.constraint == "batch" else run.splits.constraint
        key = _key(method, run, reference)
        place = None if run.folder is None else run.folder / f"{method.name}-{key[:12]}"
        training = Duality(
            policy, _plan(method, settled, run, pool), pool, asked,
            Watch(watched, reference, run.data, catalogue, method.harm, settled.slack),
            Watch(judges, reference, run.data, catalogue, method.harm, settled.slack),
            catalogue, place, key, judged,
        )  # fmt: skip
        _warn_early(training, settled, run)
        if not _is_finished(training):
            _prepare(policy, pool, asked, judged, run, judges, method.seed)
        torch.manual_seed(method.seed + 1)  # what was drawn while preparing decides nothing
        at = training.run()
    record = {"key": key, "settings": method.to_dict(), "settled": asdict(settled), **asdict(at)}
    how = {"beams": method.beams, "full": method.full, "filter_seen": method.filter_seen}
    return PolicyScorer.of(policy, judged, record | {"history": training.history()}, catalogue=catalogue, **how)


# ---------------------------------------------------------------- parts


def build(method: LWGR, run: Run) -> Policy:
    """Build an untrained policy; where knowledge is added from zero on, it equals the reference."""
    settled, reference = method.settled(), run.needs_reference()
    if method.knowledge == "none":
        return Policy(reference, None, None, None).to(run.device)
    source = _source(method, settled, run, reference)
    instructions = _instructions(method, run, reference, source)
    fusion = Fusion(
        reference.size.d_model, source.d_llm, n_layers=settled.fusion_layers, residual=settled.residual,
        gate=settled.gate,
    )  # fmt: skip
    return Policy(reference, instructions, fusion, source, settled.context).to(run.device)


def _source(method: LWGR, settled: Settled, run: Run, reference: Generator) -> AnySource:
    if method.knowledge == "text":
        return TextKnowledge(_vectors(method, run), reference.n_history)
    source = LanguageKnowledge(
        run.needs_model(), _titles(method, run), order=settled.order, titles_as=method.titles,
        n_llm_layers=method.n_llm_layers, max_title_tokens=method.max_title_tokens,
        text_cache_mib=method.text_cache_mib,
    )  # fmt: skip
    if method.instruction == "prompt" and settled.order == "prefix":
        fixed = FixedKnowledge(source)
        fixed.ask(source.prompt(method.prompt))
        return fixed
    return source


def _vectors(method: LWGR, run: Run) -> NDArray[np.float32]:
    if method.text_vectors:
        return load_vectors(method.text_vectors, run.data.n_items)
    return text_vectors([item.text if item.text.strip() else item.id for item in run.data.items])


def _titles(method: LWGR, run: Run) -> list[str]:
    titles = [getattr(item, method.llm_text) or item.title or item.id for item in run.data.items]
    if method.titles_shuffled:
        order = np.random.default_rng((method.seed, 78)).permutation(len(titles))
        titles = [titles[i] for i in order]
    return titles


def _instructions(
    method: LWGR, run: Run, reference: Generator, source: AnySource
) -> Instructions | GlobalInstructions | PromptInstructions:
    if method.instruction == "global":
        return GlobalInstructions(source.d_llm, method.n_books, source.rms)
    if method.instruction == "prompt":
        return PromptInstructions(_prompt_tokens(method, run.needs_model()))
    return Instructions(
        reference.size.d_model, source.d_llm, n_books=method.n_books, n_codewords=_codewords(method, run),
        d_code=method.d_code, temperature=method.temperature, quantise=method.instruction == "codebooks",
        rms=source.rms,
    )  # fmt: skip


def _prompt_tokens(method: LWGR, model: Model) -> Tensor:
    network: Any = model.network
    ids = model.tokenizer(method.prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        rows: Tensor = network.get_input_embeddings()(torch.tensor(ids, device=model.device))
    return rows


def _codewords(method: LWGR, run: Run) -> int:
    if method.n_codewords is not None:
        return method.n_codewords
    return 16 if run.data.n_users < _SMALL else 256 if run.data.n_users > _LARGE else 64


def require_watched(method: LWGR, data: Interactions, splits: Splits) -> None:
    """Say before any work that the constraint has nobody to watch.

    Raises:
        UserError: No user is kept back for the constraint, and the method watches such users.
    """
    if method.settled().constraint in ("slice", "fixed") and not len(splits.constraint):
        raise UserError(
            f"None of the {data.n_users} users of {data.name} is kept back for the constraint (a tenth is, by a "
            f"hash of their ids with seed {splits.seed}). Give more users, split them with another seed, or set "
            "constraint='batch' or 'none'."
        )


def _pool(method: LWGR, settled: Settled, run: Run) -> Pool:
    """Draw once which targets a language model is asked for; without one, all are."""
    n_cuts = 0 if method.knowledge in ("none", "text") else method.cuts_pool
    others = settled.knowledge_dropout > 0  # they would be trained without knowledge
    n_history = run.needs_reference().n_history
    return Pool(run.splits.train, n_history, n_cuts, settled.lagged, method.seed, others)


def _begin(policy: Policy, pool: Pool, asked: Asked, seed: int) -> None:
    """Measure the states of training users, and place the words of the books among them."""
    if not isinstance(policy.instructions, Instructions):
        return
    rows = np.random.default_rng((seed, 14)).permutation(len(pool))[:_BEGIN_ROWS]
    seen = asked.windows(pool.samples.take(np.sort(rows)))
    policy.eval()
    with torch.no_grad():
        states = [policy.state(torch.from_numpy(seen[i : i + 1024])) for i in range(0, len(seen), 1024)]
    policy.instructions.begin(torch.cat(states), seed)


# ---------------------------------------------------------------- the training


def _plan(method: LWGR, settled: Settled, run: Run, pool: Pool) -> Plan:
    cuts = method.cuts_per_epoch or (8 if run.data.n_users < _SMALL else 1)
    unit = settled.max_harm if settled.price_relative else 1.0
    if settled.price_relative and method.price_step is None:
        n_steps = method.n_epochs * -(-pool.size(cuts) // method.batch_size)
        unit /= min(max(1.0, _PRICED_STEPS / n_steps), _HASTE)
    maximum = float("inf") if settled.price_maximum is None else settled.price_maximum
    prices = Prices(
        settled.max_harm, settled.price, settled.price_step / unit, settled.price_damping / unit, maximum,
        0.9 if settled.price_relative else 0.0,
    )  # fmt: skip
    return Plan(
        settled.constraint, prices, settled.choice, method.batch_size, settled.n_alone, method.n_epochs,
        method.patience, cuts, settled.knowledge_dropout, settled.learning_rate, method.learning_rate_new, method.warm_up_steps, method.weight_decay, method.clip,
        method.validation_beams, method.seed,
    )  # fmt: skip


def _warn_early(training: Duality, settled: Settled, run: Run) -> None:
    """Say before training what no training can change: that the users kept back are too few for the limit."""
    n = len(np.unique(run.splits.certificate.users))
    if settled.choice == "feasible" and n and (least := upper_bound(np.zeros(n))) > settled.max_harm:
        training.note(
            f"A limit of {settled.max_harm:g} cannot be certified with {n} users: even without any harm their bound is "
            f"{least:.3g}. Raise max_harm, or keep more users back."
        )


def _is_finished(training: Duality) -> bool:
    """Tell whether an earlier call ended this training: then nothing needs to be prepared."""
    found = checkpoint.load(training.place, training.key)
    return found is not None and bool(found[1]["at"]["done"])


def _prepare(policy: Policy, pool: Pool, asked: Asked, judged: Asked, run: Run, judges: Samples, seed: int) -> None:
    """Let the source of knowledge read ahead all histories that the training will ask about, and measure it."""
    if policy.source is None:
        return
    free = pool.samples.take(pool.read & (pool.lags < 0))  # at any lag
    first = asked.windows(pool.samples.take(pool.read), np.maximum(pool.lags[pool.read], 0))
    windows: list[NDArray[np.int32]] = [
        first,
        *(asked.windows(free, lag) for lag in LAGS[0][1:] if pool.lagged),
        asked.windows(run.splits.constraint),
        judged.windows(judges),
    ]
    policy.source.prepare(np.concatenate(windows))
    policy.begin(first[np.random.default_rng(seed).permutation(len(first))[:_SPREAD_ROWS]])


def _key(method: LWGR, run: Run, reference: Generator) -> str:
    """Name everything that decides the trained policy."""
    parts = {n: getattr(run.splits, n) for n in ("train", "valid", "constraint")}
    ignored = {"beams", "full", "filter_seen"}
    uses_model = method.knowledge not in ("none", "text")
    return store.key(
        method=method.name, settings={k: v for k, v in method.to_dict().items() if k not in ignored},
        settled=asdict(method.settled()), data=run.data.fingerprint,
        samples={n: store.digest_tensor(torch.from_numpy(np.stack([p.users, p.cuts]))) for n, p in parts.items()},
        titles=store.key(titles=_titles(method, run)), sizes=list(run.needs_catalogue().sizes),
        codes=store.digest_tensor(reference.codes),
        reference={n: store.digest_tensor(t) for n, t in reference.state_dict().items()},
        model=run.needs_model().fingerprint if uses_model else None, format=_FORMAT,
        vectors=store.sha256_file(method.text_vectors) if method.text_vectors else None,
    )  # fmt: skip
