"""The log-uniform divergence: METHODS' Table C, its limits, and the fits of the literature."""

import numpy as np
import pytest

from bnn_ppl import divergences

# alpha, exact, its derivative by log alpha, sigmoid
TABLE_C = np.array(
    [
        (1e-8, 9.84552178970692175, -0.500000005000, 9.84610037697),
        (1e-4, 5.24030160121632914, -0.500050015007505, 5.24097551678232),
        (1e-3, 4.08855830970858724, -0.500501507552978, 4.08999421511366),
        (0.01, 2.93268887404701931, -0.50515807824593, 2.93895588409515),
        (0.05, 2.10571515927986438, -0.530375809929016, 2.11329461790121),
        (0.1, 1.72413784647092624, -0.578525444700387, 1.72345252691736),
        (0.25, 1.15553328380462742, -0.639988074565409, 1.15241567195402),
        (0.5, 0.739441630099079301, -0.538079506912768, 0.740672001430092),
        (1, 0.426685604296044806, -0.362389229503538, 0.431238950990309),
        (2, 0.230484336423517168, -0.212218191751011, 0.235768125120063),
        (5, 0.0967536841497050817, -0.0935925472328831, 0.0999588461232942),
        (10, 0.0491776597803956641, -0.0483661957194633, 0.0508221326764749),
        (100, 0.00499167776588358987, -0.00498336661910048, 0.00507887095969168),
        (1e3, 4.99916677776587407e-4, -4.99833366661905e-4, 5.0313019586172e-4),
        (1e4, 4.99991666777776587e-5, -4.99983333666662e-5, 5.01076471738e-5),
        (1e8, 4.99999999166666668e-9, -4.99999998333e-9, 5.00012418963756e-9),
    ]
)
ALPHA, EXACT, SLOPE, SIGMOID = TABLE_C.T
U = 0.5 / ALPHA


def test_table_in_double_precision():
    np.testing.assert_allclose(divergences.exact(U), EXACT, rtol=1e-11)
    np.testing.assert_allclose(-U * divergences.exact_slope(U), SLOPE, rtol=3e-10)  # as many digits as the table has
    np.testing.assert_allclose(divergences.sigmoid(U), SIGMOID, rtol=3e-11)


def test_table_in_single_precision():
    u = U.astype(np.float32)
    assert divergences.exact(u).dtype == np.float32
    np.testing.assert_allclose(divergences.exact(u), EXACT, rtol=1e-5)
    np.testing.assert_allclose(-u * divergences.exact_slope(u), SLOPE, rtol=1e-5)


def test_slope_is_the_derivative():
    """By central differences, across the border between polynomial and series too."""
    u = np.concatenate([np.geomspace(1e-6, 1e6, 300), [39.999, 40.0, 40.001]])
    h = 1e-5 * u
    numeric = (divergences.exact(u + h) - divergences.exact(u - h)) / (2 * h)
    np.testing.assert_allclose(divergences.exact_slope(u), numeric, rtol=1e-8)


def test_monotone_positive_and_limits():
    u = np.geomspace(1e-12, 1e12, 2001)
    assert np.all(np.diff(divergences.exact(u)) > 0)  # decreasing in alpha
    assert divergences.exact(np.zeros(1)) == 0
    assert divergences.exact_slope(np.zeros(1)) == pytest.approx(1.0, rel=1e-13)
    constant = divergences.exact(np.array([1e9])) - 0.5 * np.log(2e9)
    assert constant == pytest.approx(0.63518142273073908501, abs=1e-9)
    steepest = u[np.argmax(u * divergences.exact_slope(u))]
    assert 0.5 / steepest == pytest.approx(0.221638, rel=0.02)
    assert np.max(u * divergences.exact_slope(u)) == pytest.approx(0.642374719828, rel=1e-4)


def test_fits_of_the_literature():
    alpha = np.geomspace(1e-4, 1e3, 20_001)
    error = divergences.sigmoid(0.5 / alpha) - divergences.exact(0.5 / alpha)
    assert np.abs(error).max() == pytest.approx(0.00937, abs=1e-5)
    assert np.log(alpha[np.abs(error).argmax()]) == pytest.approx(-3.51, abs=0.01)
    low = alpha[alpha <= 1]
    error = divergences.cubic(0.5 / low) - divergences.exact(0.5 / low)
    assert -0.0404 < error.min() < -0.04
    assert error.max() < 1e-4
    np.testing.assert_allclose(divergences.cubic(np.array([0.1, 0.01])), float(divergences.cubic(np.array([0.5]))[0]))
    np.testing.assert_allclose(divergences.ard(0.5 / alpha), 0.5 * np.log1p(1 / alpha))
    assert np.isfinite(divergences.sigmoid(np.array([0.0, 1e30], np.float32))).all()
