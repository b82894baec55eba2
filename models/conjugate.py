r"""Exact posteriors in NumPy, to hold a sampler against.

Linear regression with a known noise scale :math:`\sigma` and the prior :math:`N(0, s^2)` on each coefficient:
with :math:`A = [X, 1]` the posterior of :math:`\theta = (w, b)` is normal,

.. math:: \Sigma = T (A^\top A / \sigma^2 + I / s^2)^{-1}, \qquad \mu = \Sigma A^\top y / (\sigma^2 T).
"""

from typing import Any

import numpy as np

from .checks import check_data_shapes, check_positive

__all__ = ["linear_regression_posterior"]


def linear_regression_posterior(
    x: Any, y: Any, *, noise_scale: float, prior_scale: float = 1.0, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Exact posterior of ``linear_regression(noise_scale=..., prior_scale=...)`` of either backend.

    Parameters
    ----------
    x : array_like, shape (N, D)
    y : array_like, shape (N,)
    noise_scale : float
        Known standard deviation of the noise.
    prior_scale : float
        Standard deviation of the prior of each weight and of the intercept.
    temperature : float
        Prior and likelihood are both raised to the power 1 / temperature: the mean stays, the covariance
        is multiplied by the temperature.

    Returns
    -------
    mean : numpy.ndarray, shape (D + 1,)
        The D weights (site ``w``), then the intercept (site ``b``).
    covariance : numpy.ndarray, shape (D + 1, D + 1)

    Raises
    ------
    ValueError
        If a scale or the temperature is not positive, or the shapes do not fit.
    """
    check_positive("noise_scale", noise_scale)
    check_positive("prior_scale", prior_scale)
    check_positive("temperature", temperature)
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    check_data_shapes(x.shape, y.shape, None)
    design = np.column_stack([x, np.ones(len(x))])
    precision = design.T @ design / noise_scale**2 + np.eye(design.shape[1]) / prior_scale**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ (design.T @ y) / noise_scale**2
    return mean, temperature * covariance
