"""Divergence of a normal from the log-uniform prior p(w) ~ 1 / |w|, up to the constant that makes it 0 at alpha = inf.

With q(w) = N(mu, sigma^2), alpha = sigma^2 / mu^2, u = 1 / (2 alpha) and Dawson's integral D, the exact one [1]_ is::

    f(u) = 2 int_0^sqrt(u) D(x) dx = 1/2 sum_j Pois(j; u) h_j,      h_j = sum_{i < j} 1 / (i + 1/2)
    f'(u) = D(sqrt(u)) / sqrt(u)   = 1/2 sum_j Pois(j; u) / (j + 1/2)

so that df / d log alpha = -u f'(u). Below u = 40 both are u or 1 times a Chebyshev polynomial in u / (u + 8), fitted to
the series on import, with relative errors below 1e-12; beyond they are their asymptotic series. For comparison with the
literature, with k = (0.63576, 1.87320, 1.48695)::

    sigmoid [2]   1/2 log(1 + 1 / alpha) + k1 (1 - sigmoid(k2 + k3 log alpha))
    cubic [3]     c - 1/2 log alpha - 1.16145124 alpha + 1.50204118 alpha^2 - 0.58629921 alpha^3,   alpha <= 1
    ARD           1/2 log(1 + 1 / alpha), the exact divergence from N(0, s^2) at the best s

with c = (gamma + log 2) / 2, the constant of the exact one as alpha goes to 0.

References
----------
.. [1] Hron, Matthews & Ghahramani (2018), Variational Bayesian dropout: pitfalls and fixes.
.. [2] Molchanov, Ashukha & Vetrov (2017), Variational dropout sparsifies deep neural networks.
.. [3] Kingma, Salimans & Welling (2015), Variational dropout and the local reparameterization trick.
"""

import math
import numbers
from typing import Any

import numpy as np

from bnn_ppl.namespaces import namespace

KINDS = ("exact", "sigmoid", "cubic", "ard")
_LARGE, _SCALE, _DEGREE, _TERMS = 40.0, 8.0, 31, 12
_SIGMOID = (0.63576, 1.87320, 1.48695)
_CUBIC = (1.161451241083230, -1.502041176441722, 0.586299206427007)


def _fitted() -> list[list[float]]:
    """Chebyshev coefficients of f(u) / u and f'(u) on [0, 40]."""
    nodes = np.cos((np.arange(_DEGREE + 1) + 0.5) * np.pi / (_DEGREE + 1))
    share = 0.5 * (nodes + 1) * _LARGE / (_LARGE + _SCALE)
    u = (_SCALE * share / (1 - share))[:, None]
    j = np.arange(300)
    poisson = np.exp(-u + j * np.log(u) - np.concatenate([[0.0], np.cumsum(np.log(j[1:]))]))
    harmonic = np.concatenate([[0.0], np.cumsum(1 / (j[:-1] + 0.5))])
    values = (poisson * harmonic).sum(1) / (2 * u[:, 0]), (poisson / (2 * j + 1)).sum(1)
    return [np.polynomial.chebyshev.chebfit(nodes, value, _DEGREE).tolist() for value in values]


_VALUE, _SLOPE = _fitted()


def _polynomial(coefficients: list[float], u: Any) -> Any:
    """Clenshaw's recursion at u in [0, 40]."""
    x = 2 * (_LARGE + _SCALE) / _LARGE * u / (u + _SCALE) - 1
    after, latest = 0.0, 0.0
    for c in coefficients[:0:-1]:
        after, latest = latest, 2 * x * latest - after + c
    return x * latest - after + coefficients[0]


def _series(terms: list[float], u: Any) -> Any:
    """Sum of terms[k] / u^(k + 1), by Horner's rule."""
    total = 0.0
    for term in reversed(terms):
        total = (total + term) / u
    return total


_ODD = [math.prod(range(1, 2 * k, 2)) for k in range(_TERMS + 1)]  # (2 k - 1)!!
_VALUE_TERMS = [_ODD[k] / (2 ** (k + 1) * k) for k in range(1, _TERMS + 1)]
_SLOPE_TERMS = [0.5 * _ODD[k] / 2**k for k in range(_TERMS + 1)]


def exact(u: Any) -> Any:
    """The divergence at u = mu^2 / (2 sigma^2), at least 0: an array of NumPy, JAX or torch."""
    xp = namespace(u)
    low, high = xp.where(u < _LARGE, u, _LARGE), xp.where(u < _LARGE, _LARGE, u)
    beyond = 0.5 * (xp.log(high) + np.euler_gamma + 2 * math.log(2)) - _series(_VALUE_TERMS, high)
    return xp.where(u < _LARGE, low * _polynomial(_VALUE, low), beyond)


def exact_slope(u: Any) -> Any:
    """Its derivative by u."""
    xp = namespace(u)
    low, high = xp.where(u < _LARGE, u, _LARGE), xp.where(u < _LARGE, _LARGE, u)
    return xp.where(u < _LARGE, _polynomial(_SLOPE, low), _series(_SLOPE_TERMS, high))


def sigmoid(u: Any) -> Any:
    """The fit of Molchanov et al., within 0.0094 of the exact one."""
    xp = namespace(u)
    k1, k2, k3 = _SIGMOID
    power = xp.where(u < 1e20, 2 * u, 2e20) ** k3  # beyond, the ratio is 1 to rounding
    return 0.5 * xp.log1p(2 * u) + k1 * power / (power + math.exp(k2))


def cubic(u: Any) -> Any:
    """The fit of Kingma et al. for alpha up to 1; a larger alpha counts as 1, as there."""
    xp = namespace(u)
    twice = xp.where(u > 0.5, 2 * u, 1.0)
    a, b, c = (k * twice**-power for power, k in enumerate(_CUBIC, start=1))
    return 0.5 * (np.euler_gamma + math.log(2)) + 0.5 * xp.log(twice) - (a + b + c)


def ard(u: Any) -> Any:
    """The divergence from N(0, s^2) at the s that minimises it."""
    return 0.5 * namespace(u).log1p(2 * u)


def check_kl_weight(weight: Any) -> None:
    """Raise a ValueError unless a weight of the divergence is a finite number of at least 0."""
    number = isinstance(weight, numbers.Real) or (hasattr(weight, "ndim") and weight.ndim == 0)
    if not number or not 0 <= float(weight) < math.inf:
        raise ValueError(f"kl_weight must be a finite number of at least 0, got {weight!r}: 1 is the ELBO itself")
