"""ResNet-20 for Pyro, in the form for CIFAR: 0.27 million parameters.

A 3x3 convolution, three stages of three residual blocks x -> act(x + f(x)) of two 3x3 convolutions, with 16, 32 and
64 filters, the mean over the pixels, a dense layer. The first block of the second and third stage has stride 2; there
the shortcut takes every second pixel and fills up the channels with zeros (option A). Reference: He, Zhang, Ren and
Sun, Deep residual learning for image recognition (2016), section 4.2.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from bnn_ppl.pyro import priors

from ..checks import HE_GAIN, check_count, check_depth, check_normalization, warn_of_batch_statistics
from .classifier import ImageClassifier
from .normalization import activation_layer, normalization_layer


def _conv(channels: int, filters: int, stride: int, normalization: str | None) -> torch.nn.Module:
    """A padded 3x3 convolution, with a bias where no normalisation follows that has one."""
    return torch.nn.Conv2d(channels, filters, 3, stride, padding=1, bias=normalization is None)


class _Block(torch.nn.Module):
    """A residual block."""

    def __init__(self, channels: int, filters: int, normalization: str | None):
        super().__init__()
        self.stride = 1 if channels == filters else 2
        self.extra = filters - channels
        self.conv1 = _conv(channels, filters, self.stride, normalization)
        self.norm1 = normalization_layer(normalization, filters)
        self.act1 = activation_layer(normalization, filters)
        self.conv2 = _conv(filters, filters, 1, normalization)
        self.norm2 = normalization_layer(normalization, filters)
        self.act2 = activation_layer(normalization, filters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activations (B, filters, H / stride, W / stride) from (B, channels, H, W)."""
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        x = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(x)) + shortcut)


class ResNet(torch.nn.Module):
    """Residual network for small images, with a normalisation after each convolution.

    Parameters
    ----------
    num_classes : int
        Number of outputs.
    depth : int
        Layers with weights, 6 n + 2 for n blocks in each of the three stages.
    channels : int
        C of the images (B, C, H, W).
    width : int
        Filters of the first stage; the others have 2 and 4 times as many.
    normalization : str or None
        ``"filter_response"`` (Singh and Krishnan 2020; its thresholded linear units take the place of the ReLUs),
        ``"group"`` (8 groups), ``"batch"`` or None, where convolutions have biases instead. ``"batch"`` takes the
        statistics of the batch it is called on, in training and afterwards; it keeps no running averages.

    Raises
    ------
    ValueError
        If a number does not fit, or the normalisation is unknown.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        depth: int = 20,
        channels: int = 3,
        width: int = 16,
        normalization: str | None = "filter_response",
    ):
        check_count("num_classes", num_classes, least=2)
        check_depth(depth)
        check_count("channels", channels)
        check_count("width", width)
        check_normalization(normalization)
        super().__init__()
        self.conv = _conv(channels, width, 1, normalization)
        self.norm = normalization_layer(normalization, width)
        self.act = activation_layer(normalization, width)
        n = (depth - 2) // 6
        sizes = [width] * (n + 1) + [2 * width] * n + [4 * width] * n
        self.blocks = torch.nn.ModuleList(_Block(a, b, normalization) for a, b in pairwise(sizes))
        self.output = torch.nn.Linear(4 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (B, num_classes), of images (B, C, H, W)."""
        x = self.act(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.output(x.mean((-2, -1)))


def resnet20(
    num_classes: int = 10,
    *,
    channels: int = 3,
    image_size: int = 32,
    width: int = 16,
    normalization: str | None = "filter_response",
    prior: Any = None,
) -> ImageClassifier:
    """Classification of images by a ResNet-20.

    Parameters
    ----------
    num_classes : int
        Number of classes.
    channels : int
        C of the images (N, C, H, W): 1 for grey ones.
    image_size : int
        H and W, at least 8; the default is that of CIFAR.
    width : int
        Filters of the first stage; the others have 2 and 4 times as many.
    normalization : str or None
        ``"filter_response"`` (Singh and Krishnan 2020; its thresholded linear units take the place of the ReLUs),
        ``"group"`` (8 groups), ``"batch"`` or None, where convolutions have biases instead. ``"batch"`` makes the
        likelihood of a row depend on the other rows of its minibatch, and a prediction on those predicted with it:
        there is then no posterior that minibatch gradients belong to, and the function warns.
    prior : distribution, dict or callable, or None
        Prior of the parameters, as of :func:`bnn_ppl.pyro.random_torch_module`. None is
        ``priors.fan_in_normal(gain=2**0.5)``: weights N(0, 2 / fan-in), for layers of ReLU, normalisation scales
        N(1, 1), the rest N(0, 1).

    Returns
    -------
    ImageClassifier
        A model ``model(x, y=None, *, subsample_size=None)`` of images (N, C, H, W) and integer labels (N,) from 0 to
        num_classes - 1, with a site ``net.conv.weight``, ..., ``net.blocks.8.conv2.weight``, ... for each parameter
        of its ``module``, a :class:`ResNet`, and ``y`` in the plate ``data``. With ``y=None`` it samples ``y``. The
        call raises ValueError where the data do not fit.

    Raises
    ------
    ValueError
        If a number does not fit, or the normalisation is unknown.
    """
    check_count("image_size", image_size, least=8)
    module = ResNet(num_classes, channels=channels, width=width, normalization=normalization)
    if normalization == "batch":
        warn_of_batch_statistics()
    prior = priors.fan_in_normal(gain=HE_GAIN) if prior is None else prior
    return ImageClassifier(module, prior, num_classes, (channels, image_size, image_size))
