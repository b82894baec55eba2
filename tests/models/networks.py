"""The same convolutional networks for both backends, and their images."""

import math
from functools import cache

import numpy as np
import torch

from bnn_ppl.models import checks
from bnn_ppl.models import numpyro as numpyro_models
from bnn_ppl.models import pyro as pyro_models
from bnn_ppl.models.numpyro import classifier as numpyro_classifier
from bnn_ppl.models.pyro import classifier as pyro_classifier
from bnn_ppl.numpyro import priors as numpyro_priors
from bnn_ppl.pyro import priors as pyro_priors

N = 6
Y = np.arange(N) % 3
SIZES = {"lenet5": 20, "vgg": 8}  # of the images; 8 for the others
RESNETS = {f"resnet_{n}": n for n in checks.NORMALIZATIONS}
CHANNELS = 2


def images(name, count=N):
    """Channels last."""
    size = SIZES.get(name, 8)
    return np.random.default_rng(1).normal(size=(count, size, size, CHANNELS))


def first_channels(x):
    return torch.tensor(np.moveaxis(x, -1, 1))


@cache
def model_pair(name):
    """The same network for NumPyro and for Pyro; ResNets have 8 layers, which compile in a third of the time."""
    if name == "lenet5":
        return tuple(m.lenet5(3, channels=CHANNELS, image_size=20) for m in (numpyro_models, pyro_models))
    if name == "vgg":
        options = {"channels": CHANNELS, "image_size": 8, "widths": (2, 4), "hidden": 5}
        return tuple(m.vgg(3, **options) for m in (numpyro_models, pyro_models))
    options = {"depth": 8, "channels": CHANNELS, "width": 4, "normalization": RESNETS[name]}
    of_jax = numpyro_classifier.build(lambda rngs: numpyro_models.ResNet(3, rngs=rngs, **options))
    of_torch = pyro_models.ResNet(3, **options)
    gain = math.sqrt(2)
    return (
        numpyro_classifier.ImageClassifier(of_jax, numpyro_priors.fan_in_normal(gain), 3, (8, 8, CHANNELS)),
        pyro_classifier.ImageClassifier(of_torch, pyro_priors.fan_in_normal(gain), 3, (CHANNELS, 8, 8)),
    )
