"""The convolutional networks of both backends: equal densities, rows that do not mix, a few steps."""

import math
import pickle
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.handlers
import numpyro.infer
import pyro.infer
import pyro.poutine as poutine
import pytest
import torch
from flax import nnx
from jax import random
from numpyro.infer.util import log_density
from scipy.special import log_softmax
from scipy.stats import norm

from bnn_ppl.models import checks
from bnn_ppl.models import numpyro as numpyro_models
from bnn_ppl.models import pyro as pyro_models
from bnn_ppl.models.numpyro import normalization as numpyro_normalization
from bnn_ppl.models.pyro import normalization as pyro_normalization
from bnn_ppl.numpyro import SGHMC as NumPyroSGHMC
from bnn_ppl.numpyro import priors as numpyro_priors
from bnn_ppl.pyro import SGHMC as PyroSGHMC
from bnn_ppl.pyro import priors as pyro_priors
from tests.models.networks import CHANNELS, RESNETS, N, Y, first_channels, images, model_pair

rng = np.random.default_rng(0)
NAMES = ["lenet5", "vgg", *RESNETS]
GAINS = {"lenet5": 1.0}  # of the default prior; sqrt(2) for the others


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


@cache
def values_of(name):
    """A value for each of Pyro's sites: of the size of the prior, scales above 0."""
    generator = np.random.default_rng(2)
    values = {}
    for key, parameter in model_pair(name)[1].module.named_parameters():
        shape = tuple(parameter.shape)
        spread = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3
        center = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
        values[f"net.{key}"] = generator.normal(center, spread, shape)
    return values


def for_numpyro(values):
    """Pyro's values under NumPyro's names and in flax's layout."""
    flat = values.get("net.conv2.weight", values.get("net.convs.3.weight"))  # before the dense layer
    converted = {}
    for site, value in values.items():
        layer, kind = site.removeprefix("net.").rsplit(".", 1)
        if layer == "hidden" and kind == "weight":
            side = math.isqrt(value.shape[1] // flat.shape[0])
            value = value.reshape(-1, flat.shape[0], side, side).transpose(2, 3, 1, 0).reshape(-1, len(value))
        elif value.ndim > 1:
            value = value.transpose(*range(2, value.ndim), 1, 0)
        kind = {"weight": "kernel" if value.ndim > 1 else "scale"}.get(kind, kind)
        converted[f"net/{layer}.{kind}"] = value
    return converted


@cache
def compiled(name, size=None):
    """Compiled function of NumPyro's sites, data and rows: log density, log likelihood and log probabilities by row."""
    model = model_pair(name)[0]

    def run(values, x, y, rows):
        fixed = numpyro.handlers.substitute(model, {**values, **({"data": rows} if size else {})})
        seeded = numpyro.handlers.seed(fixed, random.key(0))
        total, trace = log_density(seeded, (x, y), {"subsample_size": size}, {})
        return total, trace["y"]["fn"].log_prob(trace["y"]["value"]), jax.nn.log_softmax(trace["y"]["fn"].logits)

    return jax.jit(run)


def numpyro_densities(name, x, y, rows=None):
    values = {site: jnp.asarray(value) for site, value in for_numpyro(values_of(name)).items()}
    size = None if rows is None else len(rows)
    return compiled(name, size)(values, jnp.asarray(x), jnp.asarray(y), jnp.asarray([0] if rows is None else rows))


def pyro_densities(name, x, y, rows=None):
    data = {site: torch.tensor(value) for site, value in values_of(name).items()}
    if rows is not None:
        data["data"] = torch.tensor(rows)
    model = poutine.trace(poutine.condition(model_pair(name)[1], data))
    trace = model.get_trace(first_channels(x), torch.tensor(y), subsample_size=None if rows is None else len(rows))
    node = trace.nodes["y"]
    return trace.log_prob_sum().item(), node["fn"].log_prob(node["value"]), node["fn"].logits  # torch normalises them


@pytest.mark.parametrize(("name", "rows"), [("vgg", [4, 1, 3]), *((name, None) for name in NAMES)])
def test_log_density_agrees(name, rows):
    x = images(name)
    expected = numpyro_densities(name, x, Y, rows)
    found = pyro_densities(name, x, Y, rows)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-9)
    assert np.std(found[2].numpy(), axis=0).min() > 1e-3  # they depend on the images


