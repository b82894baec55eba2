"""The Rademacher bound: above the complexity itself, in two dimensions, with the right powers of everything."""

import re

import numpy as np
import pytest

from bnn_ppl.diagnostics import rademacher_bound

rng = np.random.default_rng(0)
V, W, X = rng.normal(size=(7, 5)), rng.normal(size=(3, 7)), rng.normal(size=(40, 5))


def relu(x):
    return np.maximum(x, 0)


def test_value():
    found = rademacher_bound(V, W, X, lipschitz=0.7)
    b0, b1 = np.sqrt((V**2).sum(1).max()), np.sqrt((W**2).sum(1).max())
    assert found.hidden_norm == pytest.approx(b0)
    assert found.output_norm == pytest.approx(b1)
    assert found.bound == pytest.approx(2 * 7**0.5 * 0.7 * b0 * b1 * np.sqrt((X**2).sum(1).max()) / 40**0.5)
    l1 = rademacher_bound(V, W, X, lipschitz=0.7, norm="l1")
    assert l1.output_norm == pytest.approx(np.abs(W).sum(1).max())
    assert l1.bound == pytest.approx(found.bound * l1.output_norm / b1 / 7**0.5)
    contracted = rademacher_bound(V, W, X, lipschitz=0.7, loss_lipschitz=2**0.5)
    assert contracted.bound == pytest.approx(2 * 3 * found.bound)  # sqrt(2) rho C


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_invariances(norm):
    bound = rademacher_bound(V, W, X, norm=norm).bound
    order = rng.permutation(7)
    assert rademacher_bound(4.0 * V, W / 4.0, X, norm=norm).bound == pytest.approx(bound)
    assert rademacher_bound(V[order], W[:, order], X, norm=norm).bound == pytest.approx(bound)
    assert rademacher_bound(V, W, np.tile(X, (4, 1)), norm=norm).bound == pytest.approx(bound / 2)
    assert rademacher_bound(V, W, 3 * X[::-1], norm=norm).bound == pytest.approx(3 * bound)


def test_the_bound_without_sqrt_m_is_exceeded():
    """One row of length 3, 16 equal units, B0 = B1 = 1: the function reaches 12, where the notes' bound is 3."""
    x = np.array([[3.0, 0.0]])
    v, w = np.tile([1.0, 0.0], (16, 1)), np.full((1, 16), 0.25)
    reached = float((w @ relu(v @ x.T))[0, 0])
    found = rademacher_bound(v, w, x)
    assert (found.hidden_norm, found.output_norm) == pytest.approx((1, 1))
    assert reached == pytest.approx(12)
    assert found.hidden_norm * found.output_norm * 3 == pytest.approx(3)
    assert found.bound == pytest.approx(24)
    assert rademacher_bound(v, w, x, norm="l1").bound == pytest.approx(24)


@pytest.mark.parametrize("units", [1, 4, 64])
@pytest.mark.parametrize("rows", [1, 5])
def test_above_the_complexity(rows, units):
    """In two dimensions equal units at one of all angles reach the supremum: sqrt(m) B1 |sum_i e_i s(v'x_i)|."""
    x = rng.normal(size=(rows, 2))
    angles = np.linspace(0, 2 * np.pi, 2000)
    hidden = relu(x @ np.stack([np.cos(angles), np.sin(angles)]))
    signs = np.array(np.meshgrid(*[[-1, 1]] * rows)).reshape(rows, -1).T
    complexity = 2 / rows * units**0.5 * np.abs(signs @ hidden).max(axis=1).mean()
    v, w = np.tile([1.0, 0.0], (units, 1)), np.full((1, units), units**-0.5)
    bound = rademacher_bound(v, w, x).bound
    assert bound / 4 < complexity <= bound * (1 + 1e-12)


def test_leading_dimensions():
    v, w = rng.normal(size=(2, 6, 7, 5)), rng.normal(size=(2, 6, 3, 7))
    found = rademacher_bound(v, w, X, norm="l1", loss_lipschitz=1.0)
    assert [part.shape for part in found] == [(2, 6)] * 3
    one = rademacher_bound(v[1, 4], w[1, 4], X, norm="l1", loss_lipschitz=1.0)
    assert [part[1, 4] for part in found] == pytest.approx(list(one))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((V.T, W, X), "v must have the shape (..., m, 5), a row for each hidden unit, got (5, 7): transpose weights"),
        ((V, W.T, X), "w must have the shape (..., C, 7), a row for each output and leading dimensions (), got (7, 3)"),
        ((V, W[0], X), "w must have the shape (..., C, 7)"),
        ((V, W, X[0]), "x must have the shape (n, inputs) and be not empty, got (5,)"),
        ((V, np.full_like(W, np.nan), X), "w has 21 NaN or infinite values"),
    ],
)
def test_bad_arrays(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rademacher_bound(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l3"}, "norm must be one of 'l2', 'l1', got 'l3'"),
        ({"lipschitz": 0}, "lipschitz must be finite and greater than 0, got 0"),
        ({"loss_lipschitz": -1.0}, "loss_lipschitz must be finite and greater than 0, got -1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rademacher_bound(V, W, X, **options)
