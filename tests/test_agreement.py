"""NumPyro and Pyro take the same steps, to rounding, given the same noise and minibatches."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch

import bnn_ppl.numpyro
import bnn_ppl.pyro
from bnn_ppl.pyro.minibatches import IndexStream

ROWS, BATCH, STEPS = 12, 5, 8
SITES = {"a": (2,), "rate": (3,), "w": (2, 3)}
SIZE = sum(int(np.prod(shape)) for shape in SITES.values())


class Tables:
    """Rows of normals and of minibatch indices, handed out in the order of the calls."""

    def __init__(self):
        rng = np.random.default_rng(3)
        self._normals = iter(rng.standard_normal((4 * STEPS, SIZE)))
        self._indices = iter([rng.choice(ROWS, BATCH, replace=False) for _ in range(3 * STEPS)])

    def normal(self, offset=0):
        """The next row, or the rest of the current one."""
        if offset == 0:
            self._row = next(self._normals)
        return self._row[offset:]

    def indices(self):
        return next(self._indices)

    def left(self):
        return len(list(self._normals)), len(list(self._indices))


def data():
    rng = np.random.default_rng(4)
    return rng.standard_normal((ROWS, 2)), rng.gamma(2.0, 1.0, (ROWS, 3))


def start():
    rng = np.random.default_rng(5)
    return {name: 0.3 * rng.standard_normal(shape) for name, shape in SITES.items()}


def make_model(ppl, dist, exp, tensor):
    """A gamma regression with a positive, a bounded and a real site."""

    def model(x, y):
        a = ppl.sample("a", dist.Beta(tensor(2.0), tensor(3.0)).expand([2]).to_event(1))
        rate = ppl.sample("rate", dist.HalfNormal(tensor(1.0)).expand([3]).to_event(1))
        w = ppl.sample("w", dist.Normal(tensor(0.0), tensor(1.0)).expand([2, 3]).to_event(2))
        with ppl.plate("data", ROWS, subsample_size=BATCH) as rows:
            shape = exp((a * x[rows]) @ w)
            ppl.sample("y", dist.Gamma(1.0 + shape, rate).to_event(1), obs=y[rows])

    return model


def make_kernel(package, name, model, arguments):
    return getattr(package, name)(model, steps_per_draw=STEPS, **arguments)


def numpyro_draw(name, arguments, warmup, tables, monkeypatch):
    """One draw of STEPS steps after the warm-up, without jit, so that each step asks for noise when it happens."""

    def normal(words, counter, size, dtype, kind, offset=0):
        return jnp.asarray(tables.normal(offset)[:size], dtype)

    monkeypatch.setattr("bnn_ppl.numpyro.noise.normal", normal)
    monkeypatch.setattr(
        "bnn_ppl.numpyro.minibatches.indices", lambda *args, **kwargs: jnp.asarray(tables.indices(), jnp.int32)
    )
    model = make_model(numpyro, numpyro_dist, jnp.exp, jnp.asarray)
    kernel = make_kernel(bnn_ppl.numpyro, name, model, arguments)
    x, y = (jnp.asarray(array) for array in data())
    with jax.disable_jit():
        state = kernel.init(jax.random.key(0), warmup, jax.tree.map(jnp.asarray, start()), (x, y), {})
        for _ in range(warmup + 1):
            state = kernel.sample(state, (x, y), {})
    return state.z, getattr(state, "momentum", {}), {n: getattr(state, n) for n in kernel.statistic_fields}


def pyro_draw(name, arguments, warmup, tables, monkeypatch):
    monkeypatch.setattr(
        "bnn_ppl.pyro.kernel.StochasticGradientKernel._noise", lambda self: torch.tensor(tables.normal())
    )
    monkeypatch.setattr(IndexStream, "next", lambda self: torch.tensor(tables.indices()))

    def tensor(value):
        return torch.tensor(value, dtype=torch.float64)

    kernel = make_kernel(bnn_ppl.pyro, name, make_model(pyro, pyro_dist, torch.exp, tensor), arguments)
    kernel.initial_params = {n: torch.tensor(value) for n, value in start().items()}
    kernel.setup(warmup, *(torch.tensor(array) for array in data()))
    for _ in range(warmup + 1):
        z = kernel.sample(kernel.initial_params)
    extra = kernel.state_dict()["chains"][0]["extra"]
    momentum = kernel._unflatten(extra["momentum"]) if "momentum" in extra else {}
    statistics = kernel.diagnostics()
    return z, momentum, {n: statistics[n][0] for n in kernel.statistic_fields}


MASS = {"a": 0.5, "rate": 2.0, "w": 1.0}
ADAPTING = {"PSGLD": ("PSGLD", {"decay": 0.9})} | {
    f"{integrator} {mass}": ("SGHMC", {"integrator": integrator, "friction": 1.3, "mass": mass, "resample_every": 3})
    for integrator in ("baoab", "symplectic_euler")
    for mass in ("adapt", "adapt_coordinates")
}
CASES = {
    "SGLD": ("SGLD", {}),
    "SGLD lm": ("SGLD", {"integrator": "lm"}),
    "SGLD compensated": ("SGLD", {"gradient_noise_variance": {"a": 0.5, "rate": 0.0, "w": 3.0}}),
    "SGLD schedule": ("SGLD", {"step_size": lambda k: 0.01 / (1.0 + k), "temperature": lambda k: 1 / (1.0 + k)}),
    "SGLD of a cooled likelihood": ("SGLD", {"likelihood_temperature": 5.0}),
    "SGNHT": ("SGNHT", {"friction": 1.3}),
    **{
        f"{integrator} {case}": ("SGHMC", {"integrator": integrator, "friction": 1.3, **arguments})
        for integrator in ("baoab", "symplectic_euler")
        for case, arguments in {
            "plain": {},
            "masses": {"mass": MASS},
            "compensated": {"mass": MASS, "gradient_noise_variance": {"a": 0.5, "rate": 0.0, "w": 3.0}},
            "refresh": {"mass": MASS, "resample_every": 3},
            "refresh with jitter": {"mass": MASS, "resample_every": 3, "resample_jitter": True},
            "refresh at another temperature": {"resample_every": 4, "resample_scale": lambda k: 0.1 + 0.1 * k},
            "refresh compensated": {"resample_every": 3, "gradient_noise_variance": 0.5},
        }.items()
    },
    **ADAPTING,
}


@pytest.mark.parametrize("case", CASES)
def test_backends_agree(case, monkeypatch):
    name, arguments = CASES[case]
    arguments = {"step_size": 0.02, "temperature": 0.2} | arguments
    warmup, tables = int(case in ADAPTING), [Tables(), Tables()]
    with jax.enable_x64(True):
        ours = jax.tree.map(np.asarray, numpyro_draw(name, arguments, warmup, tables[0], monkeypatch))
    theirs = pyro_draw(name, arguments, warmup, tables[1], monkeypatch)
    assert tables[0].left() == tables[1].left()  # both asked as often
    moved = np.concatenate([np.ravel(ours[0][n] - value) for n, value in start().items()])
    assert np.all(np.abs(moved) > 1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert set(a) == set(b)
        for n in a:
            np.testing.assert_allclose(np.asarray(a[n], float), np.asarray(b[n], float), rtol=1e-9, err_msg=n)
    assert not ours[2]["diverging"]