@pytest.mark.parametrize("name", NAMES)
def test_log_density_is_prior_and_likelihood(name):
    """The default prior by hand; the likelihood of the bare module's outputs."""
    values, x = values_of(name), images(name)
    total = 0.0
    for site, value in values.items():
        if value.ndim > 1:
            scale = GAINS.get(name, math.sqrt(2)) / math.sqrt(math.prod(value.shape[1:]))
            total += norm.logpdf(value, scale=scale).sum()
        else:
            total += norm.logpdf(value, loc=float(site.endswith("weight")), scale=1).sum()
    parameters = {site.removeprefix("net."): torch.tensor(value) for site, value in values.items()}
    logits = torch.func.functional_call(model_pair(name)[1].module.double(), parameters, (first_channels(x),))
    total += log_softmax(logits.detach().numpy(), axis=1)[np.arange(N), Y].sum()
    assert pyro_densities(name, x, Y)[0] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent(name):
    """The likelihood of a row does not change with the other rows; with batch statistics it does."""
    x = images(name)
    other = x.copy()
    other[1:] = 3 * x[1:] + 1
    for densities in (numpyro_densities, pyro_densities):
        before, after = densities(name, x, Y)[1], densities(name, other, Y)[1]
        assert abs(before[1] - after[1]) > 1e-3
        changed = abs(before[0] - after[0])
        assert changed > 1e-3 if name == "resnet_batch" else changed < 1e-12


def test_filter_response_norm_and_its_threshold():
    x = rng.normal(size=(3, 4, 5, 2)) * [1.0, 1e-3]  # where epsilon counts, too
    scale, bias, threshold = [0.7, -1.3], [0.2, -0.1], [-0.3, 0.4]
    normalized = x / np.sqrt((x**2).mean((1, 2), keepdims=True) + 1e-6) * scale + bias
    expected = np.maximum(normalized, threshold)

    norm_layer = numpyro_normalization.FilterResponseNorm(2)
    activation = numpyro_normalization.ThresholdedLinear(2)
    norm_layer.scale[...], norm_layer.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    activation.threshold[...] = jnp.asarray(threshold)
    np.testing.assert_allclose(norm_layer(jnp.asarray(x)), normalized, rtol=1e-12)
    np.testing.assert_allclose(activation(norm_layer(jnp.asarray(x))), expected, rtol=1e-12)

    norm_layer = pyro_normalization.FilterResponseNorm(2).double()
    activation = pyro_normalization.ThresholdedLinear(2).double()
    values = ((norm_layer.weight, scale), (norm_layer.bias, bias), (activation.threshold, threshold))
    for parameter, value in values:
        parameter.data = torch.tensor(value, dtype=torch.float64)
    found = norm_layer(first_channels(x))
    np.testing.assert_allclose(np.moveaxis(found.detach().numpy(), 1, -1), normalized, rtol=1e-12)
    found = activation(found).detach().numpy()
    np.testing.assert_allclose(np.moveaxis(found, 1, -1), expected, rtol=1e-12, atol=1e-15)


def shapes_of(module):
    """Parameters' shapes by name, of a torch module or an abstract nnx one."""
    if isinstance(module, torch.nn.Module):
        return {name: tuple(value.shape) for name, value in module.named_parameters()}
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): value.shape for path, value in state}


