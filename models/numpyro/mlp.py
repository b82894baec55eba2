r"""Bayesian multilayer perceptrons for NumPyro.

With inputs :math:`h_0 = x` and an activation :math:`\phi`,

.. math::
    h_{l+1} = \phi(h_l W_l + b_l), \qquad f(x) = h_L W_L + b_L, \qquad
    (W_l)_{jk} \sim N(0, s^2 / \text{fan-in}_l), \qquad (b_l)_k \sim N(0, s^2)

so that the spread of the functions does not depend on the widths. ``fan_in_scaling=False`` gives all weights
:math:`N(0, s^2)`. The network is called inside the data plate, its weights are drawn outside.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from ..checks import (
    check_activation,
    check_count,
    check_positive,
    check_scales,
    check_widths,
    layer_shapes,
)
from .inputs import (
    check_data,
    float_dtype,
    minibatch,
    noise_prior,
    normal_prior,
    observe_labels,
    observe_values,
)

_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "elu": jax.nn.elu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "leaky_relu": jax.nn.leaky_relu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}


def _sample_weights(
    shapes: list[tuple[int, int]], prior_scale: float, fan_in_scaling: bool, dtype: Any
) -> dict[str, Any]:
    """The sites w0, b0, w1, b1, ... of a network with these layers."""
    weights = {}
    for i, (fan_in, fan_out) in enumerate(shapes):
        scale = prior_scale / math.sqrt(fan_in) if fan_in_scaling else prior_scale
        weights[f"w{i}"] = numpyro.sample(f"w{i}", normal_prior(scale, (fan_in, fan_out), dtype))
        weights[f"b{i}"] = numpyro.sample(f"b{i}", normal_prior(prior_scale, (fan_out,), dtype))
    return weights


def _network(weights: Mapping[str, Any], x: Any, activation: str, depth: int) -> Any:
    """Output (B, fan_out) of a network with `depth` hidden layers."""
    for i in range(depth):
        x = _ACTIVATIONS[activation](x @ weights[f"w{i}"] + weights[f"b{i}"])
    return x @ weights[f"w{depth}"] + weights[f"b{depth}"]


@dataclass(frozen=True)
class MLPRegression:
    """The model that :func:`mlp_regression` returns."""

    hidden: tuple[int, ...]
    activation: str
    prior_scale: float
    fan_in_scaling: bool
    noise_scale: float | None
    noise_prior_scale: float

    def forward(self, weights: Mapping[str, Any], x: Any) -> Any:
        """Mean of y, shape (B,), from the sites w0, b0, ... and floating inputs (B, D)."""
        return _network(weights, x, self.activation, len(self.hidden))[..., 0]

    def __call__(self, x: Any, y: Any = None, *, subsample_size: int | None = None) -> Any:
        """Sample the sites; see :func:`mlp_regression`."""
        x, y = check_data(x, y, subsample_size)
        dtype = float_dtype(x)
        shapes = layer_shapes(x.shape[1], self.hidden, 1)
        weights = _sample_weights(shapes, self.prior_scale, self.fan_in_scaling, dtype)
        noise_scale: Any = self.noise_scale
        if noise_scale is None:
            noise_scale = numpyro.sample("noise_scale", noise_prior(self.noise_prior_scale, dtype))
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x, y = minibatch(x, y, dtype)
            return observe_values(self.forward(weights, x), noise_scale, y)


@dataclass(frozen=True)
class MLPClassification:
    """The model that :func:`mlp_classification` returns."""

    hidden: tuple[int, ...]
    num_classes: int
    activation: str
    prior_scale: float
    fan_in_scaling: bool

    def forward(self, weights: Mapping[str, Any], x: Any) -> Any:
        """Logits, shape (B, num_classes), from the sites w0, b0, ... and floating inputs (B, D)."""
        return _network(weights, x, self.activation, len(self.hidden))

    def __call__(self, x: Any, y: Any = None, *, subsample_size: int | None = None) -> Any:
        """Sample the sites; see :func:`mlp_classification`."""
        x, y = check_data(x, y, subsample_size, self.num_classes)
        dtype = float_dtype(x)
        shapes = layer_shapes(x.shape[1], self.hidden, self.num_classes)
        weights = _sample_weights(shapes, self.prior_scale, self.fan_in_scaling, dtype)
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x, y = minibatch(x, y, dtype)
            return observe_labels(self.forward(weights, x), y)


def mlp_regression(
    hidden: Iterable[int] = (50,),
    *,
    activation: str = "relu",
    prior_scale: float = 1.0,
    fan_in_scaling: bool = True,
    noise_scale: float | None = None,
    noise_prior_scale: float = 1.0,
) -> MLPRegression:
    """Regression by a multilayer perceptron with Gaussian noise.

    Parameters
    ----------
    hidden : iterable of int
        Widths of the hidden layers; () gives a linear model.
    activation : str
        elu, gelu, leaky_relu, relu, sigmoid, silu, softplus or tanh.
    prior_scale : float
        Standard deviation s of the prior of the biases, and of the weights before the scaling by fan-in.
    fan_in_scaling : bool
        Whether weights have standard deviation s / sqrt(fan_in), or s.
    noise_scale : float or None
        Standard deviation of the noise. None learns it: a site ``noise_scale`` with a half-normal prior.
    noise_prior_scale : float
        Scale of the half-normal prior of ``noise_scale``, where that is learned.

    Returns
    -------
    MLPRegression
        A model ``model(x, y=None, *, subsample_size=None)`` of inputs (N, D) and targets (N,), with the sites
        ``w0`` (D, hidden[0]), ``b0`` (hidden[0],), ``w1``, ``b1``, ..., perhaps ``noise_scale`` (), and ``y``
        in the plate ``data``. With ``y=None`` it samples ``y``. The call raises ValueError where the data do
        not fit.

    Raises
    ------
    ValueError
        If a width or a scale is not positive, or the activation is unknown.
    """
    widths = check_widths("hidden", hidden)
    check_activation(activation)
    check_scales(prior_scale, noise_scale, noise_prior_scale)
    return MLPRegression(widths, activation, prior_scale, bool(fan_in_scaling), noise_scale, noise_prior_scale)


def mlp_classification(
    hidden: Iterable[int] = (100,),
    *,
    num_classes: int = 10,
    activation: str = "relu",
    prior_scale: float = 1.0,
    fan_in_scaling: bool = True,
) -> MLPClassification:
    """Classification by a multilayer perceptron with a softmax.

    Parameters
    ----------
    hidden : iterable of int
        Widths of the hidden layers; () gives softmax regression.
    num_classes : int
        Number of classes, and of outputs (two for two classes).
    activation : str
        elu, gelu, leaky_relu, relu, sigmoid, silu, softplus or tanh.
    prior_scale : float
        Standard deviation s of the prior of the biases, and of the weights before the scaling by fan-in.
    fan_in_scaling : bool
        Whether weights have standard deviation s / sqrt(fan_in), or s.

    Returns
    -------
    MLPClassification
        A model ``model(x, y=None, *, subsample_size=None)`` of inputs (N, D) and integer labels (N,) from 0
        to num_classes - 1, with the sites ``w0`` (D, hidden[0]), ``b0`` (hidden[0],), ``w1``, ``b1``, ...,
        and ``y`` in the plate ``data``. With ``y=None`` it samples ``y``. The call raises ValueError where
        the data do not fit.

    Raises
    ------
    ValueError
        If a width or `prior_scale` is not positive, `num_classes` is below 2, or the activation is unknown.
    """
    widths = check_widths("hidden", hidden)
    check_count("num_classes", num_classes, least=2)
    check_activation(activation)
    check_positive("prior_scale", prior_scale)
    return MLPClassification(widths, num_classes, activation, prior_scale, bool(fan_in_scaling))
