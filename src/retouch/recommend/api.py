"""From raw interactions to a certified recommender: the stages in order, each kept and reused.

`prepare` reads what every method shares (histories, splits, codes); `fit` trains the reference and the policy and
certifies it. Every stage is found again by the content of what made it, so an interrupted run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import attempts, store
from ..change import versions
from ..errors import StoreError, UserError, unknown
from ..report import Report, Table
from ._fitting import require_watched
from ._seen import own_salt
from .base import Run
from .bundle import save_bundle
from .certificate import Certified, Terms, certify
from .data import Interactions
from .evaluate import Evaluation, compare, evaluate
from .evidence import collect, require_kept, slice_key
from .generator_fit import fit_reference
from .health import Health, examine_catalogue, require
from .lwgr import LWGR
from .nearline import trigger
from .prototypes import Prototypes, fit_prototypes, on_prototypes
from .reference import ReferenceSettings
from .scorer import GenerativeScorer
from .splits import Samples, Splits, split
from .tokenise import Catalogue, first_seen, load_tokeniser, tokenise
from .vectors import load_vectors, text_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import Model
    from .fitted import PolicyScorer
    from .generator import Generator
    from .tokenise import Fitted

__all__ = [
    "LAGS",
    "STALE",
    "TOKENISERS",
    "Made",
    "Prepared",
    "Tokens",
    "check_device",
    "fit",
    "look",
    "prepare",
    "rungs",
]

STALE = 8
"""Items by which knowledge may be too old on the rung ``stale``."""
LAGS: Mapping[str, int] = {"fresh": trigger(10**9), "stale": STALE}
"""Items by which knowledge is too old where it is certified; on ``fresh`` fewer for short histories, as `trigger` says."""
TOKENISERS = ("rq_kmeans", "rq_vae", "opq")
_TOKENISER, _CATALOGUE, _PROTOTYPES = "tokeniser.safetensors", "catalogue.safetensors", "prototypes.safetensors"


@dataclass(frozen=True)
class Tokens:
    """How items get their codes.

    Attributes:
        tokeniser: One of `TOKENISERS`.
        codes: Codes of a level; by default 256, or 64 below 3,000 items.
        encoder: Turns texts into vectors: a bundled name, a folder, or a ``.npy`` file of your own vectors.
        force: Go on with codes that collapsed.
    """

    tokeniser: str = "rq_kmeans"
    codes: int | None = None
    encoder: str = "minilm"
    force: bool = False


@dataclass(frozen=True, eq=False)
class Prepared:
    """What all methods share.

    Attributes:
        data: Histories and items.
        splits: Whose targets are for what.
        tokeniser: The fitted tokeniser, for later items.
        catalogue: The items' codes.
        health: What was found of the codes.
        folder: Where stages are kept.
    """

    data: Interactions
    splits: Splits
    tokeniser: Fitted
    catalogue: Catalogue
    health: Health
    folder: Path


@dataclass(frozen=True, eq=False)
class Made:
    """A recommender with knowledge, its reference, and the proof.

    Attributes:
        prepared: What it was made from.
        settings: Of all stages, as plain values.
        reference: The recommender without knowledge.
        policy: The recommender with knowledge.
        certified: The certificate.
        evaluations: By name what was measured on test: ``reference``, ``policy``.
        prototypes: What stands in for the knowledge of users who have no record.
        llm: The language model.
        salt: What users were hashed with; it stays on this machine.
    """

    prepared: Prepared
    settings: Mapping[str, Any]
    reference: Generator
    policy: PolicyScorer
    certified: Certified
    evaluations: Mapping[str, Evaluation]
    prototypes: Prototypes | None = None
    llm: Model | None = None
    salt: str = field(default="", repr=False)

    def save(self, path: str | Path) -> None:
        """Write the bundle that nearline, servers and people open.

        Raises:
            StoreError: The folder cannot be written.
        """
        p = self.prepared
        save_bundle(
            path, data=p.data, splits=p.splits, catalogue=p.catalogue, tokeniser=p.tokeniser, reference=self.reference,
            fitted=self.policy, certificate=self.certified, settings=self.settings, llm=self.llm, prototypes=self.prototypes,
            salt=self.salt,
        )  # fmt: skip

    def report(self, pictures: bool = False) -> Report:
        """Return it all for people and programs; pictures need matplotlib."""
        new, old = self.evaluations["policy"], self.evaluations["reference"]
        tables = (
            _results(self.evaluations),
            compare(new, old),
            self.certified.table(),
            *self.prepared.health.tables(),
        )
        numbers = {
            "settings": dict(self.settings), "certificate": self.certified.to_dict(),
            "evaluations": {n: e.to_json() for n, e in self.evaluations.items()}, "health": self.prepared.health.to_dict(),
        }  # fmt: skip
        title, model = f"Recommending {self.prepared.data.name}", str(self.settings["llm"] or "no language model")
        shown = _pictures(self) if pictures else ()
        return Report(title, self.certified.sentence(), model, tables, shown, numbers)


def _pictures(made: Made) -> tuple[Any, ...]:
    from .._plots import plot_curve

    history = made.policy.record.get("history") or {}
    curves = {
        f"{column}, {group}": [math.nan if v < 0 else v for v in columns[column]]  # below 0: the group was absent
        for group, columns in history.items()
        for column in ("price", "smoothed")
    }
    n_steps = len(next(iter(curves.values()), ()))
    if n_steps < 2:
        return ()
    steps = [float(i) for i in range(n_steps)]
    return (plot_curve(steps, curves, "step", "price, smoothed harm", "The constraint while training"),)


def _results(evaluations: Mapping[str, Evaluation]) -> Table:
    names = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "coverage@10")
    rows = tuple((name, *(e.numbers.get(m) for m in names)) for name, e in evaluations.items())
    return Table("Test targets, full ranking", ("", *names), rows)


# ---------------------------------------------------------------- what all methods share


def prepare(
    data: Interactions,
    folder: str | Path | None = None,
    *,
    tokens: Tokens | None = None,
    how: Literal["leave-one-out", "time"] = "leave-one-out",
    holdout: Literal["users", "targets"] = "users",
    seed: int = 0,
) -> Prepared:
    """Split the users, and give every item its codes.

    Args:
        data: From `data.load`.
        folder: Where stages are kept; by default in the cache, under the data's fingerprint.
        tokens: How items get codes.
        how: ``leave-one-out`` or ``time``.
        holdout: What is kept for the certificate: whole ``users``, or their ``targets``.
        seed: Of the roles and the codes.

    Raises:
        UserError: The codes collapsed, or the data are too small to split.
    """
    tokens = tokens or Tokens()
    if tokens.tokeniser not in TOKENISERS:
        raise unknown("tokeniser", tokens.tokeniser, TOKENISERS)
    place = Path(folder) if folder else store.cache_dir() / "recommend" / data.fingerprint[:16]
    splits = split(data, how, holdout, seed)
    first = first_seen(data, splits)
    vectors = _vectors(data, tokens)
    key = store.key(
        data=data.fingerprint, how=how, holdout=holdout, seed=seed, tokens=vars(tokens) | {"force": None}, format=1,
        vectors=store.key(digest=_digest(vectors)),
    )  # fmt: skip
    tokeniser, catalogue = _codes(place / f"tokens-{key[:12]}", tokens, vectors, first, data, seed)
    categories = [item.categories for item in data.items]
    health = examine_catalogue(
        catalogue, residual_shares=tokeniser.residual_shares(vectors), texts=[i.text for i in data.items],
        categories=categories if any(categories) else None,
    )  # fmt: skip
    require(health, tokens.force)
    return Prepared(data, splits, tokeniser, catalogue, health, place)


def _vectors(data: Interactions, tokens: Tokens) -> NDArray[np.float32]:
    if tokens.encoder.endswith(".npy"):
        return load_vectors(tokens.encoder, len(data.items))
    return text_vectors([item.text or item.title or item.id for item in data.items], tokens.encoder)


def _digest(vectors: NDArray[np.float32]) -> str:
    import torch

    return store.digest_tensor(torch.from_numpy(vectors))


def _codes(
    place: Path, tokens: Tokens, vectors: NDArray[np.float32], first: NDArray[np.float64], data: Interactions, seed: int
) -> tuple[Fitted, Catalogue]:
    try:
        store.check_folder(place)
        return load_tokeniser(place / _TOKENISER), Catalogue.load(place / _CATALOGUE)
    except StoreError:
        pass  # not there, or not whole: made anew
    from .opq import OPQ
    from .rq_kmeans import RQKMeans
    from .rq_vae import RQVAE

    kinds: dict[str, Any] = {"rq_kmeans": RQKMeans, "rq_vae": RQVAE, "opq": OPQ}
    settings = kinds[tokens.tokeniser](codes=tokens.codes)
    fitted, catalogue = tokenise(settings, vectors, first, [item.id for item in data.items], seed)
    with store.writing(place) as new:
        fitted.save(new / _TOKENISER)
        catalogue.save(new / _CATALOGUE)
    return fitted, catalogue


# ---------------------------------------------------------------- the main job


def fit(
    prepared: Prepared,
    method: LWGR | None = None,
    reference: ReferenceSettings | None = None,
    *,
    llm: Model | None = None,
    device: str = "cpu",
    n_history: int = 20,
    compared: Mapping[str, Any] | None = None,
) -> Made:
    """Train the reference and the policy, and certify the policy on the users who were kept for it.

    Args:
        prepared: From `prepare`.
        method: The policy's settings.
        reference: The reference's settings.
        llm: The language model; None only where the method asks none.
        device: Where to compute.
        n_history: How many of the latest items are read.
        compared: Fitted scorers whose harm is told beside: the reference trained on, or another seed of it.

    Returns:
        Everything, whether or not the certificate holds: see `certificate.require`.

    Raises:
        UserError: There is no such device, or the method lacks something, such as the language model.
    """
    check_device(device)
    method, reference = method or LWGR(), reference or ReferenceSettings()
    p = prepared
    require_kept(p.splits)
    require_watched(method, p.data, p.splits)
    generator = fit_reference(
        p.data, p.splits, p.catalogue, reference, p.folder, n_history=n_history, device=device
    ).eval()
    run = Run(p.data, p.splits, p.catalogue, p.folder, generator, llm, n_history, device)
    policy = method.fit(run)
    base = GenerativeScorer(generator, p.catalogue, p.data, beams=method.beams, full=method.full)
    prototypes = _prototypes(p, policy)
    served = rungs(policy) | {"prototype": on_prototypes(policy, prototypes)}
    settled = method.settled()
    number, salt = look(p, policy), own_salt()  # counted before it happens
    found = collect(p.data, p.splits, base, served, len(p.catalogue.sizes), compared=compared or {}, salt=salt)
    terms = Terms(settled.max_harm, settled.slack, seed=p.splits.seed, attempt=number)
    about = {
        "data": p.data.fingerprint, "holdout": p.splits.holdout, "how": p.splits.how, "roles_seed": p.splits.seed,
        "versions": versions(), "llm": None if llm is None else llm.fingerprint, "lags": dict(LAGS),
    }  # fmt: skip
    settings = {
        "method": {"name": method.name, **method.to_dict()}, "reference": reference.to_dict(), "n_history": n_history,
        "llm": None if llm is None else llm.source, "looks": terms.attempt,
    }  # fmt: skip
    both = {"reference": base, "policy": policy}
    evaluations = {name: evaluate(scorer, p.data, p.splits, n_history=n_history) for name, scorer in both.items()}
    return Made(p, settings, generator, policy, certify(found, terms, about), evaluations, prototypes, llm, salt)


def _prototypes(p: Prepared, policy: PolicyScorer) -> Prototypes:
    """Find the policy's prototypes again, or ask the language model about the training users."""
    place = p.folder / f"prototypes-{policy.record['key'][:12]}"
    try:
        store.check_folder(place)
        return Prototypes.load(place / _PROTOTYPES)
    except StoreError:
        pass
    made = fit_prototypes(policy, p.splits)
    with store.writing(place) as new:
        made.save(new / _PROTOTYPES)
    return made


