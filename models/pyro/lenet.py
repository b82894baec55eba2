"""LeNet-5 for Pyro, in the form of Caffe: 20 and 50 filters, 500 hidden units, 431,080 parameters on MNIST.

The convolutions are linear, as in Caffe's; max-pooling and the ReLU of the hidden layer are what is not. Reference:
LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition (1998).
"""

from typing import Any

import torch
import torch.nn.functional as F

from bnn_ppl.pyro import priors

from ..checks import check_count
from .classifier import ImageClassifier


class LeNet5(torch.nn.Module):
    """LeNet-5: conv 5x5 20, pool, conv 5x5 50, pool, dense 500, dense num_classes.

    Parameters
    ----------
    num_classes : int
        Number of outputs.
    channels : int
        C of the images (B, C, H, W).
    image_size : int
        H and W, at least 16.

    Raises
    ------
    ValueError
        If an argument is no integer, or too small.
    """

    def __init__(self, num_classes: int = 10, *, channels: int = 1, image_size: int = 28):
        check_count("num_classes", num_classes, least=2)
        check_count("channels", channels)
        check_count("image_size", image_size, least=16)
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, 20, 5)
        self.conv2 = torch.nn.Conv2d(20, 50, 5)
        side = ((image_size - 4) // 2 - 4) // 2
        self.hidden = torch.nn.Linear(50 * side**2, 500)
        self.output = torch.nn.Linear(500, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (B, num_classes), of images (B, C, H, W)."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.output(F.relu(self.hidden(x.flatten(1))))


def lenet5(num_classes: int = 10, *, channels: int = 1, image_size: int = 28, prior: Any = None) -> ImageClassifier:
    """Classification of images by a LeNet-5.

    Parameters
    ----------
    num_classes : int
        Number of classes.
    channels : int
        C of the images (N, C, H, W): 1 for grey ones.
    image_size : int
        H and W, at least 16; the default is that of MNIST.
    prior : distribution, dict or callable, or None
        Prior of the parameters, as of :func:`bnn_ppl.pyro.random_torch_module`. None is
        ``priors.fan_in_normal()``: weights N(0, 1 / fan-in), biases N(0, 1).

    Returns
    -------
    ImageClassifier
        A model ``model(x, y=None, *, subsample_size=None)`` of images (N, C, H, W) and integer labels (N,) from 0 to
        num_classes - 1, with a site ``net.conv1.weight``, ``net.conv1.bias``, ... for each parameter of its
        ``module``, a :class:`LeNet5`, and ``y`` in the plate ``data``. With ``y=None`` it samples ``y``. The call
        raises ValueError where the data do not fit.

    Raises
    ------
    ValueError
        If an argument is no integer, or too small.
    """
    module = LeNet5(num_classes, channels=channels, image_size=image_size)
    prior = priors.fan_in_normal() if prior is None else prior
    return ImageClassifier(module, prior, num_classes, (channels, image_size, image_size))
