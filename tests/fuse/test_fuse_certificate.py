"""The bound on each domain's drop holds as often as it says, and trying again is paid for."""

from __future__ import annotations

import numpy as np
import pytest

from retouch.errors import BoundRefused, UserError
from retouch.fuse.certificate import prove


def answers(n: int, broken: int = 0, mended: int = 0) -> tuple[dict, dict]:
    before = np.ones(n, bool)
    before[:mended] = False
    after = np.ones(n, bool)
    after[n - broken :] = False
    return {"news": after}, {"base": {"news": before}}


def test_no_drop_on_enough_questions_holds_and_on_few_is_refused():
    fused, before = answers(300)
    assert prove(fused, before, 0.05).holds
    few = prove(*answers(20), 0.05)
    assert not few.holds
    with pytest.raises(BoundRefused, match=r"Even without any drop \d+ questions"):
        few.require()


def test_what_is_broken_and_what_is_mended_are_told_apart():
    proof = prove(*answers(400, broken=40, mended=40), 0.1)
    d = proof.domains[0]
    assert d.broken == pytest.approx(0.1) and d.mended == pytest.approx(0.1)
    assert d.certificate.mean == pytest.approx(0.0) and d.certificate.upper > 0.02
    assert proof.table().rows[0][0] == "news"


def test_a_large_drop_is_refused_with_the_worst_domain():
    fused = {"news": np.ones(300, bool), "law": np.zeros(300, bool)}
    before = {"base": {"news": np.ones(300, bool), "law": np.ones(300, bool)}}
    with pytest.raises(BoundRefused, match="On law"):
        prove(fused, before, 0.05).require()


def test_more_bounds_and_more_attempts_are_wider():
    fused, before = answers(300, broken=6)
    one = prove(fused, before, 0.1).domains[0].certificate.upper
    again = prove(fused, before, 0.1, attempt=3).domains[0].certificate.upper
    two = prove(fused, {**before, "site": before["base"]}, 0.1).domains[0].certificate.upper
    assert one < two < again


def test_the_bound_covers_the_true_drop():
    draw, misses = np.random.default_rng(0), 0
    for _ in range(200):
        kind = draw.choice(3, 200, p=[0.08, 0.03, 0.89])  # broken, mended, as before
        before = np.where(kind == 1, False, True)
        proof = prove({"a": np.where(kind == 0, False, True)}, {"base": {"a": before}}, 0.5, delta=0.1)
        misses += proof.domains[0].certificate.upper < 0.05
    assert misses <= 0.1 * 200 + 3 * (0.09 * 200) ** 0.5


def test_bad_input_is_named():
    fused, before = answers(10)
    with pytest.raises(UserError, match="at least one reference"):
        prove(fused, {}, 0.1)
    with pytest.raises(UserError, match="has not answered the domain 'law'"):
        prove(fused, {"base": {"law": np.ones(10, bool)}}, 0.1)
    with pytest.raises(UserError, match="10 answers of the fused model, 9"):
        prove(fused, {"base": {"news": np.ones(9, bool)}}, 0.1)
    with pytest.raises(UserError, match="Attempts count from 1"):
        prove(fused, before, 0.1, attempt=0)