@pytest.mark.parametrize(
    ("name", "options", "count", "weights"),
    [
        ("LeNet5", {}, 431_080, 20 * 25 + 50 * 20 * 25 + 500 * 800 + 10 * 500),
        ("VGG", {}, 550_570, 9 * (3 * 32 + 32**2 + 32 * 64 + 64**2 + 64 * 128 + 128**2) + 128 * 2048 + 1280),
        # The paper's 0.27 million.
        ("ResNet", {"normalization": "batch"}, 268_346 + 2 * 688, 268_336),
        ("ResNet", {"normalization": "group"}, 268_346 + 2 * 688, 268_336),
        ("ResNet", {}, 268_346 + 3 * 688, 268_336),
        ("ResNet", {"normalization": None}, 268_346 + 688, 268_336),
    ],
)
def test_number_of_parameters(name, options, count, weights):
    of_torch = getattr(pyro_models, name)(**options)
    of_jax = nnx.eval_shape(lambda: getattr(numpyro_models, name)(rngs=nnx.Rngs(0), **options))
    for module in (of_torch, of_jax):
        shapes = shapes_of(module).values()
        assert sum(map(math.prod, shapes)) == count
        assert sum(math.prod(shape) for shape in shapes if len(shape) > 1) == weights
    x = np.zeros((2, 28, 28, 1) if name == "LeNet5" else (2, 32, 32, 3))
    assert of_torch(first_channels(x)).shape == (2, 10)
    graph, state = nnx.split(of_jax)
    assert jax.eval_shape(lambda state: nnx.merge(graph, state)(x), state).shape == (2, 10)


def test_the_functions_make_the_networks_of_the_papers():
    for name, image_shape in (("lenet5", (1, 28, 28)), ("vgg", (3, 32, 32)), ("resnet20", (3, 32, 32))):
        of_numpyro, of_pyro = getattr(numpyro_models, name)(), getattr(pyro_models, name)()
        assert shapes_of(of_pyro.module) == shapes_of(type(of_pyro.module)())
        assert len(shapes_of(of_numpyro.module)) == len(shapes_of(of_pyro.module))
        assert (of_pyro.num_classes, of_pyro.image_shape) == (10, image_shape)
        assert (of_numpyro.num_classes, of_numpyro.image_shape) == (10, (*image_shape[1:], image_shape[0]))
        for scale in (of_numpyro.prior("a.kernel", (50, 2)).scale, of_pyro.prior("a.weight", (2, 50)).scale):
            assert float(scale) == pytest.approx(GAINS.get(name, math.sqrt(2)) / math.sqrt(50), rel=1e-6)


def test_initial_values_of_nnx_modules():
    """What a dict of priors leaves out starts as flax has it."""
    model = numpyro_models.resnet20()
    state = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model.module))}
    assert (state["norm.scale"] == 1).all()
    assert (state["norm.bias"] == 0).all()
    weights = state["blocks.8.conv2.kernel"]
    assert weights.dtype == jnp.float32
    assert np.std(weights) == pytest.approx(1 / math.sqrt(9 * 64), rel=0.05)


