"""Priors of flax and equinox networks: their laws in closed form, by kind of parameter, and in models' hands."""

import pickle
from functools import partial

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.handlers import seed, substitute, trace
from scipy import stats

from bnn_ppl.numpyro import priors

# Name, shape, fan-in (None: no weight) and centre of each kind of parameter.
KINDS = {
    "flax dense": ("Dense_0.kernel", (784, 50), 784, 0.0),
    "flax convolution": ("Conv_0.kernel", (5, 5, 3, 8), 75, 0.0),
    "flax grouped convolution": ("Conv_0.kernel", (3, 2, 6), 6, 0.0),
    "the user's matrix": ("w", (9, 1), 9, 0.0),
    "equinox dense": ("layers[0].weight", (50, 784), 784, 0.0),
    "equinox convolution": ("layers[0].weight", (8, 3, 5, 5), 75, 0.0),
    "equinox recurrent": ("cell.weight_hh", (12, 3), 3, 0.0),
    "bias": ("Dense_0.bias", (50,), None, 0.0),
    "equinox convolution's bias": ("layers[0].bias", (8, 1, 1), None, 0.0),
    "flax normalisation scale": ("LayerNorm_0.scale", (8,), None, 1.0),
    "equinox normalisation scale": ("norm.weight", (8,), None, 1.0),
    "normalisation bias": ("norm.bias", (8,), None, 0.0),
    "the user's vector": ("slopes", (5,), None, 0.0),
    "the user's scalar": ("offset", (), None, 0.0),
}
ALL = {
    "normal": priors.normal(),
    "fan_in_normal": priors.fan_in_normal(),
    "laplace": priors.laplace(fan_in=True),
    "student_t": priors.student_t(fan_in=True),
    "hierarchical_normal": priors.hierarchical_normal(fan_in=True),
    "horseshoe": priors.horseshoe(fan_in=True),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def sampled(prior, values):
    """Distribution that a prior returns, and the log density of the sites that it samples, with values in them."""
    kept = []
    sites = trace(substitute(seed(lambda: kept.append(prior()), 0), values)).get_trace()
    assert set(sites) == set(values)
    return kept[0], sum(site["fn"].log_prob(site["value"]) for site in sites.values())


@pytest.mark.parametrize("kind", KINDS)
def test_laws_by_kind_of_parameter(kind):
    name, shape, fan_in, center = KINDS[kind]
    root = 1.0 if fan_in is None else np.sqrt(fan_in)
    expected = {
        priors.normal(0.3): stats.norm(center, 0.3),
        priors.fan_in_normal(): stats.norm(center, 1.0 / root),
        priors.fan_in_normal(2.0, 0.4): stats.norm(center, 0.4 if fan_in is None else 2.0 / root),
        priors.laplace(0.3): stats.laplace(center, 0.3),
        priors.laplace(0.3, fan_in=True): stats.laplace(center, 0.3 / root),
        priors.student_t(4.0, 0.3): stats.t(4.0, center, 0.3),
        priors.student_t(scale=0.3, fan_in=True): stats.t(3.0, center, 0.3 / root),
    }
    if fan_in is None:  # too few numbers, or no reason, to learn a scale
        expected[priors.hierarchical_normal(0.3, fan_in=True)] = stats.norm(center, 0.3)
        expected[priors.horseshoe(0.3, 0.7, fan_in=True)] = stats.norm(center, 0.7)
    values = numbers(shape)
    for prior, law in expected.items():
        own = prior(name, shape)
        assert own.batch_shape == own.event_shape == ()
        np.testing.assert_allclose(own.expand(shape).log_prob(values), law.logpdf(values), rtol=1e-10)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
@pytest.mark.parametrize("fan_in", [False, True])
def test_hierarchical_normal(kind, fan_in):
    name, shape, number, _ = KINDS[kind]
    scale = 0.3 / np.sqrt(number) if fan_in else 0.3
    prior = partial(priors.hierarchical_normal(0.3, fan_in=fan_in), name, shape)
    own, log_density = sampled(prior, {f"{name}_scale": 0.8})
    np.testing.assert_allclose(log_density, stats.halfnorm(scale=scale).logpdf(0.8))
    values = numbers(shape)
    np.testing.assert_allclose(own.expand(shape).log_prob(values), stats.norm(0.0, 0.8).logpdf(values))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
@pytest.mark.parametrize("fan_in", [False, True])
def test_horseshoe(kind, fan_in):
    name, shape, number, _ = KINDS[kind]
    root = np.sqrt(number) if fan_in else 1.0
    local = np.abs(numbers(shape, seed=1))
    prior = partial(priors.horseshoe(0.3, 2.0, fan_in=fan_in), name, shape)
    own, log_density = sampled(prior, {f"{name}_global": 0.8, f"{name}_local": local})
    expected = stats.halfcauchy(scale=0.3 / root).logpdf(0.8) + stats.halfcauchy().logpdf(local).sum()
    np.testing.assert_allclose(log_density, expected)
    slab = 2.0 / root
    scale = 0.8 * local * np.sqrt(slab**2 / (slab**2 + 0.8**2 * local**2))  # equation (2.8) of Piironen and Vehtari
    weights = numbers(shape)
    np.testing.assert_allclose(own.log_prob(weights), stats.norm(0.0, scale).logpdf(weights))
    assert own.batch_shape == shape


def test_scales_that_the_model_samples():
    def scale_of(prior, name="Dense_0.kernel", shape=(9, 4)):
        return jax.jit(lambda scale: prior(scale)(name, shape).scale)(0.7)

    np.testing.assert_allclose(scale_of(priors.normal), 0.7)
    np.testing.assert_allclose(scale_of(priors.fan_in_normal), 0.7 / 3.0)
    np.testing.assert_allclose(scale_of(partial(priors.student_t, 3.0)), 0.7)
    np.testing.assert_allclose(scale_of(partial(priors.laplace, fan_in=True)), 0.7 / 3.0)
    own = priors.student_t(df=np.array(2.0))("Dense_0.kernel", (9, 4))
    assert isinstance(own, dist.StudentT)


@pytest.mark.parametrize("name", ALL)
def test_priors_can_be_pickled(name):
    def draw(prior):
        with seed(rng_seed=1):
            return prior("Dense_0.kernel", (2, 3)).sample(jax.random.key(0))

    np.testing.assert_array_equal(draw(pickle.loads(pickle.dumps(ALL[name]))), draw(ALL[name]))


WRONG = {
    "scale": [partial(f, scale=s) for f in (priors.normal, priors.laplace, priors.horseshoe) for s in (0.0, -1.0, "1")]
    + [partial(f, scale=np.inf) for f in (priors.student_t, priors.hierarchical_normal)]
    + [partial(priors.normal, True), partial(priors.normal, np.nan), partial(priors.normal, None)],
    "gain": [partial(priors.fan_in_normal, gain=0.0), partial(priors.fan_in_normal, "Dense_0.kernel", (3, 2))],
    "bias_scale": [partial(priors.fan_in_normal, bias_scale=-0.5)],
    "df": [partial(priors.student_t, df=0)],
    "slab_scale": [partial(priors.horseshoe, slab_scale=[1.0])],
    "fan_in": [
        partial(f, fan_in=784) for f in (priors.laplace, priors.student_t, priors.hierarchical_normal, priors.horseshoe)
    ],
}


@pytest.mark.parametrize("argument", WRONG)
def test_arguments_out_of_range(argument):
    for make in WRONG[argument]:
        with pytest.raises(ValueError, match=rf"^{argument} must be .*, got ") as caught:
            make()
        assert repr([*make.args, *make.keywords.values()][0]) in str(caught.value)
