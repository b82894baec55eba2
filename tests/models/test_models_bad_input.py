"""The models of both backends: what they refuse, and what they tell."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.handlers
import pyro.poutine as poutine
import pytest
import torch
from jax import random

from bnn_ppl.models import numpyro as numpyro_models
from bnn_ppl.models import pyro as pyro_models
from tests.models.data import BINARY, LABELS, TARGETS, D, N, X


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("models", [numpyro_models, pyro_models], ids=["numpyro", "pyro"])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.mlp_regression(activation="rleu"), "activation='rleu'.*relu"),
        (lambda m: m.mlp_classification(activation=None), "activation=None"),
        (lambda m: m.mlp_regression(hidden=50), r"hidden=50.*hidden=\(50,\)"),
        (lambda m: m.mlp_regression(hidden=(5, 0)), "hidden=0"),
        (lambda m: m.mlp_regression(hidden=(5, 2.5)), "hidden=2.5"),
        (lambda m: m.mlp_regression(hidden="55"), "hidden='55'"),
        (lambda m: m.mlp_classification(num_classes=1), "num_classes=1.*at least 2"),
        (lambda m: m.logistic_regression(num_classes=2.5), "num_classes=2.5"),
        (lambda m: m.logistic_regression(prior_scale=0), "prior_scale=0"),
        (lambda m: m.linear_regression(noise_scale=-1.0), "noise_scale=-1.0"),
        (lambda m: m.linear_regression(noise_prior_scale=float("inf")), "noise_prior_scale=inf"),
        (lambda m: m.mlp_regression(prior_scale="1"), "prior_scale='1'"),
    ],
)
def test_bad_options(models, call, words):
    with pytest.raises(ValueError, match=words):
        call(models)


@pytest.mark.parametrize("to_array", [jnp.asarray, np.asarray, torch.as_tensor])
@pytest.mark.parametrize(
    ("name", "x", "y", "size", "words"),
    [
        ("linear_regression", X, TARGETS[:-1], None, r"y has shape \(11,\) with x of shape \(12, 3\)"),
        ("mlp_regression", X, TARGETS[:, None], None, r"y has shape \(12, 1\).*y.reshape\(-1\)"),
        ("mlp_classification", X, np.eye(10, dtype=int)[LABELS], None, "y has shape.*integer labels"),
        ("mlp_classification", X.reshape(N, D, 1), LABELS, None, r"x has shape \(12, 3, 1\).*reshape"),
        ("linear_regression", X[:, 0], TARGETS, None, r"x has shape \(12,\)"),
        ("linear_regression", X[:0], TARGETS[:0], None, "at least one row"),
        ("mlp_classification", X, LABELS * 1.0, None, "y has dtype.*float64.*integer labels"),
        ("logistic_regression", X, BINARY * 1.0, None, "y has dtype.*float64.*integer labels"),
        ("mlp_regression", X, TARGETS, 13, "subsample_size=13.*12 rows"),
        ("mlp_regression", X, TARGETS, 0, "subsample_size=0"),
        ("mlp_regression", X, TARGETS, 2.0, "subsample_size=2.0"),
    ],
)
def test_bad_data(to_array, name, x, y, size, words):
    models = pyro_models if to_array is torch.as_tensor else numpyro_models
    model = getattr(models, name)()
    if models is numpyro_models:
        model = numpyro.handlers.seed(model, random.key(0))
    with pytest.raises(ValueError, match=words):
        model(to_array(x), to_array(y), subsample_size=size)


def test_labels_out_of_range():
    of_numpyro = numpyro.handlers.seed(numpyro_models.mlp_classification(num_classes=3), random.key(0))
    for y in (LABELS, jnp.asarray(LABELS)):
        with pytest.raises(ValueError, match="y has labels from 0 to 3 with num_classes=3"):
            of_numpyro(X, y)
        with pytest.raises(ValueError, match="y has labels from 0 to 3 with num_classes=3"):
            jax.jit(lambda x, y=y: of_numpyro(x, y))(X)  # closed over: known while tracing
    of_numpyro(X, LABELS % 3)
    jax.jit(of_numpyro)(X, LABELS)  # traced: unknown
    with pytest.raises(ValueError, match="support"):
        poutine.trace(pyro_models.mlp_classification(num_classes=3)).get_trace(
            torch.tensor(X), torch.tensor(LABELS)
        ).log_prob_sum()


def test_pyro_refuses_numpy():
    model = pyro_models.linear_regression()
    with pytest.raises(ValueError, match=r"x is a ndarray: give a tensor, torch.as_tensor\(x\)"):
        model(X, torch.tensor(TARGETS))
    with pytest.raises(ValueError, match=r"y is a ndarray: give a tensor"):
        model(torch.tensor(X), TARGETS)
