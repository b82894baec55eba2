"""What a user gets wrong in arguments and models is told at once, with the argument, the value and the remedy."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import pyro
import pytest
import torch

import bnn_ppl.numpyro
from tests.backends import B, N, NumPyro, Pyro, X, Y, assert_all_in, make_linear, message


@pytest.fixture(params=[NumPyro, Pyro], ids=lambda backend: backend.name)
def backend(request):
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    with jax.enable_x64(True):
        yield request.param
    torch.set_default_dtype(torch.float32)


# Arguments, refused where the kernel is made

SGHMC = {"step_size": 0.1, "friction": 1.0}
BAD_SGHMC = [
    ({"step_size": 0.0}, ["step_size", "greater than 0", "got 0.0"]),
    ({"step_size": -0.1}, ["step_size", "greater than 0", "-0.1"]),
    ({"step_size": float("nan")}, ["step_size", "finite", "nan"]),
    ({"step_size": "0.1x"}, ["step_size", "a number or a callable", "'0.1x'"]),
    ({"step_size": "0.1"}, ["step_size", "a number or a callable", "'0.1'"]),
    ({"step_size": True}, ["step_size", "a number or a callable", "True"]),
    ({"step_size": None}, ["step_size", "a number or a callable", "None"]),
    ({"friction": 0.0}, ["friction", "greater than 0", "0.0"]),
    ({"friction": -1.0}, ["friction", "greater than 0", "-1.0"]),
    ({"friction": float("inf")}, ["friction", "finite", "inf"]),
    ({"friction": lambda t: 1.0}, ["friction", "must be a number"]),
    ({"mass": 0.0}, ["mass", "greater than 0", "0.0"]),
    ({"mass": {"w": 1.0, "scale": -2.0}}, ["mass['scale']", "greater than 0", "-2.0"]),
    ({"mass": {"w": "heavy"}}, ["mass['w']", "must be a number", "'heavy'"]),
    ({"temperature": -0.1}, ["temperature", "at least 0", "-0.1"]),
    ({"temperature": float("inf")}, ["temperature", "finite", "inf"]),
    ({"steps_per_draw": 0}, ["steps_per_draw", "integer of at least 1", "0"]),
    ({"steps_per_draw": 2.5}, ["steps_per_draw", "integer of at least 1", "2.5"]),
    ({"steps_per_draw": True}, ["steps_per_draw", "integer", "True"]),
    ({"resample_every": 0}, ["resample_every", "integer of at least 1", "0"]),
    ({"resample_every": 1.5}, ["resample_every", "integer", "1.5"]),
    ({"resample_scale": 0.5}, ["resample_scale=0.5", "no effect without resample_every", "set resample_every"]),
    ({"resample_scale": -0.5, "resample_every": 2}, ["resample_scale", "at least 0", "-0.5"]),
    ({"integrator": "leapfrog"}, ["integrator", "'baoab'", "'symplectic_euler'", "'leapfrog'"]),
    ({"noise": "uniform"}, ["noise", "'normal'", "'uniform'"]),
    ({"subsampling": "random"}, ["subsampling", "'epoch'", "'without_replacement'", "'with_replacement'", "'random'"]),
    ({"batch_size": 0}, ["batch_size", "integer of at least 1", "0"]),
    ({"batch_size": 0.5}, ["batch_size", "integer of at least 1", "0.5"]),
    ({"batch_size": {"data": -4}}, ["batch_size['data']", "integer of at least 1", "-4"]),
    ({"gradient_noise_variance": -1.0}, ["gradient_noise_variance", "at least 0", "-1.0"]),
    (
        {"integrator": "symplectic_euler", "step_size": 0.5, "friction": 8.0, "mass": 2.0},
        ["symplectic_euler", "a = step_size * friction / mass in (0, 2)", "got 2", "lower step_size", "'baoab'"],
    ),
    (
        {"integrator": "symplectic_euler", "step_size": 0.5, "friction": 8.0, "mass": {"w": 4.0, "scale": 1.0}},
        ["symplectic_euler", "(0, 2)", "got 4", "at site 'scale'"],
    ),
    (
        {"gradient_noise_variance": 1000.0},
        ["gradient_noise_variance=1000.0", "more noise than is injected", "at most", "smaller step_size"],
    ),
    (
        {"gradient_noise_variance": {"w": 0.0, "scale": 1e4}, "integrator": "symplectic_euler"},
        ["gradient_noise_variance=10000.0 at site 'scale'", "at most 20 can be"],
    ),
]


@pytest.mark.parametrize(("options", "words"), BAD_SGHMC, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_bad_arguments_of_sghmc(backend, options, words):
    assert_all_in(words, message(backend.kernels.SGHMC, make_linear(backend), **SGHMC | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step_size": 0.0}, ["step_size", "greater than 0"]),
        ({"temperature": -1.0}, ["temperature", "at least 0", "-1.0"]),
        ({"gradient_noise_variance": 50.0}, ["gradient_noise_variance=50.0", "at most 20 can be"]),
        ({"noise": "none"}, ["noise", "'normal'", "'none'"]),
    ],
)
def test_bad_arguments_of_sgld(backend, options, words):
    assert_all_in(words, message(backend.kernels.SGLD, make_linear(backend), **{"step_size": 0.1} | options))


def test_limits_are_sharp(backend):
    linear = make_linear(backend)
    backend.kernels.SGHMC(linear, step_size=0.5, friction=7.9, mass=2.0, integrator="symplectic_euler")
    backend.kernels.SGLD(linear, step_size=0.1, gradient_noise_variance=19.99)
    backend.kernels.SGHMC(linear, step_size=0.1, friction=1.0, gradient_noise_variance=19.9)
    assert "at most" in message(backend.kernels.SGHMC, linear, gradient_noise_variance=20.1, **SGHMC)
    backend.kernels.SGHMC(linear, step_size=np.float32(0.1), friction=np.float64(1.0), steps_per_draw=np.int64(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.0}, ["learning_rate", "greater than 0"]),
        ({"num_data": 0}, ["num_data", "integer of at least 1"]),
        ({"momentum": 1.0}, ["momentum", "(0, 1)", "1.0"]),
        ({"momentum": 0.0}, ["momentum", "(0, 1)", "baoab", "0.0"]),
        ({"momentum": -0.1, "integrator": "symplectic_euler"}, ["momentum", "[0, 1)", "-0.1"]),
        ({"mass": 0.0}, ["mass", "greater than 0"]),
        ({"mass": {"w": 1.0}}, ["mass", "must be a number"]),
        ({"learning_rate": lambda t: 0.1}, ["learning_rate", "must be a number"]),
        ({"integrator": "euler"}, ["integrator", "'baoab'", "'euler'"]),
        ({"momentum": "0.9"}, ["momentum", "'0.9'"]),
    ],
)
def test_bad_learning_rates(backend, options, words):
    good = {"learning_rate": 0.1, "momentum": 0.9, "num_data": 100}
    text = message(backend.kernels.SGHMC.from_learning_rate, make_linear(backend), **good | options)
    assert_all_in(words, text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"boost": 0.0}, ["boost", "greater than 0"]),
        ({"adjust": -1.0}, ["adjust", "greater than 0", "-1.0"]),
        ({"momentum_scale": -1.0}, ["momentum_scale", "at least 0", "-1.0"]),
        ({"mass": -1.0}, ["mass", "greater than 0", "-1.0"]),
        ({"friction": 0.0}, ["friction", "greater than 0"]),
    ],
)
def test_bad_norm_adjustments(backend, options, words):
    good = {"boost": 3.0, "adjust": 1.0, "momentum_scale": 3.0, "friction": 1.0, "step_size": 0.1, "resample_every": 5}
    text = message(backend.kernels.norm_adjusting_sghmc, make_linear(backend), **good | options)
    assert_all_in(words, text)


def test_norm_adjustment_needs_a_refresh(backend):
    options = {"boost": 3.0, "adjust": 1.0, "momentum_scale": 3.0, "friction": 1.0, "step_size": 0.1}
    with pytest.raises(TypeError, match="resample_every"):
        backend.kernels.norm_adjusting_sghmc(make_linear(backend), **options)


def test_another_resample_scale_warns_that_it_changes_the_target(backend):
    with pytest.warns(UserWarning, match=r"resample_scale=0\.5 differs from temperature=1\.0.*effective temperature"):
        backend.kernels.SGHMC(make_linear(backend), resample_every=5, resample_scale=0.5, **SGHMC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.kernels.SGHMC(make_linear(backend), resample_every=5, resample_scale=1.0, **SGHMC)


@pytest.mark.parametrize("kernel", ["SGHMC", "SGLD"])
def test_model_or_potential(backend, kernel):
    make = getattr(backend.kernels, kernel)
    options = SGHMC if kernel == "SGHMC" else {"step_size": 0.1}
    words = ["exactly one of model and potential_fn"]
    assert_all_in([*words, "got neither"], message(make, **options))
    assert_all_in([*words, "got both"], message(make, make_linear(backend), lambda z: 0.0, **options))
    assert_all_in(["model must be callable", "got 3"], message(make, 3, **options))
    assert_all_in(["potential_fn must be callable"], message(make, potential_fn="U", **options))
    text = message(make, potential_fn=lambda z: 0.0, batch_size=4, **options)
    assert_all_in(["batch_size=4", "needs a model", "potential_fn has no rows"], text)


# Models, refused at the start of MCMC.run


def run_sgld(backend, model, *args, **options):
    return backend.run(backend.kernels.SGLD(model, **{"step_size": 1e-3} | options), *(args or (X, Y)))


def test_a_site_missing_from_a_dict(backend):
    kernels, linear = backend.kernels, make_linear(backend)
    text = message(backend.run, kernels.SGHMC(linear, mass={"w": 1.0}, **SGHMC), X, Y)
    assert_all_in(["mass lacks the sites ['scale']", "['scale', 'w']", "give each one value"], text)
    text = message(backend.run, kernels.SGHMC(linear, mass={"w": 1.0, "scale": 1.0, "W": 2.0}, **SGHMC), X, Y)
    assert_all_in(["mass", "names ['W']", "no latent sites"], text)
    text = message(run_sgld, backend, linear, gradient_noise_variance={"v": 0.0})
    assert_all_in(["gradient_noise_variance lacks the sites ['scale', 'w'] and names ['v']"], text)


def test_a_dict_by_site_for_a_potential(backend):
    start = {"a": backend.array([0.0, 1.0])}
    kernel = backend.kernels.SGHMC(None, lambda z: (z["a"] ** 2).sum(), mass={"b": 1.0}, **SGHMC)
    assert_all_in(["mass lacks the sites ['a'] and names ['b']"], message(backend.run, kernel, start=start))


def test_a_dict_by_site_for_positions_without_names():
    kernel = bnn_ppl.numpyro.SGHMC(None, lambda z: (z[0] ** 2).sum(), mass={"b": 1.0}, **SGHMC)
    text = message(NumPyro.run, kernel, start=(jnp.ones(2),))
    assert_all_in(["mass={'b': 1.0}", "no dict of arrays", "give one number"], text)


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["step_size", "temperature", "resample_scale"])
def test_schedules_that_go_wrong_name_the_step(backend, name, value):
    def schedule(step):
        bad = step >= 6
        return (
            backend.where(backend.array(bad), value, 0.01) if isinstance(step, jax.Array) else (value if bad else 0.01)
        )

    options = SGHMC | {"resample_every": 2, "steps_per_draw": 2, name: schedule}
    kernel = backend.kernels.SGHMC(make_linear(backend), **options)
    text = message(backend.run, kernel, X, Y, num_warmup=5)
    assert_all_in([name, "finite values that are at least 0", f"got {value!r}", "at gradient step 6"], text)


def test_a_schedule_beyond_the_limit_of_an_integrator(backend):
    kernel = backend.kernels.SGHMC(
        make_linear(backend), step_size=lambda t: 0.1 * (1 + t), friction=4.0, integrator="symplectic_euler"
    )
    text = message(backend.run, kernel, X, Y, num_warmup=10)
    assert_all_in(["a = step_size * friction / mass in (0, 2)", "got 2", "at gradient step 4"], text)
    kernel = backend.kernels.SGLD(
        make_linear(backend), step_size=0.1, temperature=lambda t: 1.0 / (1 + t), gradient_noise_variance=4.5
    )
    text = message(backend.run, kernel, X, Y, num_warmup=10)
    assert_all_in(["gradient_noise_variance=4.5", "at gradient step 4", "at most 4 can be"], text)


def test_schedules_may_touch_zero(backend):
    kernel = backend.kernels.SGHMC(
        make_linear(backend), step_size=lambda t: 0.01 * (t > 2), temperature=lambda t: 1.0 * (t > 1), friction=1.0
    )
    draws, statistics = backend.run(kernel, X, Y, num_samples=4)
    assert np.isfinite(draws["w"]).all()
    np.testing.assert_allclose(statistics["step_size"], [0.0, 0.0, 0.0, 0.01])


def test_discrete_latent_sites(backend):
    def latent(host, dist):
        host.sample("which", dist.Bernoulli(0.5))

    words = ["'which' is discrete", "sum it out", "observe it"]
    assert_all_in(words, message(run_sgld, backend, make_linear(backend, latent=latent)))


def test_latent_sites_inside_a_subsampled_plate(backend):
    host, dist = backend.host, backend.host.distributions

    def model(x, y):
        with host.plate("data", len(x), subsample_size=B) as idx:
            offset = host.sample("offset", dist.Normal(0.0, 1.0))
            host.sample("y", dist.Normal(offset, 1.0), obs=y[idx])

    words = ["latent site 'offset'", "inside the data plate 'data'", "before the plate"]
    assert_all_in(words, message(run_sgld, backend, model))


def test_no_latent_sites(backend):
    host, dist = backend.host, backend.host.distributions

    def model(x, y):
        with host.plate("data", len(x)):
            host.sample("y", dist.Normal(0.0, 1.0), obs=y)

    assert_all_in(["no latent sites", "every sample statement is observed"], message(run_sgld, backend, model))


def test_random_keys_of_the_model():
    def model(x, y):
        w = numpyro.sample("w", numpyro.distributions.Normal(0.0, 1.0))
        noise = jax.random.normal(numpyro.prng_key())
        numpyro.sample("y", numpyro.distributions.Normal(w + noise, 1.0), obs=y)

    assert_all_in(["prng_key", "dropout", "switch that off"], message(run_sgld, NumPyro, model))


def test_param_sites_warn(backend):
    def latent(host, dist):
        host.param("offset", backend.array(1.0))

    with pytest.warns(UserWarning, match=r"param sites \['offset'\] are held at their initial values.*sample"):
        run_sgld(backend, make_linear(backend, latent=latent))


def test_data_that_do_not_pass_through_the_plate(backend):
    host, dist = backend.host, backend.host.distributions

    def model(x, y, subsample_size=None):
        w = host.sample("w", dist.Normal(0.0, 1.0))
        with host.plate("data", len(x), subsample_size=subsample_size):
            host.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    words = ["'data'", "batch_size=4", "pass the data through the plate", f"{backend.name}.subsample"]
    assert_all_in(words, message(run_sgld, backend, model, batch_size=B))
    run_sgld(backend, model)  # without minibatches it is a good model
    words = ["'data'", "pass the data through the plate", f"{backend.name}.subsample"]
    assert_all_in(words, message(run_sgld, backend, lambda x, y: model(x, y, subsample_size=B)))


def test_batches_larger_than_the_data(backend):
    text = message(run_sgld, backend, make_linear(backend, subsample_size=None), batch_size=N + 1)
    assert_all_in(["batch_size=13", "larger than plate 'data' of 12 rows"], text)
    text = message(run_sgld, backend, make_linear(backend, subsample_size=N + 1))
    assert_all_in(["plate 'data'", "subsample_size=13", "12 rows"], text)
    _, statistics = run_sgld(backend, make_linear(backend, subsample_size=None), batch_size=N)
    assert np.isfinite(statistics["lp_minibatch"]).all()


def test_batch_size_beside_subsample_size(backend):
    text = message(run_sgld, backend, make_linear(backend), batch_size={"data": 2})
    assert_all_in(["batch_size=2", "'data'", "subsample_size=4 already", "one of the two"], text)
    text = message(run_sgld, backend, make_linear(backend), batch_size=2)
    assert_all_in(["batch_size=2", "'data'", "subsample_size=4 already", "one of the two"], text)


def test_a_mean_with_an_axis_too_many(backend):
    """The commonest slip of all: the likelihood would be counted B times."""
    host, dist = backend.host, backend.host.distributions

    def model(x, y, subsample_size):
        w = host.sample("w", dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2))
        with host.plate("data", len(x), subsample_size=subsample_size) as idx:
            host.sample("y", dist.Normal(x[idx] @ w, 1.0), obs=y[idx])

    for rows in (B, N):
        kernel = backend.kernels.SGLD(model, step_size=1e-3)
        text = message(backend.run, kernel, X, Y, rows)
        words = ["observed site 'y'", f"shape ({rows},)", f"({rows}, {rows})", f"{rows} times", "squeezing"]
        assert_all_in(words, text)


def test_data_that_bypass_the_plate_with_the_right_shape(backend):
    host, dist = backend.host, backend.host.distributions

    def model(x, y, inputs, values):
        w = host.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with host.plate("data", len(x), subsample_size=B) as idx:
            x = x[idx] if inputs else x[:B]
            host.sample("y", dist.Normal(x @ w, 1.0), obs=y[idx] if values else y[:B])

    kernel = backend.kernels.SGLD(model, step_size=1e-3)
    assert_all_in(["log densities", "'y'", "'data'", "x[idx]"], message(backend.run, kernel, X, Y, False, False))
    assert_all_in(["the values", "'y'", "'data'", "y[idx]"], message(backend.run, kernel, X, Y, True, False))
    backend.run(kernel, X, Y, True, True)
