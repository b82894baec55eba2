"""The convolutional networks of both backends: what they refuse, and what they tell."""

import jax
import numpy as np
import numpyro.handlers
import pyro.poutine as poutine
import pytest
import torch
from flax import nnx

from bnn_ppl.models import numpyro as numpyro_models
from bnn_ppl.models import pyro as pyro_models
from tests.models.networks import N, Y, first_channels, images, model_pair


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("models", [numpyro_models, pyro_models], ids=["numpyro", "pyro"])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.lenet5(1), "num_classes=1.*at least 2"),
        (lambda m: m.lenet5(channels=0), "channels=0"),
        (lambda m: m.lenet5(image_size=15), "image_size=15.*at least 16"),
        (lambda m: m.lenet5(image_size=(28, 28)), r"image_size=\(28, 28\).*integer"),
        (lambda m: m.vgg(image_size=7), "image_size=7.*at least 8"),
        (lambda m: m.vgg(widths=32), r"widths=32.*widths=\("),
        (lambda m: m.vgg(widths=(32, 0)), "each width in widths=0"),
        (lambda m: m.vgg(hidden=2.5), "hidden=2.5"),
        (
            lambda m: m.resnet20(normalization="layer"),
            "normalization='layer'.*'filter_response', 'group', 'batch', None",
        ),
        (lambda m: m.resnet20(image_size=4), "image_size=4.*at least 8"),
        (lambda m: m.resnet20(width=0), "width=0"),
    ],
)
def test_bad_options(models, call, words):
    with pytest.raises(ValueError, match=words):
        call(models)


@pytest.mark.parametrize("depth", [2, 19, 20.0])
def test_bad_depth(depth):
    for call in (lambda: pyro_models.ResNet(depth=depth), lambda: numpyro_models.ResNet(depth=depth, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match=rf"depth={depth}: give"):
            call()


def test_batch_normalization_warns():
    for models in (numpyro_models, pyro_models):
        with pytest.warns(UserWarning, match="likelihood of a row depend.*'filter_response' or 'group'") as caught:
            models.resnet20(2, channels=1, image_size=8, width=1, normalization="batch")
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.zeros((N, 8, 8)), Y, r"x has shape \(6, 8, 8\): give images of shape \(N, {shape}\)"),
        (np.zeros((N, 128)), Y, r"x has shape \(6, 128\)"),
        (np.zeros((N, 7, 8, 2)), Y, r"channels and image_size"),
        (np.zeros((N, 9, 9, 2)), Y, r"give images of shape \(N, {shape}\)"),
        (np.zeros((N, 8, 8, 1)), Y, r"give images of shape \(N, {shape}\)"),
        (np.zeros((N, 2, 8, 4, 2)), Y, r"give images of shape \(N, {shape}\)"),
        (np.zeros((0, 8, 8, 2)), Y[:0], "at least one row"),
        (np.zeros((N, 8, 8, 2)), Y[:4], r"y has shape \(4,\)"),
        (np.zeros((N, 8, 8, 2)), Y * 1.0, "y has dtype.*integer labels"),
    ],
)
def test_bad_data(x, y, words):
    of_numpyro, of_pyro = model_pair("vgg")
    with pytest.raises(ValueError, match=words.format(shape="8, 8, 2")):
        numpyro.handlers.seed(of_numpyro, 0)(x, y)
    with pytest.raises(ValueError, match=words.format(shape="2, 8, 8")):
        of_pyro(first_channels(x) if x.ndim > 3 else torch.tensor(x), torch.tensor(y))


def test_channels_in_the_other_backends_place():
    of_numpyro, of_pyro = model_pair("vgg")
    x = images("vgg")
    with pytest.raises(ValueError, match=r"x has shape \(6, 2, 8, 8\): give images of shape \(N, 8, 8, 2\)"):
        numpyro.handlers.seed(of_numpyro, 0)(np.moveaxis(x, -1, 1), Y)
    with pytest.raises(ValueError, match=r"x has shape \(6, 8, 8, 2\): give images of shape \(N, 2, 8, 8\)"):
        of_pyro(torch.tensor(x), torch.tensor(Y))


def test_labels_out_of_range():
    of_numpyro, of_pyro = model_pair("vgg")
    x = images("vgg")
    with pytest.raises(ValueError, match="y has labels from 0 to 3 with num_classes=3"):
        numpyro.handlers.seed(of_numpyro, 0)(x, np.arange(N) % 4)
    with pytest.raises(ValueError, match="support"):
        poutine.trace(of_pyro).get_trace(first_channels(x), torch.tensor(np.arange(N) % 4)).log_prob_sum()
