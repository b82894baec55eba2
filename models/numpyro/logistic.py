r"""Bayesian logistic and softmax regression for NumPyro.

.. math:: y_i \sim \text{Categorical}(\text{softmax}(W^\top x_i + b)), \qquad W_{jk}, b_k \sim N(0, s^2)

Two classes take one logit, :math:`P(y_i = 1) = \text{sigmoid}(w^\top x_i + b)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpyro

from ..checks import check_count, check_positive
from .inputs import (
    check_data,
    float_dtype,
    minibatch,
    normal_prior,
    observe_binary,
    observe_labels,
)


@dataclass(frozen=True)
class LogisticRegression:
    """The model that :func:`logistic_regression` returns."""

    num_classes: int
    prior_scale: float

    def forward(self, weights: Mapping[str, Any], x: Any) -> Any:
        """Logits from the sites and floating inputs (B, D): (B,) for two classes, else (B, num_classes)."""
        return x @ weights["w"] + weights["b"]

    def __call__(self, x: Any, y: Any = None, *, subsample_size: int | None = None) -> Any:
        """Sample the sites; see :func:`logistic_regression`."""
        x, y = check_data(x, y, subsample_size, self.num_classes)
        dtype = float_dtype(x)
        outputs = () if self.num_classes == 2 else (self.num_classes,)
        weights = {
            "w": numpyro.sample("w", normal_prior(self.prior_scale, (x.shape[1], *outputs), dtype)),
            "b": numpyro.sample("b", normal_prior(self.prior_scale, outputs, dtype)),
        }
        observe = observe_binary if self.num_classes == 2 else observe_labels
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x, y = minibatch(x, y, dtype)
            return observe(self.forward(weights, x), y)


def logistic_regression(*, num_classes: int = 2, prior_scale: float = 1.0) -> LogisticRegression:
    """Logistic regression, or softmax regression for more than two classes, with a Gaussian prior.

    Parameters
    ----------
    num_classes : int
        Number of classes. With two, ``y`` is Bernoulli and there is one logit.
    prior_scale : float
        Standard deviation of the prior of each weight and intercept.

    Returns
    -------
    LogisticRegression
        A model ``model(x, y=None, *, subsample_size=None)`` of inputs (N, D) and integer labels (N,) from 0
        to num_classes - 1, with the sites ``w`` (D,), ``b`` () for two classes, else ``w`` (D, num_classes)
        and ``b`` (num_classes,), and ``y`` in the plate ``data``. With ``y=None`` it samples ``y``. The call
        raises ValueError where the data do not fit.

    Raises
    ------
    ValueError
        If `num_classes` is below 2 or `prior_scale` is not positive.
    """
    check_count("num_classes", num_classes, least=2)
    check_positive("prior_scale", prior_scale)
    return LogisticRegression(num_classes, prior_scale)
