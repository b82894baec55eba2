r"""Normalisations of convolutional networks, for flax.nnx.

With x the activations of one image in one channel, :math:`\nu^2 = \text{mean}(x^2)` over its pixels,

.. math::
    y = \gamma x / \sqrt{\nu^2 + \epsilon} + \beta, \qquad z = \max(y, \tau)

is filter response normalisation and its thresholded linear unit (Singh and Krishnan, Filter Response Normalization
Layer, 2020). It and group normalisation (Wu and He, 2018) treat each image by itself, as a likelihood that
factorises over the data asks for; batch normalisation does not.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class FilterResponseNorm(nnx.Module):
    """Filter response normalisation with one scale and one shift per channel, of images (B, H, W, C).

    Parameters
    ----------
    channels : int
        C.
    epsilon : float
        Added to the mean square, 1e-6 as in the paper.
    """

    def __init__(self, channels: int, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images, shape (B, H, W, C)."""
        mean_square = jnp.mean(x**2, axis=(1, 2), keepdims=True)
        return x * (self.scale[...] * jax.lax.rsqrt(mean_square + self.epsilon)) + self.bias[...]


class ThresholdedLinear(nnx.Module):
    """Maximum of the input and a threshold per channel, which starts at 0 (a ReLU), of images (B, H, W, C).

    Parameters
    ----------
    channels : int
        C.
    """

    def __init__(self, channels: int):
        self.threshold = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations, shape (B, H, W, C)."""
        return jnp.maximum(x, self.threshold[...])


class BatchNorm(nnx.Module):
    """Batch normalisation by the statistics of the batch, without running averages, of images (B, H, W, C).

    flax's own keeps averages, a state that a likelihood has no place for.

    Parameters
    ----------
    channels : int
        C.
    epsilon : float
        Added to the variance; 1e-5 as in torch.
    """

    def __init__(self, channels: int, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images, shape (B, H, W, C)."""
        scale = self.scale[...] * jax.lax.rsqrt(jnp.var(x, axis=(0, 1, 2)) + self.epsilon)
        return (x - jnp.mean(x, axis=(0, 1, 2))) * scale + self.bias[...]


def normalization_layer(normalization: str | None, channels: int) -> Callable:
    """The layer of this name; groups are 8, or fewer where 8 does not divide the channels."""
    if normalization == "filter_response":
        return FilterResponseNorm(channels)
    if normalization == "group":
        return nnx.GroupNorm(channels, math.gcd(8, channels), epsilon=1e-5, rngs=nnx.Rngs(0))  # epsilon as in torch
    if normalization == "batch":
        return BatchNorm(channels)
    return _identity


# nnx.identity and nnx.relu do not pickle.
def _identity(x: jax.Array) -> jax.Array:
    return x


def _relu(x: jax.Array) -> jax.Array:
    return nnx.relu(x)


def activation_layer(normalization: str | None, channels: int) -> Callable:
    """The activation that belongs to a normalisation: a thresholded linear unit, or ReLU."""
    return ThresholdedLinear(channels) if normalization == "filter_response" else _relu
