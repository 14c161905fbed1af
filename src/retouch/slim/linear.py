"""Linear: no encoder at all when a text is answered, the floor that every other method has to clear."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .. import store
from ..model import Model
from ..progress import track
from ..settings import setting
from ._bag import Bag, MeanOfVectors, TfIdf
from ._config import SlimConfig
from .base import SlimMethod
from .data import quality
from .network import SlimForSequenceClassification, from_encoder
from .presets import TrainingSettings

if TYPE_CHECKING:
    from .encoded import Encoded
    from .stages import Fitted, Run, Trained

__all__ = ["Linear", "token_vectors"]

Floats = NDArray[np.float64]
STRENGTHS = tuple(10.0**power for power in range(1, -9, -1))
"""Strengths of the penalty that are tried, the strongest first."""
_SIF = 1e-4
_AT_ONCE = 512


@dataclass(frozen=True)
class Linear(TrainingSettings, SlimMethod):
    """Classify a text by its tokens alone, whatever their order: logistic regression, for numbers ridge regression.

    ``static`` runs each token of the vocabulary once through the encoder, alone, and keeps its vector, with fewer
    dimensions and frequent tokens made shorter; a text is the mean of its tokens' vectors. ``tfidf`` counts tokens and
    knows no encoder. The strength of the penalty is chosen on the validation set. The original is fine-tuned all the
    same, for the comparison.

    Source: model2vec (MinishLab) for static vectors; Arora et al., A Simple but Tough-to-Beat Baseline for Sentence
        Embeddings (ICLR 2017) for their weights; Sparck Jones (1972) for tfidf.

    Use when: always, once: if it is within two points, nothing needs to be made slim.

    Known problems: word order, negation and which of two texts a word stands in are lost, so that pairs of texts are
        answered badly. ``zipf`` takes a vocabulary to be sorted by frequency, which word pieces only nearly are.

    Shapes: static vectors (vocab, n_dimensions) and a map (classes, n_dimensions); tfidf a map (vocab, classes).

    Example:
        >>> Linear(features="tfidf").n_dimensions
        256
    """

    features: Literal["static", "tfidf"] = setting("static", "What a text is turned into.")
    n_dimensions: int = setting(256, "Dimensions of static vectors; at most d_model.", ge=1)
    weighting: Literal["zipf", "counts", "none"] = setting(
        "zipf", "How common a token is: by its place in the vocabulary, or by counts of the training set."
    )

    def fit(self, run: Run) -> Fitted:
        """Make the vectors and solve the regression.

        Raises:
            UserError: Task, model and plan do not fit each other.
        """
        from .stages import Trained

        original = run.original()
        begun = time.monotonic()
        network, facts = self._tfidf(run, original) if self.features == "tfidf" else self._static(run, original)
        record = {"stage": "linear", "cuts": [], **facts, "seconds": time.monotonic() - begun}
        run.history.append(record)
        settings = {name: getattr(self, name) for name in ("features", "n_dimensions", "weighting")}
        key = store.key(model=run.model_key, data=run.data_key, settings=settings)
        shown: Any = network.eval()
        return run.fitted(Trained(shown, key, record), original)

    def _static(self, run: Run, original: Trained) -> tuple[Bag, dict[str, Any]]:
        counted = _counted(run)
        raw = token_vectors(_encoder(run, original), run.tokenizer)
        vectors = np.zeros((len(raw), min(self.n_dimensions, raw.shape[1])))
        vectors[counted] = _fewer(raw[counted], self.n_dimensions) * self._weights(run, counted)[:, None]

        def features(split: str) -> Floats:
            counts = _counts(run.encoded(split), counted)
            mean: Floats = counts @ vectors / np.maximum(counts.sum(1), 1)[:, None]
            return mean

        train = features("train")
        scale = float(np.sqrt((train**2).mean())) or 1.0
        weight, bias, facts = _solved(run, train / scale, features("valid") / scale)
        given = (torch.from_numpy(a).float() for a in (vectors, np.ascontiguousarray(weight.T) / scale, bias))
        return MeanOfVectors(_config(run), run.plan.size, torch.from_numpy(counted), *given), facts

    def _weights(self, run: Run, counted: NDArray[np.bool_]) -> Floats:
        """Return the weight of each token that counts: the smaller, the more common it is."""
        if self.weighting == "none":
            return np.ones(int(counted.sum()))
        ranks = np.arange(2.0, 2 + counted.sum())
        common = 1 / ranks if self.weighting == "zipf" else run.counts.numpy()[counted] + 1.0
        return np.asarray(_SIF / (_SIF + common / common.sum()))

    def _tfidf(self, run: Run, original: Trained) -> tuple[Bag, dict[str, Any]]:
        counted = _counted(run)
        found = (_counts(run.encoded("train"), counted) > 0).sum(0)
        rarity = np.log((1 + len(run.task.train)) / (1 + np.asarray(found).ravel())) + 1

        def features(split: str) -> Any:
            rows = _counts(run.encoded(split), counted).multiply(rarity).tocsr()
            lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
            return rows.multiply((1 / np.maximum(lengths, 1e-12))[:, None]).tocsr()

        weight, bias, facts = _solved(run, features("train"), features("valid"))
        given = (torch.from_numpy(a).float() for a in (rarity, weight, bias))
        return TfIdf(_config(run), run.plan.size, torch.from_numpy(counted), *given), facts


# ---------------------------------------------------------------- tokens


def token_vectors(network: SlimForSequenceClassification, tokenizer: Any) -> Floats:
    """Return what an encoder makes of each token of its vocabulary, which stands alone between the special tokens.

    Shapes: (vocab, d_model): the mean over all positions of the last block's output.

    Source: model2vec (MinishLab).

    Args:
        network: In eval mode.
        tokenizer: Its tokenizer, which says what stands around a text.
    """
    around = list(tokenizer("").input_ids)
    before, after = torch.tensor(around[:1], dtype=torch.long), torch.tensor(around[1:], dtype=torch.long)
    found = []
    with torch.no_grad():
        for ids in track(torch.split(torch.arange(network.size.vocab), _AT_ONCE), "token vectors"):
            row = torch.cat([before.expand(len(ids), -1), ids[:, None], after.expand(len(ids), -1)], 1)
            row = row.to(network.device)
            found.append(network.levels(row, torch.ones_like(row), exits=()).hidden[-1].mean(1).double().cpu())
    vectors: Floats = torch.cat(found).numpy()
    return vectors


def _encoder(run: Run, original: Trained) -> SlimForSequenceClassification:
    """Return the encoder as it was opened; where a classifier was, that one."""
    if not isinstance(run.model, Model):
        return original.network
    with torch.random.fork_rng(devices=[]):  # the exit's fresh weights are not used
        network = from_encoder(run.model, run.task.labels, exits=[], pooler=None)
    placed: SlimForSequenceClassification = network.to(run.accelerator.device).eval()
    return placed


def _fewer(vectors: Floats, n: int) -> Floats:
    """Project vectors on their principal components."""
    centred = vectors - vectors.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    best = directions[:, ::-1][:, :n]
    signs = np.sign(best[np.abs(best).argmax(0), np.arange(best.shape[1])])  # a direction's sign is anyone's choice
    return np.asarray(centred @ (best * signs))


def _counted(run: Run) -> NDArray[np.bool_]:
    """Say which tokens count: all but the special ones."""
    counted = np.ones(run.plan.size.vocab, dtype=np.bool_)
    counted[[i for i in run.tokenizer.all_special_ids if i < len(counted)]] = False
    return counted


def _counts(encoded: Encoded, counted: NDArray[np.bool_]) -> Any:
    """Count the tokens of each text: a sparse matrix (texts, vocab)."""
    from scipy.sparse import csr_array

    ids = np.fromiter((i for row in encoded.ids for i in row), dtype=np.int64)
    bounds = np.cumsum([0, *encoded.lengths])
    found = csr_array((counted[ids].astype(np.float64), ids, bounds), shape=(len(encoded), len(counted)))
    found.sum_duplicates()
    found.eliminate_zeros()
    return found


# ---------------------------------------------------------------- the regression


def _config(run: Run) -> SlimConfig:
    labels = run.task.labels
    if labels is None:
        y = np.asarray(run.encoded("train").labels, dtype=float)
        return SlimConfig(exits=[0], task="regression", target_mean=float(y.mean()), target_scale=float(y.std()))
    names = {i: str(name) for i, name in enumerate(labels)}
    return SlimConfig(exits=[0], id2label=names, label2id={name: i for i, name in names.items()})


def _solved(run: Run, train: Any, valid: Any) -> tuple[Floats, Floats, dict[str, Any]]:
    """Solve for each strength, from the solution before, and keep the one that is best on the validation set.

    Of equal qualities the smaller loss counts, of equal losses the stronger penalty.

    Returns:
        The weights (features, classes), the biases (classes,), and the record.
    """
    classes = run.plan.size.classes
    config = _config(run)
    y, shown = (np.asarray(run.encoded(split).labels) for split in ("train", "valid"))
    standard: list[NDArray[Any]] = [(a - config.target_mean) / config.target_scale for a in (y, shown)]
    loss = _squares if run.task.labels is None else _cross_entropy
    targets = standard if run.task.labels is None else [y, shown]
    start = np.zeros((train.shape[1] + 1) * classes)
    best, checks = None, []
    for strength in STRENGTHS:
        start = _minimised(train, targets[0], loss, strength, start)
        weight, bias = _parted(start, classes)
        z = valid @ weight + bias
        at = quality(run.task.metric, z, shown, classes if run.task.labels else None), -loss(z, targets[1])[0]
        checks.append({"strength": strength, "mean": at[0], "loss": -at[1]})
        if best is None or at > best[0]:
            best = at, weight, bias, strength
    assert best is not None
    return best[1], best[2], {"checks": checks, "best": best[0][0], "strength": best[3]}


def _minimised(
    features: Any, y: NDArray[Any], loss: Callable[[Floats, NDArray[Any]], tuple[float, Floats]], strength: float,
    start: Floats,
) -> Floats:  # fmt: skip
    """Minimise the mean loss plus half the strength times the weights' squares, by L-BFGS; biases are free."""
    from scipy.optimize import minimize

    classes = len(start) // (features.shape[1] + 1)
    turned = features.T.tocsr() if hasattr(features, "tocsr") else features.T

    def at(flat: Floats) -> tuple[float, Floats]:
        weight, bias = _parted(flat, classes)
        value, slope = loss(features @ weight + bias, y)
        down = turned @ slope + strength * weight
        return value + strength / 2 * float((weight**2).sum()), np.concatenate([down.ravel(), slope.sum(0)])

    found = minimize(at, start, jac=True, method="L-BFGS-B", options={"maxiter": 300, "gtol": 1e-7, "ftol": 1e-12})
    return np.asarray(found.x, dtype=np.float64)


def _parted(flat: Floats, classes: int) -> tuple[Floats, Floats]:
    return flat[:-classes].reshape(-1, classes), flat[-classes:]


def _cross_entropy(z: Floats, y: NDArray[Any]) -> tuple[float, Floats]:
    """Return the mean cross-entropy and its slope in the logits."""
    shifted = z - z.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(y))
    slope = np.exp(log_p)
    slope[rows, y] -= 1
    return -float(log_p[rows, y].mean()), slope / len(y)


def _squares(z: Floats, y: NDArray[Any]) -> tuple[float, Floats]:
    """Return half the mean squared error and its slope in the answers."""
    off = z - y[:, None]
    return float((off**2).mean()) / 2, off / len(y)
