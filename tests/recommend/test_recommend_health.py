"""The health report: what it counts, and that collapsed or colliding codes are errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from retouch.errors import UserError
from retouch.recommend.health import examine, examine_catalogue, require
from retouch.recommend.rq_kmeans import RQKMeans
from retouch.recommend.tokenise import assign
from retouch.report import Report, to_json


def healthy(n=64):
    """Every pair of eight by eight codes once."""
    return np.stack(np.divmod(np.arange(n), 8), 1)


def test_numbers_worked_by_hand():
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0]])
    found = examine(codes, (2, 2), residual_shares=(0.5, 0.25), texts=("a", "a", "b", "c"))
    first = found.levels[0]
    assert (first.size, first.used, first.largest_share, first.residual_share) == (2, 2, 0.75, 0.5)
    assert first.perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert found.unique_share == 0.75 and found.sharing_share == 0.5 and found.equal_text_share == 0.5
    assert found.group_sizes == {1: 2, 2: 1} and found.nodes == (1, 2, 3) and found.digit == 16
    assert found.purity is None


def test_purity_compares_with_any_two_items():
    codes = np.array([[0], [0], [1], [1]])
    known = ("x",), ("x", "y"), ("y",), ("y",)
    assert examine(codes, (2,), categories=known).purity == pytest.approx(3.0)  # all alike; any two: 4 of 12
    mixed = ("x",), ("y",), ("x",), ("y",)
    assert examine(codes, (2,), categories=mixed).purity == 0.0
    assert any("only 0.00 times likelier" in line for line in examine(codes, (2,), categories=mixed).warnings)
    assert examine(codes, (2,), categories=((), (), ("x",), ())).purity is None


def test_good_codes_pass():
    found = examine(healthy(), (8, 8))
    assert not found.problems and not found.warnings
    require(found)


@pytest.mark.parametrize(
    ("codes", "digit", "said"),
    [
        (np.zeros((64, 2), int), 128, "Level 0 uses 1 of 8 codes"),
        (np.column_stack([np.arange(64) % 8, np.arange(64) % 2]), 128, "Level 1 uses 2 of 8 codes"),
        (np.where(np.arange(800) < 7, np.arange(800), 7)[:, None] % 8 * [1, 1], 1000, "perplexity of 1.1"),
        (np.concatenate([healthy(), healthy()]), 16, "100% of the items share all codes"),
        (np.concatenate([healthy(), np.zeros((16, 2), int)]), 16, "17 items share all codes, and .* only 16 apart"),
    ],
    ids=["equal rows", "half a level", "one cluster", "collisions", "digit"],
)
def test_unfit_codes_fail_loudly(codes, digit, said):
    found = examine(codes, (8, 8), digit=digit)
    with pytest.raises(UserError, match=said) as error:
        require(found)
    assert error.value.exit_code == 2
    require(found, force=True)


def test_a_tokeniser_on_equal_rows_is_found_out():
    x = np.ones((80, 6), np.float32)
    fitted = RQKMeans(codes=8).fit(x)
    catalogue = assign(fitted.encode(x), fitted.sizes, np.arange(80), [str(i) for i in range(80)])
    with pytest.raises(UserError, match="the tokeniser collapsed"):
        require(examine_catalogue(catalogue, residual_shares=fitted.residual_shares(x)))


def test_people_and_programs_read_the_same():
    found = examine(healthy(), (8, 8), texts=[str(i) for i in range(64)])
    told = json.loads(json.dumps(found.to_dict()))
    assert told["group_sizes"] == {"1": 64} and told["levels"][1]["perplexity"] == pytest.approx(8)
    tables = to_json(Report("Codes", "", "", tables=found.tables(), environment={}))["tables"]
    assert tables[0]["rows"] == [[0, 8, 8, 8.0, 0.125, None], [1, 8, 8, 8.0, 0.125, None]]
    assert ["items", 64] in tables[1]["rows"] and tables[1]["caption"] == "Nothing stands out."


def test_no_codes_are_refused():
    with pytest.raises(UserError, match="no codes to examine"):
        examine(np.zeros((0, 2), int), (8, 8))
