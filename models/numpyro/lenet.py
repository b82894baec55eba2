"""LeNet-5 for NumPyro, in the form of Caffe: 20 and 50 filters, 500 hidden units, 431,080 parameters on MNIST.

The convolutions are linear, as in Caffe's; max-pooling and the ReLU of the hidden layer are what is not. Reference:
LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition (1998).
"""

from typing import Any

import jax
from flax import nnx

from bnn_ppl.numpyro import priors

from ..checks import check_count
from .classifier import ImageClassifier, build


class LeNet5(nnx.Module):
    """LeNet-5: conv 5x5 20, pool, conv 5x5 50, pool, dense 500, dense num_classes.

    Parameters
    ----------
    num_classes : int
        Number of outputs.
    channels : int
        C of the images (B, H, W, C).
    image_size : int
        H and W, at least 16.
    rngs : flax.nnx.Rngs
        Keys of the initial values.

    Raises
    ------
    ValueError
        If an argument is no integer, or too small.
    """

    def __init__(self, num_classes: int = 10, *, channels: int = 1, image_size: int = 28, rngs: nnx.Rngs):
        check_count("num_classes", num_classes, least=2)
        check_count("channels", channels)
        check_count("image_size", image_size, least=16)
        self.conv1 = nnx.Conv(channels, 20, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(20, 50, (5, 5), padding="VALID", rngs=rngs)
        side = ((image_size - 4) // 2 - 4) // 2
        self.hidden = nnx.Linear(50 * side**2, 500, rngs=rngs)
        self.output = nnx.Linear(500, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape (B, num_classes), of images (B, H, W, C)."""
        x = nnx.max_pool(self.conv1(x), (2, 2), (2, 2))
        x = nnx.max_pool(self.conv2(x), (2, 2), (2, 2))
        return self.output(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def lenet5(num_classes: int = 10, *, channels: int = 1, image_size: int = 28, prior: Any = None) -> ImageClassifier:
    """Classification of images by a LeNet-5.

    Parameters
    ----------
    num_classes : int
        Number of classes.
    channels : int
        C of the images (N, H, W, C): 1 for grey ones.
    image_size : int
        H and W, at least 16; the default is that of MNIST.
    prior : distribution, dict or callable, or None
        Prior of the parameters, as of :func:`numpyro.contrib.module.random_nnx_module`. None is
        ``priors.fan_in_normal()``: weights N(0, 1 / fan-in), biases N(0, 1).

    Returns
    -------
    ImageClassifier
        A model ``model(x, y=None, *, subsample_size=None)`` of images (N, H, W, C) and integer labels (N,) from 0 to
        num_classes - 1, with a site ``net/conv1.kernel``, ``net/conv1.bias``, ... for each parameter of its
        ``module``, a :class:`LeNet5`, and ``y`` in the plate ``data``. With ``y=None`` it samples ``y``. The call
        raises ValueError where the data do not fit.

    Raises
    ------
    ValueError
        If an argument is no integer, or too small.
    """
    module = build(lambda rngs: LeNet5(num_classes, channels=channels, image_size=image_size, rngs=rngs))
    prior = priors.fan_in_normal() if prior is None else prior
    return ImageClassifier(module, prior, num_classes, (image_size, image_size, channels))
