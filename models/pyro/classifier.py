"""What the models of image classification for Pyro share: a torch module, its prior and its likelihood."""

from dataclasses import dataclass
from typing import Any

import pyro
import torch

from bnn_ppl.pyro import random_torch_module

from .inputs import check_data, float_like, minibatch, observe_labels


@dataclass(frozen=True, eq=False)
class ImageClassifier:
    """The model that :func:`lenet5`, :func:`vgg` and :func:`resnet20` return.

    Parameters
    ----------
    module : torch.nn.Module
        Network from images (B, C, H, W) to logits (B, num_classes). The model moves it to the dtype and device of
        the images.
    prior : distribution, dict or callable
        Prior of its parameters, as of :func:`bnn_ppl.pyro.random_torch_module`.
    num_classes : int
        Number of classes.
    image_shape : tuple of int
        (C, H, W).
    """

    module: torch.nn.Module
    prior: Any
    num_classes: int
    image_shape: tuple[int, int, int]

    def __call__(self, x: Any, y: Any = None, *, subsample_size: int | None = None) -> Any:
        """Sample the sites; see the functions that make the model."""
        x, y = check_data(x, y, subsample_size, self.num_classes, self.image_shape)
        like = float_like(x)
        first = next(self.module.parameters())
        if (first.dtype, first.device) != (like.dtype, like.device):
            self.module.to(like)
        net = random_torch_module("net", self.module, self.prior)
        with pyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x, y = minibatch(x, y, like)
            return observe_labels(net(x), y)
