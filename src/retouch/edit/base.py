"""What every editing method is, and the steps that several of them share.

A method is a frozen dataclass of settings with one job, `plan`: read a model and facts, return a `Change`, alter
nothing. A new one needs its file, its test and a line in the changelog.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar
from weakref import WeakKeyDictionary

import yaml
from torch import Tensor

from .. import linalg, stats, store
from ..anatomy import Anatomy
from ..change import Change, Part
from ..errors import FactError, ModelError, SettingsError
from ..model import Model
from ..settings import Settings, setting
from ..tokens import Bos
from .contexts import Contexts
from .facts import Fact
from .rows import require_subjects

__all__ = [
    "EditMethod",
    "ValueEditMethod",
    "block_at",
    "down",
    "metrics",
    "null_spaces",
    "published",
    "require_decoder",
    "rule",
]

MetricName = Literal["identity", "covariance"]
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditMethod(Settings, ABC):
    """Base of every editing method. Its name is its file's name."""

    keeps_previous: ClassVar[bool] = False
    """Whether `plan` keeps the output at earlier edits' keys."""
    files: ClassVar[tuple[str, ...]] = ()
    """Settings that name a file which is read."""

    seed: int = setting(0, "Seed of everything random.", ge=0)
    faithful: bool = setting(False, "Follow the authors' code where it differs from our default.")

    @property
    def name(self) -> str:
        """The method's name: its file's."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def plan(
        self,
        model: Model,
        facts: Sequence[Fact],
        *,
        previous: Mapping[str, Tensor] | None = None,
        unedited: Model | None = None,
    ) -> Change:
        """Plan one change that makes all facts true; the model is not altered.

        Args:
            model: A decoder.
            facts: What is to become true.
            previous: For each weight the keys (inputs, p) of earlier edits, whose output must stay; used by methods
                with ``keeps_previous``, ignored by the others.
            unedited: The model before any edit, whose statistics are used in a sequence of edits; by default `model`.

        Raises:
            FactError: A fact cannot be used by this method.
            ModelError: The family has no such edit.
        """
        self.ready(model, facts)
        return self.planned(model, facts, previous or {}, unedited or model)

    @abstractmethod
    def planned(self, model: Model, facts: Sequence[Fact], previous: Mapping[str, Tensor], unedited: Model) -> Change:
        """Do what `plan` promises, for a decoder and at least one fact."""

    def decided_by(self) -> dict[str, Any]:
        """Return what decides a plan: the settings, and for files their content instead of their names."""
        named = {name: Path(getattr(self, name)) for name in self.files if getattr(self, name)}
        return self.to_dict() | {name: store.sha256_file(path) for name, path in named.items() if path.is_file()}

    def plan_each(self, model: Model, groups: Sequence[Sequence[Fact]]) -> list[Change]:
        """Plan a change for each group of facts alone, as if the others did not exist."""
        return [self.plan(model, group) for group in groups]

    def blind(self) -> Any:
        """Return this method as it must run where a fact's paraphrases measure it: without making use of them."""
        return self

    def as_published(self, model: Model) -> Any:
        """Return this method with the published settings of this model's row, under ``faithful``.

        Where settings were published for other models only, the method's own stay, and a warning says so.
        """
        if not self.faithful:
            return self
        row = published(self.name, model.anatomy)
        if not row and self.name in _published():
            a = model.anatomy
            _log.warning(
                "%s: no settings were published for this model (%s, %d blocks of width %d, vocabulary %d): its own stand, "
                "the block by the depth.", self.name, a.family, a.n_blocks, a.d_model, a.vocab_size,
            )  # fmt: skip
        fields = type(self).__dataclass_fields__
        untouched = {k: v for k, v in row.items() if k in fields and getattr(self, k) == fields[k].default}
        return replace(self, **untouched)

    def change(self, model: Model, facts: Sequence[Fact], parts: Mapping[str, Part], **more: Any) -> Change:
        """Make a `Change` of this method's parts, with its provenance."""
        return Change(
            self.name,
            model.base_fingerprint,
            parts,
            settings=self.to_dict(),
            facts=tuple(f.to_dict() for f in facts),
            **more,
        )

    def ready(self, model: Model, facts: Sequence[Fact]) -> None:
        """Check what every method needs before any work.

        Raises:
            FactError: The facts cannot be used: see `usable`.
            ModelError: The model is no decoder.
            SettingsError: A setting is empty.
        """
        require_decoder(model, self.name)
        self.usable(facts)

    def usable(self, facts: Sequence[Fact]) -> None:
        """Check what can be checked before a model is opened.

        Raises:
            FactError: There are no facts.
        """
        if not facts:
            raise FactError("There are no facts to edit.")


