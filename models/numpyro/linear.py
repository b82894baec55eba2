r"""Bayesian linear regression for NumPyro.

.. math::
    y_i \sim N(w^\top x_i + b, \sigma^2), \qquad w_j, b \sim N(0, s^2), \qquad
    \sigma \sim \text{HalfNormal}(s_\sigma)

or :math:`\sigma` known, and then ``bnn_ppl.models.conjugate`` has the exact posterior.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpyro

from ..checks import check_scales
from .inputs import (
    check_data,
    float_dtype,
    minibatch,
    noise_prior,
    normal_prior,
    observe_values,
)


@dataclass(frozen=True)
class LinearRegression:
    """The model that :func:`linear_regression` returns."""

    noise_scale: float | None
    prior_scale: float
    noise_prior_scale: float

    def forward(self, weights: Mapping[str, Any], x: Any) -> Any:
        """Mean of y, shape (B,), from the sites ``w`` (D,) and ``b`` () and floating inputs (B, D)."""
        return x @ weights["w"] + weights["b"]

    def __call__(self, x: Any, y: Any = None, *, subsample_size: int | None = None) -> Any:
        """Sample the sites; see :func:`linear_regression`."""
        x, y = check_data(x, y, subsample_size)
        dtype = float_dtype(x)
        weights = {
            "w": numpyro.sample("w", normal_prior(self.prior_scale, (x.shape[1],), dtype)),
            "b": numpyro.sample("b", normal_prior(self.prior_scale, (), dtype)),
        }
        noise_scale: Any = self.noise_scale
        if noise_scale is None:
            noise_scale = numpyro.sample("noise_scale", noise_prior(self.noise_prior_scale, dtype))
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x, y = minibatch(x, y, dtype)
            return observe_values(self.forward(weights, x), noise_scale, y)


def linear_regression(
    *, noise_scale: float | None = None, prior_scale: float = 1.0, noise_prior_scale: float = 1.0
) -> LinearRegression:
    """Linear regression with a Gaussian prior.

    Parameters
    ----------
    noise_scale : float or None
        Standard deviation of the noise. None learns it: a site ``noise_scale`` with a half-normal prior.
    prior_scale : float
        Standard deviation of the prior of each weight and of the intercept.
    noise_prior_scale : float
        Scale of the half-normal prior of ``noise_scale``, where that is learned.

    Returns
    -------
    LinearRegression
        A model ``model(x, y=None, *, subsample_size=None)`` of inputs (N, D) and targets (N,), with the sites
        ``w`` (D,), ``b`` (), perhaps ``noise_scale`` (), and ``y`` in the plate ``data``. With ``y=None`` it
        samples ``y``. The call raises ValueError where the data do not fit.

    Raises
    ------
    ValueError
        If a scale is not positive.
    """
    check_scales(prior_scale, noise_scale, noise_prior_scale)
    return LinearRegression(noise_scale, prior_scale, noise_prior_scale)
