"""The solver against the direct m x m formulas, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retouch.errors import SolveError, UnknownName
from retouch.linalg import (
    Covariance,
    Identity,
    NullSpace,
    Operator,
    Woodbury,
    amplification,
    amplification_bound,
    compress,
    frobenius_norm,
    null_space,
    randomized_svd,
    solve,
    spectral_norm,
)

D, M = 5, 12
inv = torch.linalg.inv


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(m=M, seed=1, spread=1.0):
    """A second moment with eigenvalues from 1 to 10**spread."""
    q = torch.linalg.qr(normal(m, m, seed=seed)).Q
    return q @ torch.diag(torch.logspace(0, spread, m, dtype=torch.float64)) @ q.T


def product(solution):
    return solution.left @ solution.right


def close(a, b, tolerance=1e-10):
    assert (a - b).norm() <= tolerance * max(1.0, float(b.norm()))


eye = torch.eye(M, dtype=torch.float64)
both_sides = pytest.mark.parametrize("n", [1, 4, 20])


# ------------------------------------------------ the rows of the table: dual form = direct form


@both_sides
def test_least_squares_with_a_covariance_is_memit(n):
    k, r, c = normal(M, n), normal(D, n, seed=2), moment()
    metric = Covariance.from_moment(c, eta=0.0).scaled(15.0)
    close(product(solve(k, r, metric, mode="least_squares")), r @ k.T @ inv(15 * c + k @ k.T))


@both_sides
def test_least_squares_with_previous_keys_and_a_floor_is_sequential_memit(n):
    k, r, c, kp = normal(M, n), normal(D, n, seed=2), moment(), normal(M, 7, seed=3)
    metric = Covariance.from_moment(15 * c, eta=0.0, floor=2.0)
    got = solve(k, r, metric, mode="least_squares", keep=kp, keep_weight=0.7)
    close(product(got), r @ k.T @ inv(15 * c + 2 * eye + k @ k.T + 0.7 * kp @ kp.T))


@both_sides
def test_least_squares_in_a_null_space_is_alphaedit(n):
    k, r, kp = normal(M, n), normal(D, n, seed=2), normal(M, 3, seed=3)
    metric = null_space(moment(spread=3.0), threshold=60.0, lam=0.5)
    p = metric.project(eye)
    direct = inv(p @ (k @ k.T + kp @ kp.T) + 0.5 * eye) @ p @ k @ r.T
    close(product(solve(k, r, metric, mode="least_squares", keep=kp)), direct.T)


@both_sides
def test_least_squares_with_the_identity_is_isotropic(n):
    k, r = normal(M, n), normal(D, n, seed=2)
    direct = r @ inv(k.T @ k + 0.3 * torch.eye(n, dtype=torch.float64)) @ k.T
    close(product(solve(k, r, Identity(0.3), mode="least_squares")), direct)


@pytest.mark.parametrize("n", [1, 4])
def test_equality_with_a_covariance_is_emmet_and_for_one_fact_rome(n):
    k, r, c = normal(M, n), normal(D, n, seed=2), moment()
    got = solve(k, r, Covariance.from_moment(c, eta=0.0), mode="equality")
    ci = inv(c)
    close(product(got), r @ inv(k.T @ ci @ k) @ k.T @ ci)
    close(product(got) @ k, r)
    close(got.delivered, torch.ones(n).double())
    assert got.left.shape == (D, n) and got.right.shape == (n, M)


def test_equality_with_a_ridge_matches_its_formula():
    k, r, c = normal(M, 4), normal(D, 4, seed=2), moment()
    g = k.T @ inv(c) @ k
    got = solve(k, r, Covariance.from_moment(c, eta=0.0), mode="equality", ridge=0.1)
    assert got.ridge == pytest.approx(0.1 * float(g.diagonal().mean()))
    close(product(got), r @ inv(g + got.ridge * torch.eye(4).double()) @ k.T @ inv(c))


def test_isotropic_equality_is_the_outer_product():
    k, r = normal(M, 1), normal(D, 1, seed=2)
    close(product(solve(k, r, Identity(7.0), mode="equality")), r @ k.T / (k.T @ k))


def test_equality_with_kept_keys_is_the_constrained_minimum():
    k, r, kp, c = normal(M, 2), normal(D, 2, seed=2), normal(M, 3, seed=3), moment()
    metric = Covariance.from_moment(c, eta=0.0)
    dw = product(solve(k, r, metric, mode="equality", keep=kp))
    close(dw @ k, r)
    close(dw @ kp, torch.zeros(D, 3).double())
    for seed in range(10):  # no other admissible change is cheaper
        free = torch.linalg.qr(torch.cat([k, kp], 1), mode="complete").Q[:, 5:]
        other = dw + normal(D, 7, seed=seed) @ free.T
        assert (dw @ c * dw).sum() <= (other @ c * other).sum()
    again = solve(k, r, metric, mode="equality", keep=torch.cat([kp, kp], 1), keep_weight=9.0)
    close(product(again), dw)


def test_rets_metric_from_parts_equals_the_dense_one():
    k, r, prompts = normal(M, 1), normal(D, 1, seed=2), normal(M, 4, seed=5)
    dense = 100 * prompts @ prompts.T / 4 + 0.1 * eye
    w = inv(dense) @ k / (k.T @ inv(dense) @ k)
    parts = Woodbury.of(0.1, prompts, torch.full((4,), 25.0))
    close(product(solve(k, r, parts, mode="equality")), r @ w.T)


# ------------------------------------------------ metrics


def test_a_covariance_of_c_times_identity_is_isotropic():
    k, r = normal(M, 4), normal(D, 4, seed=2)
    a = solve(k, r, Covariance.from_moment(3.0 * eye, eta=0.0).scaled(5.0), mode="least_squares")
    close(product(a), product(solve(k, r, Identity(15.0), mode="least_squares")))


@given(st.integers(1, 8), st.floats(0.01, 10.0), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_woodbury_equals_the_dense_inverse(rank, scale, seed):
    v, d = normal(M, rank, seed=seed), normal(M, seed=seed + 1).abs() + 0.1
    s = normal(rank, seed=seed + 2).abs()
    dense = scale * (torch.diag(d) + v @ torch.diag(s) @ v.T)
    metric = Woodbury.of(d, v, s).scaled(scale)
    close(metric.apply_inverse(eye), inv(dense), 1e-9)
    values = torch.linalg.eigvalsh(dense)
    assert metric.condition == pytest.approx(float(values[-1] / values[0]), rel=1e-6)


def test_eta_is_relative_to_the_mean_eigenvalue_and_scale_shares_the_factor():
    c = moment()
    metric = Covariance.from_moment(c.float(), eta=0.5)
    close(metric.apply_inverse(eye), inv(c + 0.5 * c.trace() / M * eye), 1e-5)
    assert metric.scaled(3.0).cholesky is metric.cholesky
    close(metric.scaled(3.0).apply_inverse(eye), metric.apply_inverse(eye) / 3)


@pytest.mark.parametrize("m", [40, 600])
def test_condition_of_a_covariance(m):
    assert Covariance.from_moment(moment(m, spread=2.0), eta=0.0).condition == pytest.approx(100, rel=0.05)


def test_projection_is_idempotent_symmetric_and_within_its_energy():
    c = moment(spread=4.0)
    space = null_space(c, energy=0.02)
    p = space.project(eye)
    close(p @ p, p)
    close(p, p.T)
    values = torch.linalg.eigvalsh(c)
    assert values[: space.dimension].sum() <= 0.02 * values.sum() < values[: space.dimension + 1].sum()
    assert float((p @ c).trace()) == pytest.approx(float(values[: space.dimension].sum()))
    assert null_space(c, threshold=float(values[3]) + 1e-9).dimension == 4
    assert space.condition == math.inf


def test_a_larger_energy_never_leaves_fewer_directions():
    c = moment(spread=4.0)
    sizes = [null_space(c, energy=e).dimension for e in (0.001, 0.01, 0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes) and sizes[-1] == M


# ------------------------------------------------ what is known about solutions


def test_solving_one_after_another_equals_solving_at_once():
    k, r = normal(M, 9), normal(D, 9, seed=2)
    metric = Covariance.from_moment(moment(), eta=1e-4).scaled(4.0)
    w = torch.zeros(D, M).double()
    for start, stop in [(0, 3), (3, 4), (4, 9)]:
        missing = r[:, start:stop] - w @ k[:, start:stop]
        w = w + product(solve(k[:, start:stop], missing, metric, mode="least_squares", keep=k[:, :start]))
    close(w, product(solve(k, r, metric, mode="least_squares")), 1e-10)


def test_a_lone_fact_receives_its_share():
    k, r = normal(M, 1), normal(D, 1, seed=2)
    metric = Covariance.from_moment(moment(), eta=0.0).scaled(2.0)
    a = float(k.T @ metric.apply_inverse(k))
    got = solve(k, r, metric, mode="least_squares")
    assert float(got.delivered[0]) == pytest.approx(a / (1 + a))
    close(product(got) @ k, r * a / (1 + a))


def test_identical_keys_deliver_one_nth_of_each_residual():
    n = 4
    k = normal(M, 1).expand(M, n)
    r = torch.linalg.qr(normal(D, n, seed=2)).Q
    metric = Covariance.from_moment(moment(), eta=0.0).scaled(1e-8)
    got = solve(k, r, metric, mode="least_squares")
    close(product(got) @ k[:, :1], r.mean(1, keepdim=True), 1e-6)
    close(got.delivered, torch.full((n,), 1 / n).double(), 1e-6)


@given(st.integers(0, 999), st.floats(0.1, 4.0))
@settings(max_examples=40, deadline=None)
def test_the_isotropic_write_is_the_smallest_and_amplification_is_bounded(seed, spread):
    k, r, metric = normal(M, 1, seed=seed), normal(D, 1, seed=2), Covariance.from_moment(moment(spread=spread), eta=0.0)
    plain, other = (solve(k, r, x, mode="equality") for x in (Identity(), metric))
    a = amplification(k, metric)
    assert 1 <= a <= amplification_bound(metric.condition) * (1 + 1e-9)
    assert a == pytest.approx(float(other.right.norm() / plain.right.norm()))
    for norm in (spectral_norm, frobenius_norm):
        assert norm(plain.left, plain.right) <= norm(other.left, other.right) * (1 + 1e-12)


def test_kantorovich_is_attained():
    metric = Covariance.from_moment(torch.diag(torch.tensor([1.0, 4.0])), eta=0.0)
    worst = max(amplification(torch.tensor([math.cos(t / 500), math.sin(t / 500)]), metric) for t in range(1, 785))
    assert worst == pytest.approx(amplification_bound(4.0), rel=1e-5)
    assert amplification(torch.tensor([1.0, 2.0]), Identity()) == pytest.approx(1.0)


def test_amplification_of_a_null_space_is_one_over_the_cosine():
    k, space = normal(M), null_space(moment(spread=3.0), energy=0.1)
    assert amplification(k, space) == pytest.approx(float(k.norm() / space.project(k[:, None]).norm()))


def test_the_trap_has_two_directions():
    """Drift like the second moment favours the covariance metric; drift of one length favours the identity."""
    k, c = normal(M, 1), moment(spread=3.0)
    w_c = solve(k, torch.ones(1, 1), Covariance.from_moment(c, eta=0.0), mode="equality").right.T
    w_i = solve(k, torch.ones(1, 1), Identity(), mode="equality").right.T
    assert float(w_c.T @ c @ w_c) < float(w_i.T @ c @ w_i)
    assert w_i.norm() < w_c.norm()


# ------------------------------------------------ refusals


def test_duplicate_keys_are_named():
    k = normal(M, 9)
    k[:, 7] = k[:, 3]
    with pytest.raises(SolveError, match=r"^Facts 3 and 7 share one key: group them by subject \(method rose"):
        solve(k, normal(D, 9), Identity(), mode="equality")
    names = [f"F{i}" for i in range(9)]
    k[:, 5] = -2 * k[:, 1]
    with pytest.raises(SolveError, match=r"^Facts F1 and F5 share one key; facts F3 and F7 share one key"):
        solve(k, normal(D, 9), Covariance.from_moment(moment()), mode="equality", names=names)


def test_coinciding_keys_are_accepted_with_a_ridge_and_the_loss_is_told():
    k = normal(M, 1).expand(M, 2)
    got = solve(k, normal(D, 2), Identity(), mode="equality", ridge=1e-6)
    close(got.delivered, torch.tensor([0.5, 0.5]).double(), 1e-5)


def test_a_fact_whose_key_is_kept_is_named():
    k = normal(M, 3)
    with pytest.raises(SolveError, match=r"fact b is also a key whose output must stay"):
        solve(k, normal(D, 3), Identity(), mode="equality", keep=k[:, 1:2], names=["a", "b", "c"])


def test_more_facts_than_entries_cannot_be_equal():
    with pytest.raises(SolveError, match=r"The 14 keys \(12 entries each\) are linearly dependent"):
        solve(normal(M, 14), normal(D, 14), Identity(), mode="equality")


def test_a_key_outside_of_the_null_space_is_named():
    space = NullSpace(eye[:, :3], 1.0)
    k = torch.stack([eye[:, 0], eye[:, 5]], 1)
    with pytest.raises(SolveError, match="key of fact 1 is zero under metric nullspace"):
        solve(k, normal(D, 2), space, mode="equality")
    with pytest.raises(SolveError, match="no part in the directions"):
        amplification(eye[:, 5], space)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.full((M, 2), math.nan)}, r"keys must be finite; the entry at \[0, 0\]"),
        ({"residuals": torch.full((D, 2), math.inf)}, "residuals must be finite"),
        ({"residuals": torch.zeros(D, 3)}, "same n"),
        ({"keys": torch.zeros(M, 0), "residuals": torch.zeros(D, 0)}, "at least 1"),
        ({"keep": torch.zeros(M + 1, 2)}, "Kept keys must be 12 x p"),
        ({"keep": torch.full((M, 1), math.nan)}, "kept keys must be finite"),
        ({"keep_weight": -1.0}, "keep_weight"),
        ({"ridge": math.nan}, "ridge"),
        ({"ridge": 0.1, "mode": "least_squares"}, "ridge belongs to equality"),
        ({"names": ["one"]}, "one name; got 1"),
        ({"keys": torch.full((M, 2), 1e200, dtype=torch.float64)}, "system of keys must be finite"),
    ],
)
def test_wrong_requests_say_what_is_wrong(change, message):
    request = {"keys": normal(M, 2), "residuals": normal(D, 2), "metric": Identity(), "mode": "equality"} | change
    with pytest.raises(SolveError, match=message):
        solve(**request)


def test_wrong_metrics_say_what_is_wrong():
    with pytest.raises(UnknownName, match="Did you mean 'equality'"):
        solve(normal(M, 1), normal(D, 1), Identity(), mode="equalty")
    with pytest.raises(SolveError, match="not positive definite: observe more tokens"):
        Covariance.from_moment(torch.diag(torch.tensor([1.0, -0.5])))
    with pytest.raises(SolveError, match="square matrix"):
        Covariance.from_moment(torch.ones(2, 3))
    with pytest.raises(SolveError, match="diagonal above 0"):
        Woodbury.of(0.0, torch.ones(3, 1))
    with pytest.raises(SolveError, match="No direction"):
        null_space(torch.eye(3), energy=0.1)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(SolveError, match="above 0"):
            Identity(wrong)


def test_inputs_may_be_half_precision_parameters():
    k = torch.nn.Parameter(normal(M, 2).to(torch.bfloat16))
    got = solve(k, normal(D, 2), Identity(), mode="equality", keep=torch.zeros(M, 0))
    assert got.right.dtype == torch.float64 and not got.right.requires_grad


# ------------------------------------------------ low-rank algebra


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_norms_and_compression_equal_the_dense_product(d, m, rank, seed):
    left, right = normal(d, rank, seed=seed), normal(rank, m, seed=seed + 1)
    dense = left @ right
    assert spectral_norm(left, right) == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), abs=1e-12)
    assert frobenius_norm(left, right) == pytest.approx(float(dense.norm()), abs=1e-12)
    a, b = compress(left, right)
    assert a.shape[1] == b.shape[0] == int(torch.linalg.matrix_rank(dense))
    close(a @ b, dense)


def test_compression_finds_the_true_rank_and_balances():
    left, right = normal(8, 2), normal(2, 9, seed=1)
    a, b = compress(torch.cat([left, left], 1), torch.cat([right, 2 * right]))
    assert a.shape == (8, 2)
    close(a @ b, 3 * left @ right)
    close(a.norm(dim=0), b.norm(dim=1))
    assert compress(left, 0 * right)[0].shape == (8, 0)


@pytest.mark.parametrize("as_operator", [False, True])
def test_randomized_svd_finds_the_leading_part(as_operator):
    u, v = torch.linalg.qr(normal(60, 40)).Q, torch.linalg.qr(normal(50, 40, seed=1)).Q
    s = 0.5 ** torch.arange(40).double()
    a = u @ torch.diag(s) @ v.T
    given_as = Operator((60, 50), lambda x: a @ x, lambda y: a.T @ y) if as_operator else a
    left, values, right = randomized_svd(given_as, rank=6)
    close(values, s[:6])
    close(left @ torch.diag(values) @ right, u[:, :6] @ torch.diag(s[:6]) @ v[:, :6].T, 1e-6)


def test_randomized_svd_is_seeded_and_leaves_the_global_state():
    before = torch.get_rng_state()
    first, again = randomized_svd(normal(20, 15), 3, seed=4), randomized_svd(normal(20, 15), 3, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(SolveError, match="from 1 to 15 singular values; 16"):
        randomized_svd(normal(20, 15), 16)