@dataclass(frozen=True)
class ValueEditMethod(EditMethod):
    """Base of the methods that find a value vector by gradient and write it at a key.

    The fields are the shared settings of that search; see `retouch.edit.value.optimise`.
    """

    files: ClassVar[tuple[str, ...]] = ("text",)
    needs_subject: ClassVar[bool] = True
    """Whether the method writes at the subject's last token."""

    n_steps: int = setting(20, "Steps of the search; N steps make N - 1 updates.", ge=1, le=1000)
    learning_rate: float = setting(0.5, "Adam's step for the value.", gt=0)
    clamp: float = setting(4.0, "Longest value change, in lengths of the value itself.", gt=0)
    kl_factor: float = setting(0.0625, "Weight of the drift of '{subject} is a'.", ge=0)
    weight_decay: float = setting(0.5, "Weight of the value change's own length.", ge=0)
    weight_decay_form: Literal["published", "relative"] = setting(
        "published", "published: |d| / |v|^2; relative: |d|^2 / |v|^2."
    )
    kl_position: Literal["subject", "last"] = setting("subject", "Where the drift of '{subject} is a' is read.")
    stop: Literal["loss", "argmax"] = setting("loss", "When a fact is done: loss small, or target first everywhere.")
    stop_loss: float = setting(0.05, "Loss at which a fact is done (stop = loss).", ge=0)
    min_margin: float = setting(1.0, "Lead of the target in nats at which a fact is done (stop = argmax).", ge=0)
    max_drift: float = setting(
        0.0,
        "Limit on the neighbours' drift in nats, kept by a multiplier during the search in place of kl_factor and "
        "weight_decay; 0: those fixed weights.",
        ge=0,
    )
    n_bystanders: int = setting(12, "Neighbour prompts a fact whose drift is limited (max_drift).", ge=1, le=1000)
    price_step: float = setting(1.0, "How fast the price of drift rises with its relative excess (max_drift).", gt=0)
    contexts: Contexts = setting(
        "memit", "Texts put before the prompt: plain, memit, rome, instruction, both, or a list of your own."
    )
    bos: Bos = setting("tokenizer", "Beginning-of-text token: as the tokenizer does, always, never.")
    n_tokens: int = setting(0, "Tokens read for second moments; 0: the larger of 20 widths and 30,000.", ge=0)
    text: str = setting("", "Text file for second moments; empty: the corpus that ships with Retouch.")
    budget_mib: int = setting(512, "Memory for the search's activations, in MiB.", ge=16)

    def usable(self, facts: Sequence[Fact]) -> None:
        """Check also that there are contexts, and the subjects at which the method writes.

        Raises:
            FactError: There are no facts, or one lacks the subject that is needed.
            SettingsError: `contexts` is an empty list.
        """
        super().usable(facts)
        if not self.contexts:
            raise SettingsError(f"{self.name}: contexts is an empty list. For the bare prompt alone: contexts=plain.")
        if self.needs_subject:
            require_subjects(facts)


def rule(fraction: float, anatomy: Anatomy) -> int:
    """Return the block at a fraction of the depth: r(f) = round(f L)."""
    return min(anatomy.n_blocks - 1, round(fraction * anatomy.n_blocks))


