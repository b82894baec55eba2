r"""Normalisations of convolutional networks, for torch.

With x the activations of one image in one channel, :math:`\nu^2 = \text{mean}(x^2)` over its pixels,

.. math::
    y = \gamma x / \sqrt{\nu^2 + \epsilon} + \beta, \qquad z = \max(y, \tau)

is filter response normalisation and its thresholded linear unit (Singh and Krishnan, Filter Response Normalization
Layer, 2020). It and group normalisation (Wu and He, 2018) treat each image by itself, as a likelihood that
factorises over the data asks for; batch normalisation does not.
"""

import math

import torch


class FilterResponseNorm(torch.nn.Module):
    """Filter response normalisation with one scale and one shift per channel, of images (B, C, H, W).

    Parameters
    ----------
    channels : int
        C.
    epsilon : float
        Added to the mean square, 1e-6 as in the paper.
    """

    def __init__(self, channels: int, epsilon: float = 1e-6):
        super().__init__()
        self.epsilon = epsilon
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images, shape (B, C, H, W)."""
        mean_square = x.square().mean((-2, -1), keepdim=True)
        scale = self.weight[:, None, None] * torch.rsqrt(mean_square + self.epsilon)
        return x * scale + self.bias[:, None, None]


class ThresholdedLinear(torch.nn.Module):
    """Maximum of the input and a threshold per channel, which starts at 0 (a ReLU), of images (B, C, H, W).

    Parameters
    ----------
    channels : int
        C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activations, shape (B, C, H, W)."""
        threshold = self.threshold[:, None, None]
        return torch.relu(x - threshold) + threshold  # ten times as fast as torch.maximum, whose gradient is slow


def normalization_layer(normalization: str | None, channels: int) -> torch.nn.Module:
    """The layer of this name; groups are 8, or fewer where 8 does not divide the channels."""
    if normalization == "filter_response":
        return FilterResponseNorm(channels)
    if normalization == "group":
        return torch.nn.GroupNorm(math.gcd(8, channels), channels)
    if normalization == "batch":
        return torch.nn.BatchNorm2d(channels, track_running_stats=False)
    return torch.nn.Identity()


def activation_layer(normalization: str | None, channels: int) -> torch.nn.Module:
    """The activation that belongs to a normalisation: a thresholded linear unit, or ReLU."""
    return ThresholdedLinear(channels) if normalization == "filter_response" else torch.nn.ReLU()
