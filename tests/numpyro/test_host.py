"""NumPyro's own MCMC drives the kernels unchanged: chain methods, keys, thinning, fields, resume, data of all kinds."""

import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.experimental.compilation_cache import compilation_cache
from numpyro.infer import MCMC

from bnn_ppl.numpyro import SGHMC, SGLD, norm_adjusting_sghmc

N, B = 24, 8
rng = np.random.default_rng(0)
X = rng.normal(size=(N, 2))
Y = X @ [1.0, -0.5] + 0.3 * rng.normal(size=N)
KEY = random.key(3)


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Most runs here are of one program, which the host compiles anew each time."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def model(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x), subsample_size=B) as idx:
        numpyro.sample("y", dist.Normal(x[idx] @ w, scale), obs=y[idx])


def make(**options):
    return SGHMC(model, **{"step_size": 0.02, "friction": 5.0, "resample_every": 3, "steps_per_draw": 2} | options)


def run(kernel=None, *args, key=KEY, num_warmup=1, num_samples=4, extra_fields=(), init_params=None, **options):
    mcmc = MCMC(
        make() if kernel is None else kernel,
        **{"num_warmup": num_warmup, "num_samples": num_samples, "progress_bar": False} | options,
    )
    mcmc.run(key, *(args or (X, Y)), extra_fields=extra_fields, init_params=init_params)
    return mcmc


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], **{"rtol": 1e-10, "atol": 1e-12} | tolerance, err_msg=name)


@pytest.fixture(scope="module")
def one_chain():
    with jax.enable_x64(True):
        return run()


@pytest.fixture(scope="module")
def two_chains():
    with jax.enable_x64(True):
        return run(num_chains=2, chain_method="sequential")


# Chains


@pytest.mark.parametrize("method", ["vectorized", jax.vmap])
def test_chain_methods_give_the_same_draws(two_chains, method):
    other = run(num_chains=2, chain_method=method)
    expected = two_chains.get_samples(group_by_chain=True)
    assert_same(other.get_samples(group_by_chain=True), expected)
    assert_same(other.get_extra_fields(group_by_chain=True), two_chains.get_extra_fields(group_by_chain=True))
    assert expected["w"].shape == (2, 4, 2)
    assert (expected["w"][0] != expected["w"][1]).all()


DEVICES = """
import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.infer import MCMC
from bnn_ppl.numpyro import SGHMC

N, B = 24, 8
rng = np.random.default_rng(0)
X = rng.normal(size=(N, 2))
Y = X @ [1.0, -0.5] + 0.3 * rng.normal(size=N)
assert jax.device_count() == 2

def model(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(x), subsample_size=B) as idx:
        numpyro.sample("y", dist.Normal(x[idx] @ w, 0.5), obs=y[idx])

def draws(x, y, **options):
    kernel = SGHMC(model, step_size=0.02, friction=5.0, resample_every=3, steps_per_draw=2)
    mcmc = MCMC(kernel, num_warmup=1, num_samples=4, progress_bar=False, **options)
    mcmc.run(jax.random.key(3), x, y)
    return {**mcmc.get_samples(True), **mcmc.get_extra_fields(True)}

def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-10, atol=1e-12, err_msg=name)

expected = draws(X, Y, num_chains=2, chain_method="vectorized")
same(draws(X, Y, num_chains=2, chain_method="parallel"), expected)
print("parallel")

rows = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))
x, y = jax.device_put(jnp.asarray(X), rows), jax.device_put(jnp.asarray(Y), rows)
assert len(x.sharding.device_set) == 2
same(draws(x, y, num_chains=2, chain_method="vectorized"), expected)
print("sharded")
"""


@pytest.mark.slow
def test_parallel_chains_and_sharded_data_on_two_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", DEVICES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["parallel", "sharded"]


# Random keys


def test_another_key_gives_other_draws(one_chain):
    raw = random.PRNGKey(4)
    assert (run(key=raw).get_samples()["w"] != one_chain.get_samples()["w"]).all()


def test_raw_keys_give_the_same_draws(two_chains):
    raw = run(key=random.key_data(KEY), num_chains=2, chain_method="vectorized")
    assert_same(raw.get_samples(), two_chains.get_samples())


@pytest.mark.parametrize("method", ["sequential", "vectorized"])
def test_keys_of_another_generator(method, two_chains):
    key = random.key(3, impl="rbg")
    samples = run(key=key, num_chains=2, chain_method=method).get_samples(group_by_chain=True)
    assert samples["w"].shape == (2, 4, 2)
    assert np.isfinite(samples["w"]).all()
    assert len(np.unique([samples["w"], two_chains.get_samples(group_by_chain=True)["w"]])) == 2 * 16


