"""Which layers of Pyro models get local noise, and its law; mirrors tests/numpyro/test_local_layers.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.poutine.messenger import Messenger
from torch.nn import functional

from bnn_ppl.pyro import (
    local_reparameterization,
    random_torch_module,
)
from tests import local


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def outputs(model, guide, *args, sites=None):
    """What a model under local reparameterisation calls f."""
    model, guide = local_reparameterization(model, guide, sites=sites)
    guided = poutine.trace(guide).get_trace(*args)
    return poutine.trace(poutine.replay(model, guided)).get_trace(*args).nodes["f"]["value"].detach().numpy()


def guide_of(loc, scale):
    def guide(*args):
        pyro.sample("w", dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).to_event(loc.ndim))

    return guide


DENSE = {
    "matmul": lambda x, w: x @ w,
    "mm": lambda x, w: torch.mm(x, w),
    "transposed": lambda x, w: (w.T @ x.t()).T,
    "einsum": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None])[0],
    "linear": lambda x, w: functional.linear(x, w.t()),
    "by keywords": lambda x, w: functional.linear(x, weight=w.mT, bias=x.new_zeros(local.OUTPUTS)),
    "pieces": lambda x, w: torch.cat([x @ w[:, :1], x @ w[:, 1:]], -1),
    "reshaped": lambda x, w: x @ (-2.0 * -w.reshape(-1, 1).reshape(w.shape) / 2.0).to(x.dtype),
}


@pytest.mark.parametrize("layer", DENSE)
@pytest.mark.filterwarnings("ignore:the sites .* are in several layers")
def test_moments_of_a_dense_layer(layer):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2))
        pyro.deterministic("f", DENSE[layer](x, w))

    x = torch.as_tensor(local.ROW).expand(local.ROWS, local.INPUTS)
    found = outputs(model, guide_of(local.LOC, local.SCALE), x)
    mean, variance = local.dense(local.ROW, local.LOC), local.dense(local.ROW**2, local.SCALE**2)
    local.check_moments(found, mean, variance)


def test_layers_have_noise_of_their_own():
    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        pyro.deterministic("f", torch.cat([x @ pyro.sample(name, prior) for name in ("w", "v")], -1))

    def guide(x):
        for name in ("w", "v"):
            pyro.sample(name, dist.Normal(torch.as_tensor(local.LOC), torch.as_tensor(local.SCALE)).to_event(2))

    found = outputs(model, guide, torch.as_tensor(local.ROW).expand(local.ROWS, local.INPUTS))
    mean, variance = local.dense(local.ROW, local.LOC), local.dense(local.ROW**2, local.SCALE**2)
    local.check_moments(found, np.tile(mean, 2), np.tile(variance, 2))


FUNCTIONS = {
    "gate": lambda x, w: x @ (w * (w > 0)),
    "norm": lambda x, w: x @ (w / w.norm()),
    "silu": lambda x, w: x @ functional.silu(w),
    "square": lambda x, w: x @ w**2,
    "rows": lambda x, w: x @ w[np.array([0, 0, 1, 2])],
    "both": lambda x, w: x[:, : local.OUTPUTS] @ (w.T @ w),
    "summed": lambda x, w: torch.einsum("bti,io->bo", x[:, None].expand(-1, 2, -1), w),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_weights_are_of_the_draw(function):
    """What is no layer of the weights themselves has the same draw in each row."""

    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        v, w = pyro.sample("v", prior), pyro.sample("w", prior)
        pyro.deterministic("f", torch.cat([x @ v, FUNCTIONS[function](x, w)], -1))

    def guide(x):
        for name in ("v", "w"):
            pyro.sample(name, dist.Normal(torch.as_tensor(local.LOC), torch.as_tensor(local.SCALE)).to_event(2))

    spread = outputs(model, guide, torch.as_tensor(local.ROW).expand(local.ROWS, local.INPUTS)).std(0)
    assert spread[: local.OUTPUTS].min() > 0.1
    assert spread[local.OUTPUTS :].max() < 1e-9


def test_latents_of_rows_are_drawn():
    """Each enters several outputs of its row, which must stay dependent."""
    ones = torch.ones(1, 3)

    def model(x):
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([local.INPUTS, 3]).to_event(2))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 1]).to_event(1))
        pyro.deterministic("f", torch.cat([x @ v, z @ ones], -1))

    def guide(x):
        pyro.sample("v", dist.Normal(0.0, 1.0).expand([local.INPUTS, 3]).to_event(2))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 1]).to_event(1))

    found = outputs(model, guide, torch.ones(5, local.INPUTS))
    assert found[:, :3].std(0).min() > 0.1
    assert found[:, 3:].std(1).max() < 1e-9


def test_chosen_sites():
    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        pyro.deterministic("f", torch.cat([x @ pyro.sample(name, prior) for name in ("v", "w")], -1))

    def guide(x):
        for name in ("v", "w"):
            pyro.sample(name, dist.Normal(torch.as_tensor(local.LOC), torch.as_tensor(local.SCALE)).to_event(2))

    x = torch.as_tensor(local.ROW).expand(local.ROWS, local.INPUTS)
    for sites in (["v"], lambda name, shape: name == "v" and shape == (local.INPUTS, local.OUTPUTS)):
        spread = outputs(model, guide, x, sites=sites).std(0)
        assert spread[: local.OUTPUTS].min() > 0.1
        assert spread[local.OUTPUTS :].max() < 1e-9
    local.check_sites_refused(lambda sites: outputs(model, guide, x, sites=sites))
    with pytest.raises(ValueError, match=r"sites must be a list of names or a callable .* got 'v': give \['v'\]"):
        outputs(model, guide, x, sites="v")


CONVOLUTIONS = {
    "function": lambda x, w: functional.conv2d(x, w),
    "channels last": lambda x, w: functional.conv2d(x.float().contiguous(memory_format=torch.channels_last), w.float()),
    "transposed": lambda x, w: functional.conv_transpose2d(x, w.flip(-1, -2).transpose(0, 1), padding=local.WINDOW - 1),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_moments_of_a_convolution(kind):
    def model(x):
        shape = (local.WINDOW, local.WINDOW, local.INPUTS, local.OUTPUTS)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand(shape).to_event(4))
        y = CONVOLUTIONS[kind](x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1))
        pyro.deterministic("f", y.permute(0, 2, 3, 1))

    x = torch.as_tensor(local.IMAGE).expand(local.ROWS, *local.IMAGE.shape)
    found = outputs(model, guide_of(local.KERNEL_LOC, local.KERNEL_SCALE), x)
    mean = local.convolution(local.IMAGE, local.KERNEL_LOC)
    local.check_moments(found, mean, local.convolution(local.IMAGE**2, local.KERNEL_SCALE**2))


def test_moments_of_a_network():
    def model(x):
        net = random_torch_module(
            "net", torch.nn.Linear(local.INPUTS, local.OUTPUTS), lambda name, shape: dist.Normal(0.0, 1.0)
        )
        pyro.deterministic("f", net(x))

    x = torch.as_tensor(local.ROW).expand(local.ROWS, local.INPUTS)
    values = {"net.weight": torch.as_tensor(local.LOC.T), "net.bias": torch.ones(local.OUTPUTS)}
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=values), init_scale=0.3)
    guide(x)
    drawn = []

    class Keep(Messenger):
        def _pyro_post_sample(self, msg):
            if msg["name"] == "net.bias":
                drawn.append(msg["value"].detach().numpy())

    with Keep():
        found = outputs(model, guide, x)
    mean = local.dense(local.ROW, local.LOC) + drawn[0]  # drawn once
    local.check_moments(found, mean, local.dense(local.ROW**2, np.full(local.LOC.shape, 0.09)))


def scaled_in_place(x, w):
    w = w.clone()
    w *= 2.0
    return x @ w


def assigned(x, w):
    w = w.clone()
    w[1] = 0.0
    return x @ w


def with_out(x, w):
    return torch.matmul(x, w, out=torch.empty(len(x), local.OUTPUTS))


@pytest.mark.parametrize("layer", [scaled_in_place, assigned, with_out])
def test_changes_in_place_are_refused(layer):
    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        pyro.deterministic("f", layer(x, pyro.sample("w", prior)))

    with pytest.raises(ValueError, match=r"site 'w' is changed or written in place .* such as w \* mask"):
        outputs(model, guide_of(local.LOC, local.SCALE), torch.ones(2, local.INPUTS))


def test_what_a_model_returns_is_plain():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2))
        return {"w": w, "f": x @ w}

    model, guide = local_reparameterization(model, guide_of(local.LOC, local.SCALE))
    x = torch.ones(2, local.INPUTS)
    found = poutine.replay(model, poutine.trace(guide).get_trace(x))(x)
    assert {type(value) for value in found.values()} == {torch.Tensor}