def look(p: Prepared, policy: PolicyScorer) -> int:
    """Count a look at the certificate's users; the same policy, measured again in the same way, is the same look.

    All looks at the same data count together, whatever the roles of its users: slices of other seeds overlap.
    """
    key = slice_key(p.data, p.splits)
    how = [policy.beams, policy.full, policy.filter_seen]
    return attempts.count(store.key(policy=policy.record["key"], how=how, slice=key), p.data.fingerprint)


def check_device(device: str) -> None:
    """Refuse a device that is not here, before any work.

    Raises:
        UserError: It is neither ``cpu`` nor a GPU that torch finds.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device {device!r} cannot be used: {str(error).splitlines()[0]} Give cpu, or cuda where torch "
                        "finds a GPU.") from error  # fmt: skip


def rungs(policy: PolicyScorer) -> dict[str, PolicyScorer]:
    """Return the policy as users are served at worst: with the oldest knowledge that counts as fresh, and as stale."""
    assert policy.policy is not None and policy.asked is not None
    source, asked = policy.policy, policy.asked

    def nearly_due(samples: Samples) -> Tensor:
        lags = np.array([trigger(int(cut)) for cut in samples.cuts], np.int64)
        return source.residuals(asked.windows(samples, lags))

    return {"fresh": replace(policy, residuals=nearly_due), "stale": policy.at_lag(STALE)}
