"""What the models accept: checks without a backend, each naming the argument, its value and the remedy."""

import itertools
import math
import warnings
from collections.abc import Iterable
from numbers import Integral, Real

ACTIVATIONS = ("elu", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "softplus", "tanh")
"""Names that every backend knows; gelu is the exact one, leaky_relu has slope 0.01, elu has alpha 1."""

NORMALIZATIONS = ("filter_response", "group", "batch", None)
"""What a residual network may normalise by, on every backend."""

HE_GAIN = math.sqrt(2.0)
"""Gain of the prior of weights that keeps the size of the units through layers of ReLU."""


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: give a positive, finite number.")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}: give an integer of at least {least}.")


def check_widths(name: str, widths: Iterable[int]) -> tuple[int, ...]:
    """Widths of layers as a tuple of ints; ValueError unless all are positive integers."""
    if not isinstance(widths, Iterable) or isinstance(widths, str):
        raise ValueError(f"{name}={widths!r}: give a tuple of widths, for instance {name}=(50,).")
    widths = tuple(widths)
    for width in widths:
        check_count(f"each width in {name}", width)
    return tuple(int(width) for width in widths)


def check_activation(activation: str) -> None:
    """Raise ValueError unless `activation` is one of ``ACTIVATIONS``."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: choose one of {', '.join(ACTIVATIONS)}.")


def check_depth(depth: int) -> None:
    """Raise ValueError unless `depth` is that of a residual network with as many blocks in each of three stages."""
    check_count("depth", depth, least=8)
    if depth % 6 != 2:
        raise ValueError(f"depth={depth}: give 6 n + 2 for n blocks a stage, for instance 8, 14, 20 or 32.")


def check_normalization(normalization: str | None) -> None:
    """Raise ValueError unless `normalization` is one of ``NORMALIZATIONS``."""
    if normalization not in NORMALIZATIONS:
        names = ", ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"normalization={normalization!r} is unknown: choose one of {names}.")


def warn_of_batch_statistics() -> None:
    """Warn who samples a network with batch normalisation; to be called by the function that the user calls."""
    warnings.warn(
        "normalization='batch' makes the likelihood of a row depend on the other rows of its minibatch, so that no "
        "posterior belongs to the minibatch gradients: use 'filter_response' or 'group' to sample.",
        stacklevel=3,
    )


def check_scales(prior_scale: float, noise_scale: float | None, noise_prior_scale: float) -> None:
    """Raise ValueError unless the scales of a regression are positive; the noise may be None (learned)."""
    check_positive("prior_scale", prior_scale)
    check_positive("noise_prior_scale", noise_prior_scale)
    if noise_scale is not None:
        check_positive("noise_scale", noise_scale)


def check_data_shapes(
    x_shape: tuple, y_shape: tuple | None, subsample_size: int | None, image_shape: tuple | None = None
) -> None:
    """Raise ValueError unless x is (N, D) or (N, *image_shape), y (N,) or None, and a minibatch has 1 to N rows."""
    if image_shape is not None and (len(x_shape) != 4 or tuple(x_shape[1:]) != image_shape):
        expected = ", ".join(map(str, image_shape))
        raise ValueError(
            f"x has shape {tuple(x_shape)}: give images of shape (N, {expected}), with its axes in this order, or make "
            f"the network with other channels and image_size."
        )
    if image_shape is None and len(x_shape) != 2:
        raise ValueError(
            f"x has shape {tuple(x_shape)}: give one row per observation, shape (N, D), "
            f"for instance x.reshape(len(x), -1)."
        )
    size = x_shape[0]
    if 0 in x_shape:
        raise ValueError(f"x has shape {tuple(x_shape)}: give at least one row and one column.")
    if y_shape is not None and tuple(y_shape) != (size,):
        raise ValueError(
            f"y has shape {tuple(y_shape)} with x of shape {tuple(x_shape)}: give one value per row of x, "
            f"shape ({size},), for instance y.reshape(-1) of a column, and integer labels for one-hot."
        )
    if subsample_size is not None:
        check_count("subsample_size", subsample_size)
        if subsample_size > size:
            raise ValueError(f"subsample_size={subsample_size} exceeds the {size} rows of x: give at most {size}.")


def layer_shapes(num_inputs: int, hidden: tuple[int, ...], num_outputs: int) -> list[tuple[int, int]]:
    """Shape (fan_in, fan_out) of each layer's weights, from the input to the output."""
    widths = (num_inputs, *hidden, num_outputs)
    return list(itertools.pairwise(widths))
