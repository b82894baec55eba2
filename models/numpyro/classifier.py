"""What the models of image classification for NumPyro share: an nnx module, its prior and its likelihood."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpyro
from flax import nnx
from numpyro.contrib.module import random_nnx_module

from bnn_ppl.parameters import center, fan_in_of, is_weight

from .inputs import check_data, float_dtype, minibatch, observe_labels


@dataclass(frozen=True, eq=False)
class ImageClassifier:
    """The model that :func:`lenet5`, :func:`vgg` and :func:`resnet20` return.

    Parameters
    ----------
    module : flax.nnx.Module
        Network from images (B, H, W, C) to logits (B, num_classes).
    prior : distribution, dict or callable
        Prior of its parameters, as of :func:`numpyro.contrib.module.random_nnx_module`.
    num_classes : int
        Number of classes.
    image_shape : tuple of int
        (H, W, C).
    """

    module: nnx.Module
    prior: Any
    num_classes: int
    image_shape: tuple[int, int, int]

    def __call__(self, x: Any, y: Any = None, *, subsample_size: int | None = None) -> Any:
        """Sample the sites; see the functions that make the model."""
        x, y = check_data(x, y, subsample_size, self.num_classes, self.image_shape)
        net = random_nnx_module("net", self.module, self.prior)
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x, y = minibatch(x, y, float_dtype(x))
            return observe_labels(net(x), y)


def build(make: Callable[[nnx.Rngs], Any]) -> Any:
    """A module whose initial values NumPy draws: weights N(0, 1 / fan-in), normalisation scales 1, the rest 0.

    The prior's draws take their place, but for parameters that a dict of priors leaves out. flax's initialisers would
    compile a program for each shape, which takes seconds.
    """
    rng = np.random.default_rng(0)

    def value(path: Any, like: Any) -> np.ndarray:
        name = ".".join(str(part.key) for part in path)
        if is_weight(name, like.shape):
            return rng.normal(0.0, fan_in_of(like.shape, outputs_first=False) ** -0.5, like.shape).astype(like.dtype)
        return np.full(like.shape, center(name, like.shape), like.dtype)

    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    values = jax.tree_util.tree_map_with_path(value, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, values))
    return nnx.merge(graph, state)