@pytest.mark.parametrize("normalization", checks.NORMALIZATIONS)
@pytest.mark.filterwarnings("ignore:normalization='batch'")
def test_sites_and_prior(normalization):
    """The same sites on both backends, a prior of one's own, and no state beside them."""
    options = {"channels": 1, "image_size": 8, "width": 1, "normalization": normalization}
    of_numpyro = numpyro_models.resnet20(3, prior=numpyro_priors.normal(2.0), **options)
    of_pyro = pyro_models.resnet20(3, prior=pyro_priors.normal(2.0), **options)
    drawn = poutine.trace(of_pyro).get_trace(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
    sites = {site: drawn.nodes[site] for site in drawn.stochastic_nodes if site != "data"}
    assert all((site["fn"].base_dist.scale == 2).all() and not site["cond_indep_stack"] for site in sites.values())

    trace = numpyro.handlers.trace(numpyro.handlers.seed(of_numpyro, 0))
    jax.eval_shape(lambda: trace.get_trace(jnp.zeros((2, 8, 8, 1)), jnp.array([0, 1]))["y"]["fn"].logits)
    assert {message["type"] for message in trace.trace.values()} == {"param", "sample", "plate"}
    shapes = {site: message["value"].shape for site, message in trace.trace.items() if message["type"] == "sample"}
    assert shapes.pop("y") == (2,)
    expected = for_numpyro({site: message["value"].numpy() for site, message in sites.items()})
    assert shapes == {site: value.shape for site, value in expected.items()}


@pytest.mark.parametrize("name", ["lenet5", "vgg", pytest.param("resnet_filter_response", marks=pytest.mark.slow)])
def test_kernels_run(name):
    x = images(name)
    kernel = PyroSGHMC(model_pair(name)[1], step_size=1e-4, friction=10.0, steps_per_draw=2)
    mcmc = pyro.infer.MCMC(kernel, num_samples=3, warmup_steps=1, disable_progbar=True)
    mcmc.run(first_channels(x), torch.tensor(Y), subsample_size=4)
    check_draws(mcmc.get_samples(), {site: value.shape for site, value in values_of(name).items()})

    values = for_numpyro(values_of(name))  # with which the kernel compiles faster than with draws
    kernel = NumPyroSGHMC(model_pair(name)[0], step_size=1e-4, friction=10.0, init_strategy=values)
    mcmc = numpyro.infer.MCMC(kernel, num_warmup=0, num_samples=3, progress_bar=False)
    mcmc.run(random.key(0), x, Y, subsample_size=4, extra_fields=("diverging", "lp_minibatch"))
    draws = {site: value for site, value in mcmc.get_samples().items() if "$" not in site}
    check_draws(draws, {site: value.shape for site, value in values.items()})
    fields = mcmc.get_extra_fields()
    assert np.isfinite(fields["lp_minibatch"]).all()
    assert not fields["diverging"].any()


def check_draws(draws, shapes):
    assert {site: tuple(value.shape[1:]) for site, value in draws.items()} == shapes
    for value in draws.values():
        assert np.isfinite(np.asarray(value)).all()
        assert (np.asarray(value[0]) != np.asarray(value[-1])).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_pyro_follows_the_dtype_of_the_images(dtype):
    torch.set_default_dtype(torch.float32)
    model = pyro_models.vgg(3, channels=1, image_size=4, widths=(2,), hidden=3)
    expected = torch.float64 if dtype == np.float64 else torch.float32
    trace = poutine.trace(model).get_trace(torch.tensor(np.ones((2, 1, 4, 4), dtype)))
    assert trace.nodes["net.convs.0.weight"]["value"].dtype == expected
    assert trace.nodes["y"]["fn"].logits.dtype == expected


def test_numpyro_takes_integer_images():
    expected, found = (
        numpyro_densities("vgg", np.full((2, 8, 8, CHANNELS), 3, dtype), Y[:2])[0] for dtype in (float, np.uint8)
    )
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["lenet5", "resnet_filter_response", "resnet_None"])
def test_pickles(name):
    """Pyro's chains go to other processes so."""
    for model in model_pair(name):
        again = pickle.loads(pickle.dumps(model))
        assert again.image_shape == model.image_shape
        assert shapes_of(again.module) == shapes_of(model.module)


def test_prior_draws():
    """With y=None both backends sample y, of N values or of a minibatch's."""
    of_numpyro, of_pyro = model_pair("vgg")
    x = images("vgg")
    for size, count in ((None, N), (4, 4)):
        seeded = numpyro.handlers.seed(of_numpyro, 0)
        drawn = jax.eval_shape(lambda: seeded(x, subsample_size=size))  # noqa: B023
        assert drawn.shape == (count,)
        assert jnp.issubdtype(drawn.dtype, jnp.integer)
        assert set(of_pyro(first_channels(x), subsample_size=size).tolist()) <= {0, 1, 2}
        assert of_pyro(first_channels(x), subsample_size=size).shape == (count,)


def test_without_flax():
    """The other models work, and the networks name what to install."""
    code = """
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "flax":
                    raise ModuleNotFoundError("No module named 'flax'", name=name)

        sys.meta_path.insert(0, Absent())
        from bnn_ppl.models.numpyro import mlp_classification
        mlp_classification()
        assert "flax" not in sys.modules
        from bnn_ppl.models.numpyro import lenet5
    """
    lines = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    ran = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=300, check=False)
    assert "bnn_ppl.models.numpyro.lenet5 needs flax: pip install 'bnn_ppl[models]'." in ran.stderr
    with pytest.raises(AttributeError, match="no attribute 'lenet6'"):
        numpyro_models.lenet6  # noqa: B018
