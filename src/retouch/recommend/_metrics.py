"""The numbers that a server or a nearline writer tells Prometheus; with many workers, of all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from .answers import Answer
from .ladder import Answered

if TYPE_CHECKING:
    from ._nearline import Done

__all__ = ["SHARED", "Metrics", "NearlineMetrics"]

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that names the folder where workers share their numbers; read when Python starts."""

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_AGES = (60.0, 600.0, 3600.0, 21_600.0, 86_400.0, 259_200.0, 604_800.0, 2_419_200.0)
_LAGS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


class Metrics:
    """Count what one server does. Each has a registry of its own, so that two in one process stay apart."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("retouch_requests", "Questions by rung and outcome.", ["rung", "outcome"], registry=own)
        self.seconds = Histogram(
            "retouch_request_seconds", "Time by stage; of a whole batch but for total.", ["stage"], registry=own,
            buckets=_SECONDS,
        )  # fmt: skip
        self.ages = Histogram(
            "retouch_knowledge_age_seconds", "Age of the knowledge that was used.", registry=own, buckets=_AGES
        )
        self.lags = Histogram(
            "retouch_knowledge_lag_items", "Items that the used knowledge did not know.", registry=own, buckets=_LAGS
        )
        self.store_errors = Counter("retouch_store_errors", "Failures of the store.", ["kind"], registry=own)
        self.rejected = Counter("retouch_records_rejected", "Records that did not count.", ["reason"], registry=own)
        self.inexact = Counter("retouch_inexact", "Answers not proved to be the best items.", registry=own)
        self.invalid = Counter("retouch_invalid_items", "Items that must not have been shown: 0.", registry=own)
        self.namespace = Gauge(
            "retouch_namespace_info", "The namespace that is served.", ["namespace"], registry=own,
            multiprocess_mode="livemax",
        )  # fmt: skip

    def answered(self, told: Answered) -> None:
        """Count a batch."""
        for stage, seconds in told.seconds.items():
            self.seconds.labels(stage).observe(seconds)
        for reason, n in told.rejected.items():
            self.rejected.labels(reason).inc(n)
        for kind, n in told.store_errors.items():
            self.store_errors.labels(kind).inc(n)
        self.invalid.inc(told.n_invalid)
        self._answers(told.answers)

    def _answers(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            if not answer.exact:
                self.inexact.inc()
            if answer.knowledge_age_s is not None:
                self.ages.observe(answer.knowledge_age_s)
            if answer.lag is not None:
                self.lags.observe(answer.lag)

    def outcome(self, rung: str, outcome: str, seconds: float | None = None) -> None:
        """Count one question, and how long it took."""
        self.requests.labels(rung, outcome).inc()
        if seconds is not None:
            self.seconds.labels("total").observe(seconds)

    def serving(self, namespace: str, before: str = "") -> None:
        """Tell which namespace is served."""
        if before and before != namespace:
            self.namespace.labels(before).set(0)
        self.namespace.labels(namespace).set(1)

    def text(self) -> bytes:
        """Return the numbers as Prometheus reads them."""
        registry = self.registry
        if SHARED in os.environ:
            _leave_out_dead(Path(os.environ[SHARED]))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        found: bytes = generate_latest(registry)
        return found


def _leave_out_dead(folder: Path) -> None:
    """Drop what workers that were killed last said of the present; what they counted stays."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with suppress(FileNotFoundError):  # another worker did it
                mark_process_dead(pid, str(folder))
        except PermissionError:
            continue


_LONG = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class NearlineMetrics:
    """Count what a nearline writer does."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.users = Counter("retouch_nearline_users", "Users that were looked at.", ["result"], registry=own)
        self.seconds = Histogram("retouch_nearline_seconds", "Time of one look.", registry=own, buckets=_LONG)

    def done(self, done: Done, seconds: float) -> None:
        """Count one look."""
        for result in ("written", "memo", "unchanged", "empty"):
            self.users.labels(result).inc(getattr(done, result))
        self.users.labels("failed").inc(len(done.failed))
        self.seconds.observe(seconds)

    def listen(self, port: int) -> int:
        """Answer Prometheus at a port of this machine, 0 for a free one, until the process ends; return the port."""
        server, _ = start_http_server(port, "127.0.0.1", self.registry)
        return int(server.server_port)