def block_at(wanted: int, fraction: float, anatomy: Anatomy, name: str) -> int:
    """Return the block that a setting asks for, or by the depth rule when it is -1.

    Raises:
        SettingsError: The model has no such block.
    """
    if wanted >= anatomy.n_blocks:
        raise SettingsError(f"{name}: this model has blocks 0 to {anatomy.n_blocks - 1}; got {wanted}.")
    return rule(fraction, anatomy) if wanted < 0 else wanted


def down(block: int) -> str:
    """Name the weight that writes a block's MLP result back."""
    return f"blocks.{block}.mlp.down"


def require_decoder(model: Model, method: str) -> None:
    """Refuse a model that predicts no next token.

    Raises:
        ModelError: The model is an encoder or has no head.
    """
    if model.anatomy.kind != "decoder" or not model.anatomy.has_head:
        raise ModelError(
            f"Method {method!r} edits models that predict the next token; {model.source} is a {model.anatomy.family} "
            f"{model.anatomy.kind}. Open a decoder, e.g. smollm2."
        )


@cache
def _published() -> dict[str, list[dict[str, Any]]]:
    text = (resources.files("retouch") / "data" / "published.yaml").read_text(encoding="utf-8")
    rows: dict[str, list[dict[str, Any]]] = yaml.safe_load(text)
    return rows


def published(method: str, anatomy: Anatomy) -> dict[str, Any]:
    """Return the settings published for this model, known by family, size and vocabulary; empty when there are none."""
    for row in _published().get(method, []):
        same_size = (anatomy.n_blocks, anatomy.d_model) == tuple(row["size"])
        same_words = anatomy.vocab_size in row.get("vocab_size", [anatomy.vocab_size])
        if anatomy.family in row["families"] and same_size and same_words:
            return dict(row["settings"])
    return {}


def metrics(
    model: Model, names: Sequence[str], kind: MetricName, *, text: str = "", n_tokens: int = 0, bos: Bos = "tokenizer"
) -> dict[str, linalg.Identity | linalg.Covariance]:
    """Make the metric of each weight, once for all facts.

    Args:
        model: The model.
        names: Weights.
        kind: ``identity`` needs no statistics; ``covariance`` reads them from the cache or collects them.
        text: A text file; empty for the corpus that ships with Retouch.
        n_tokens: Tokens to read; 0 for the default.
        bos: Beginning-of-text rule.
    """
    if kind == "identity":
        return {n: linalg.Identity() for n in names}

    def make() -> dict[str, linalg.Covariance]:
        moments = stats.collect(model, names, text=text or None, n_tokens=n_tokens or None, bos=bos)
        return {n: linalg.Covariance.from_moment(m.mean) for n, m in moments.items()}

    return dict(_once(model, ("covariance", *names, text, n_tokens, bos), make))


def null_spaces(
    model: Model,
    names: Sequence[str],
    energy: float = 0.02,
    *,
    threshold: float | None = None,
    text: str = "",
    n_tokens: int = 0,
    bos: Bos = "tokenizer",
) -> dict[str, linalg.NullSpace]:
    """Find for each weight the directions that text hardly uses; see `linalg.null_space` and `metrics`."""

    def make() -> dict[str, linalg.NullSpace]:
        moments = stats.collect(model, names, text=text or None, n_tokens=n_tokens or None, bos=bos)
        return {n: linalg.null_space(m.mean, energy, threshold=threshold) for n, m in moments.items()}

    return dict(_once(model, ("nullspace", *names, energy, threshold, text, n_tokens, bos), make))


_MADE: WeakKeyDictionary[Model, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def _once(model: Model, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Factorise once for each model: a sequence of edits asks for the same metrics a thousand times."""
    known = _MADE.setdefault(model, {})
    if key not in known:
        known.clear()  # one set of factors at a time: for a large model they are gigabytes
        known[key] = make()
    found: T = known[key]
    return found
