"""A small VGG for NumPyro: pairs of 3x3 convolutions between pools, and one hidden dense layer.

The default widths, 32-32-64-64-128-128 and a dense 128, suit CIFAR: 550,570 parameters. Reference: Simonyan and
Zisserman, Very deep convolutional networks for large-scale image recognition (2015).
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import jax
from flax import nnx

from bnn_ppl.numpyro import priors

from ..checks import HE_GAIN, check_count, check_widths
from .classifier import ImageClassifier, build


class VGG(nnx.Module):
    """VGG-like network: two padded 3x3 convolutions and a max-pool for each width, a dense layer, the outputs.

    Parameters
    ----------
    num_classes : int
        Number of outputs.
    channels : int
        C of the images (B, H, W, C).
    image_size : int
        H and W, at least 2 to the number of widths.
    widths : iterable of int
        Filters of both convolutions before each pool.
    hidden : int
        Units of the dense layer.
    rngs : flax.nnx.Rngs
        Keys of the initial values.

    Raises
    ------
    ValueError
        If an argument is no integer, or too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        channels: int = 3,
        image_size: int = 32,
        widths: Iterable[int] = (32, 64, 128),
        hidden: int = 128,
        rngs: nnx.Rngs,
    ):
        widths = check_widths("widths", widths)
        check_count("num_classes", num_classes, least=2)
        check_count("channels", channels)
        check_count("image_size", image_size, least=2 ** len(widths))
        check_count("hidden", hidden)
        sizes = [channels, *(width for width in widths for _ in range(2))]
        self.convs = nnx.List(nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairwise(sizes))
        side = image_size // 2 ** len(widths)
        self.hidden = nnx.Linear(sizes[-1] * side**2, hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape (B, num_classes), of images (B, H, W, C)."""
        for i, conv in enumerate(self.convs):
            x = nnx.relu(conv(x))
            if i % 2:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.output(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def vgg(
    num_classes: int = 10,
    *,
    channels: int = 3,
    image_size: int = 32,
    widths: Iterable[int] = (32, 64, 128),
    hidden: int = 128,
    prior: Any = None,
) -> ImageClassifier:
    """Classification of images by a small VGG.

    Parameters
    ----------
    num_classes : int
        Number of classes.
    channels : int
        C of the images (N, H, W, C): 1 for grey ones.
    image_size : int
        H and W, at least 2 to the number of widths; the default is that of CIFAR.
    widths : iterable of int
        Filters of both convolutions before each pool.
    hidden : int
        Units of the dense layer.
    prior : distribution, dict or callable, or None
        Prior of the parameters, as of :func:`numpyro.contrib.module.random_nnx_module`. None is
        ``priors.fan_in_normal(gain=2**0.5)``: weights N(0, 2 / fan-in), for layers of ReLU, biases N(0, 1).

    Returns
    -------
    ImageClassifier
        A model ``model(x, y=None, *, subsample_size=None)`` of images (N, H, W, C) and integer labels (N,) from 0 to
        num_classes - 1, with a site ``net/convs.0.kernel``, ``net/convs.0.bias``, ... for each parameter of its
        ``module``, a :class:`VGG`, and ``y`` in the plate ``data``. With ``y=None`` it samples ``y``. The call raises
        ValueError where the data do not fit.

    Raises
    ------
    ValueError
        If an argument is no integer, or too small.
    """
    options: dict[str, Any] = {"channels": channels, "image_size": image_size, "widths": widths, "hidden": hidden}
    module = build(lambda rngs: VGG(num_classes, **options, rngs=rngs))
    prior = priors.fan_in_normal(gain=HE_GAIN) if prior is None else prior
    return ImageClassifier(module, prior, num_classes, (image_size, image_size, channels))