# What is collected


def test_thinning_takes_every_other_draw(one_chain):
    thinned = run(thinning=2).get_samples()
    assert_same(thinned, {name: value[1::2] for name, value in one_chain.get_samples().items()})


def test_extra_fields():
    mcmc = run(extra_fields=("momentum.w", "z.scale", "z.w", "~z.w", "evaluation"))
    assert set(mcmc.get_samples()) == {"scale"}
    fields = mcmc.get_extra_fields()
    assert fields["momentum.w"].shape == (4, 2)
    np.testing.assert_allclose(np.exp(fields["z.scale"]), mcmc.get_samples()["scale"])
    np.testing.assert_allclose(fields["evaluation"].energy, -fields["lp_minibatch"])
    norm = np.sum(fields["z.w"] ** 2, axis=-1) + fields["z.scale"] ** 2
    np.testing.assert_allclose(fields["position_norm_sq"], norm)


@pytest.mark.parametrize("make_kernel", [make, lambda: SGLD(model, step_size=1e-3)])
def test_statistics_are_flat_and_belong_to_the_draws(make_kernel, one_chain):
    kernel = make_kernel()
    mcmc = one_chain if isinstance(kernel, SGHMC) else run(kernel)
    fields = mcmc.get_extra_fields()
    assert set(fields) == set(kernel.statistic_fields) == set(kernel.default_fields) - {"z"}
    assert all(value.shape == ((4, 2) if name.startswith("site_") else (4,)) for name, value in fields.items())
    assert not fields["diverging"].any()
    squares = np.sum(mcmc.get_samples()["w"] ** 2, -1) + np.log(mcmc.get_samples()["scale"]) ** 2
    np.testing.assert_allclose(fields["position_norm_sq"], squares)


def test_the_progress_bar_does_not_change_the_draws(one_chain, monkeypatch, capsys):
    for variable in ("CI", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(variable, raising=False)
    mcmc = run(progress_bar=True)
    assert_same(mcmc.get_samples(), one_chain.get_samples())
    assert "10 steps of size 2.00e-02. lp=" in capsys.readouterr().err


@pytest.mark.parametrize("num_chains", [1, 2])
def test_diagnostics_and_summary(num_chains, one_chain, two_chains, capsys):
    mcmc = one_chain if num_chains == 1 else two_chains
    state = jax.tree.map(lambda x: x if num_chains == 1 else x[0], mcmc.last_state)
    text = mcmc.sampler.get_diagnostics_str(state)
    assert text.startswith("10 steps of size 2.00e-02. lp=")
    mcmc.print_summary()
    printed = capsys.readouterr().out
    assert "w[0]" in printed
    assert "Number of divergences: 0" in printed


# Warm-up and resume


def test_warmup_then_run_is_one_run(two_chains):
    mcmc = MCMC(make(), num_warmup=1, num_samples=4, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.warmup(KEY, X, Y)
    mcmc.run(mcmc.post_warmup_state.rng_key, X, Y)
    assert_same(mcmc.get_samples(True), two_chains.get_samples(True))


def test_a_resumed_run_goes_on_bit_for_bit(one_chain):
    first = run(num_samples=1)
    later = MCMC(make(), num_warmup=0, num_samples=1, progress_bar=False)  # a kernel that never ran, as after a restart
    pieces = [first.get_samples()]
    state = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, first.last_state._replace(rng_key=None))))
    state = state._replace(rng_key=random.wrap_key_data(np.asarray(random.key_data(first.last_state.rng_key))))
    state = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, state)
    for _ in range(3):
        later.post_warmup_state = state
        later.run(state.rng_key, X, Y)
        pieces.append(later.get_samples())
        state = later.last_state
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    assert_same(joined, one_chain.get_samples(), rtol=0.0, atol=0.0)


# Models' arguments


def test_data_as_arguments_of_the_program(one_chain):
    mcmc = run(jit_model_args=True)
    assert_same(mcmc.get_samples(), one_chain.get_samples())
    mcmc.run(KEY, X, Y + 1.0)  # other data, the same program
    shifted = mcmc.get_samples()
    assert (shifted["w"] != one_chain.get_samples()["w"]).all()
    mcmc.run(KEY, X, Y)
    assert_same(mcmc.get_samples(), one_chain.get_samples())


def test_jax_arrays_numpy_arrays_and_keywords_are_the_same(one_chain):
    mcmc = MCMC(make(), num_warmup=1, num_samples=4, progress_bar=False)
    mcmc.run(KEY, x=jnp.asarray(X), y=Y)
    assert_same(mcmc.get_samples(), one_chain.get_samples())


def test_integer_inputs():
    def counts(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x), subsample_size=B) as idx:
            numpyro.sample("y", dist.Poisson(jnp.exp(w * x[idx])), obs=y[idx])

    x, y = np.arange(N) % 3, rng.poisson(1.0, N)
    kernel = SGLD(counts, step_size=1e-3)
    of_integers = run(kernel, x.astype(np.uint8), y.astype(np.int32), init_params={"w": 1}).get_samples()
    assert of_integers["w"].dtype == np.float64
    assert_same(of_integers, run(kernel, x.astype(float), y.astype(float), init_params={"w": 1.0}).get_samples())


def test_the_dtype_follows_the_model():
    with jax.enable_x64(False):
        mcmc = run(None, X.astype(np.float32), Y.astype(np.float32))
        assert {v.dtype for v in mcmc.get_samples().values()} == {np.dtype("float32")}
        assert {v.dtype for v in mcmc.get_extra_fields().values()} == {np.dtype("float32"), np.dtype("bool")}
    with jax.enable_x64(True):
        assert {v.dtype for v in run().get_samples().values()} == {np.dtype("float64")}


# Starting values, potential_fn


def test_init_params():
    start = {"w": jnp.array([[0.5, -0.5], [1.5, 0.5]]), "scale": jnp.array([-1.0, 0.0])}
    kernel = make(step_size=1e-8, temperature=0.0)
    samples = run(kernel, init_params=start, num_chains=2, chain_method="vectorized").get_samples(group_by_chain=True)
    np.testing.assert_allclose(samples["w"][:, 0], start["w"], atol=1e-6)
    np.testing.assert_allclose(samples["scale"][:, 0], np.exp(start["scale"]), atol=1e-6)


@pytest.mark.parametrize(
    "start",
    [
        {"a": jnp.zeros(2), "b": jnp.ones(())},
        (jnp.zeros(2), {"b": jnp.ones(())}),
        jnp.zeros(3),
        0.5,
    ],
    ids=["dict", "tuple", "array", "number"],
)
def test_potential_fn(start):
    def potential(z):
        return sum(jnp.sum((leaf - 1.0) ** 2) for leaf in jax.tree.leaves(z))

    kernel = SGHMC(None, potential, step_size=0.1, friction=1.0)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=3, progress_bar=False)
    mcmc.run(KEY, init_params=start)
    samples = mcmc.get_samples()
    assert jax.tree.structure(samples) == jax.tree.structure(start)
    for drawn, first in zip(jax.tree.leaves(samples), jax.tree.leaves(start), strict=True):
        assert drawn.shape == (3, *jnp.shape(first))
    energy = jax.vmap(potential)(samples)
    np.testing.assert_allclose(mcmc.get_extra_fields()["lp_minibatch"], -energy)
    assert kernel.model is None


def test_potential_fn_with_several_chains():
    start = {"a": jnp.arange(6.0).reshape(3, 2)}
    kernel = SGLD(potential_fn=lambda z: jnp.sum(z["a"] ** 2), step_size=0.01)

    def draws(method):
        mcmc = MCMC(kernel, num_warmup=0, num_samples=2, num_chains=3, chain_method=method, progress_bar=False)
        mcmc.run(KEY, init_params=start)
        return mcmc.get_samples(True)

    assert_same(draws("vectorized"), draws("sequential"))


# Kernels


def test_kernels_pickle(one_chain):
    kernel = pickle.loads(pickle.dumps(one_chain.sampler))
    assert kernel.settings == one_chain.sampler.settings
    assert_same(run(kernel).get_samples(), one_chain.get_samples(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "kernel",
    [
        norm_adjusting_sghmc(model, boost=3.0, adjust=0.5, momentum_scale=3.0, friction=5.0, step_size=0.02,
                             resample_every=2),
        SGHMC(model, step_size=lambda t: 0.02 / (1.0 + t), friction=5.0, mass={"w": 1.0, "scale": 2.0},
              temperature=lambda t: jnp.minimum(1.0, t / 10), integrator="symplectic_euler", noise="fast"),
    ],
    ids=["norm_adjusting", "schedules"],
)  # fmt: skip
def test_every_option_runs(kernel):
    mcmc = run(kernel)
    assert all(np.isfinite(value).all() for value in (mcmc.get_samples() | mcmc.get_extra_fields()).values())


def test_a_kernel_serves_models_of_other_shapes(one_chain):
    kernel = make()
    mcmc = MCMC(kernel, num_warmup=1, num_samples=4, progress_bar=False)
    mcmc.run(KEY, X[:12], Y[:12])
    mcmc.run(KEY, X, Y)
    assert_same(mcmc.get_samples(), one_chain.get_samples())
