"""Wrong starting values, and NaN there, are refused with site and row; a chain that explodes on the way goes on."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pyro.infer
import pytest
import torch

import bnn_ppl.numpyro
import bnn_ppl.pyro
from tests.backends import B, N, NumPyro, Pyro, X, Y, assert_all_in, make_linear, message


@pytest.fixture(params=[NumPyro, Pyro], ids=lambda backend: backend.name)
def backend(request):
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    with jax.enable_x64(True):
        yield request.param
    torch.set_default_dtype(torch.float32)


# Starting values


def test_potentials_need_starting_values(backend):
    kernel = backend.kernels.SGLD(None, lambda z: (z["a"] ** 2).sum(), step_size=0.1)
    text = message(backend.run, kernel)
    assert_all_in(["potential_fn needs starting values", f"{backend.starts}="], text)


def test_starting_values_of_other_sites(backend):
    kernel = backend.kernels.SGLD(make_linear(backend), step_size=0.1)
    text = message(backend.run, kernel, X, Y, start={"w": backend.array([0.0, 1.0])})
    words = [f"{backend.starts} has the sites and shapes {{'w': (2,)}}", "'scale': ()", "unconstrained value of"]
    assert_all_in(words, text)
    text = message(backend.run, kernel, X, Y, start={"w": backend.array([0.0]), "scale": backend.array(0.0)})
    assert_all_in(["'w': (1,)", "'w': (2,)"], text)


@pytest.mark.parametrize("subsample_size", [N, B])
def test_nan_in_the_data_names_site_and_row(backend, subsample_size):
    bad = Y.copy()
    bad[B:] = np.nan  # none in the first rows, and some in the first minibatch
    text = message(backend.run, backend.kernels.SGLD(make_linear(backend, subsample_size), step_size=1e-3), X, bad)
    assert_all_in(
        ["not finite where the chain starts", "observed site 'y'", "plate 'data'", "check the data for NaN"], text
    )
    row = int(re.search(r"first at row (\d+)", text)[1])
    assert np.isnan(bad[row])
    if subsample_size == N:
        assert row == B
        assert "8 of 12 values" in text


def test_nan_in_rows_that_the_first_minibatch_lacks_is_told(backend):
    bad = Y.copy()
    bad[0] = np.nan
    kernel = backend.kernels.SGLD(make_linear(backend), step_size=1e-3)
    told = []
    for seed in range(8):  # the first minibatch of some of them lacks row 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                backend.run(kernel, X, bad, seed=seed, num_samples=1)
            except ValueError as error:
                told.append(str(error))
        told += [str(w.message) for w in caught]
    assert any("not finite where the chain starts" in text for text in told)
    assert any("shape (12,), has NaN" in text for text in told)


def test_a_prior_that_is_not_finite_at_the_start_is_named(backend):
    kernel = backend.kernels.SGLD(make_linear(backend), step_size=1e-3)
    start = {"w": backend.array([0.0, np.inf]), "scale": backend.array(0.0)}
    assert_all_in(["latent site 'w'", "init_strategy", backend.starts], message(backend.run, kernel, X, Y, start=start))


def test_a_potential_that_is_not_finite_at_the_start(backend):
    kernel = backend.kernels.SGLD(None, lambda z: (z["a"] * backend.nan).sum(), step_size=0.1)
    text = message(backend.run, kernel, start={"a": backend.array([0.0, 1.0])})
    assert_all_in(["not finite where the chain starts", "potential_fn"], text)


# A chain that explodes on the way


def cliff(backend):
    """A quadratic bowl that ends at |a| = 1, where it is NaN."""

    def potential(z):
        return backend.where(abs(z["a"]) < 1.0, 0.5 * z["a"] ** 2, backend.array(backend.nan)).sum()

    return potential


def divergent(backend, kernel, num_samples, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws, statistics = backend.run(kernel, num_samples=num_samples, **options)
    return draws, statistics, [str(w.message) for w in caught if "went back" in str(w.message)]


@pytest.mark.parametrize("name", ["SGHMC", "SGLD"])
def test_a_chain_over_a_cliff_goes_back_and_on(backend, name):
    options = {"step_size": 0.3, "steps_per_draw": 2} | ({"friction": 1.0} if name == "SGHMC" else {})
    kernel = getattr(backend.kernels, name)(None, cliff(backend), **options)
    start = {"a": backend.array([0.1, -0.1, 0.5])}
    draws, statistics, caught = divergent(backend, kernel, 60, start=start)
    diverging, a = statistics["diverging"], draws["a"]
    assert diverging.dtype == bool
    assert 5 < diverging.sum() < 55
    assert np.isfinite(a).all()
    assert (abs(a) < 1.0).all()
    before = np.concatenate([[start["a"]], a[:-1]])
    np.testing.assert_array_equal(a[diverging], before[diverging])  # stays at its last finite position
    assert (a[~diverging] != before[~diverging]).all()  # and goes on from there
    assert all(np.isfinite(value).all() for value in statistics.values())
    np.testing.assert_allclose(statistics["lp_minibatch"], -0.5 * (a**2).sum(-1))
    np.testing.assert_allclose(statistics["position_norm_sq"], (a**2).sum(-1))
    if name == "SGHMC":  # with a momentum drawn anew each time
        assert len(np.unique(statistics["momentum_norm_sq"])) == 60
        rows = np.flatnonzero(diverging[1:] & diverging[:-1]) + 1
        assert len(rows)
    if backend is Pyro:
        assert len(caught) == 1
        words = ["not finite at gradient step", "last draw", "new momentum", "lower step_size", "friction", "diverging"]
        assert_all_in(words, caught[0])


def test_a_schedule_that_undercuts_the_compensation_later(backend):
    """Pyro sees each step and raises; NumPyro's program cannot, and marks the draws."""
    kernel = backend.kernels.SGLD(
        None,
        lambda z: (z["a"] ** 2).sum(),
        step_size=0.1,
        temperature=lambda step: 1.0 - 0.1 * step,
        gradient_noise_variance=9.0,
    )
    start = {"a": backend.array([1.0, 2.0])}
    if backend is Pyro:
        text = message(backend.run, kernel, start=start, num_samples=9)
        assert_all_in(["gradient_noise_variance=9.0", "gradient step 6", "temperature"], text)
    else:
        _, statistics = backend.run(kernel, start=start, num_samples=9)
        assert statistics["diverging"].tolist() == [False] * 6 + [True] * 3


def test_the_momentum_after_a_divergence_is_from_its_own_law(backend):
    """From the edge of the cliff with no way on, every draw has a fresh momentum of N(0, T M)."""

    def nowhere(z):
        return backend.where(abs(z["a"]) == 0.0, 0.0 * z["a"], backend.array(backend.nan)).sum()

    kernel = backend.kernels.SGHMC(None, nowhere, step_size=0.1, friction=1.0, temperature=0.25, mass={"a": 4.0})
    draws, statistics, _ = divergent(backend, kernel, 40, start={"a": backend.array(np.zeros(50))})
    assert statistics["diverging"].all()
    assert (draws["a"] == 0.0).all()
    ratio = statistics["momentum_norm_sq"] / (0.25 * 4.0)
    z_score = (ratio.sum() - 2000) / np.sqrt(2 * 2000)
    assert abs(z_score) < 4
    np.testing.assert_allclose(statistics["kinetic_temperature"], statistics["momentum_norm_sq"] / 4.0 / 50)


def test_a_step_size_far_too_large(backend):
    kernel = backend.kernels.SGHMC(make_linear(backend), step_size=100.0, friction=1.0, steps_per_draw=60)
    draws, statistics, caught = divergent_on_data(backend, kernel)
    assert statistics["diverging"].all()
    assert np.isfinite(draws["w"]).all()
    assert bool(caught) == (backend is Pyro)


def divergent_on_data(backend, kernel):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws, statistics = backend.run(kernel, X, Y, num_samples=3)
    return draws, statistics, [str(w.message) for w in caught if "went back" in str(w.message)]


def test_pyro_counts_the_divergences_that_it_summarises(capsys):
    torch.set_default_dtype(torch.float64)
    kernel = bnn_ppl.pyro.SGLD(None, cliff(Pyro), step_size=0.3, steps_per_draw=2)
    pyro.set_rng_seed(0)
    mcmc = pyro.infer.MCMC(
        kernel, 20, warmup_steps=5, initial_params={"a": torch.tensor([0.1, 0.2])}, disable_progbar=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run()
    diverging = mcmc._diagnostics[0]["diverging"]
    assert mcmc.diagnostics()["divergences"]["chain 0"] == diverging.nonzero().flatten().tolist()
    mcmc.summary()
    torch.set_default_dtype(torch.float32)
    assert f"Number of divergences: {int(diverging.sum())}" in capsys.readouterr().out


def test_pyro_refuses_a_schedule_that_goes_wrong_later():
    """Beyond the steps that were tried; NumPyro cannot raise there, and the draw diverges."""
    kernel = bnn_ppl.pyro.SGLD(None, lambda z: (z["a"] ** 2).sum(), step_size=lambda t: 0.1 if t < 4 else -0.1)
    text = message(Pyro.run, kernel, num_samples=9, start={"a": torch.zeros(2)})
    assert_all_in(["step_size", "got -0.1", "at gradient step 4"], text)


def test_numpyro_marks_draws_of_a_schedule_that_goes_wrong_later():
    kernel = bnn_ppl.numpyro.SGLD(
        None, lambda z: (z["a"] ** 2).sum(), step_size=lambda t: jnp.where(t < 4, 0.1, jnp.nan)
    )
    draws, statistics = NumPyro.run(kernel, num_samples=6, start={"a": jnp.zeros(2)})
    np.testing.assert_array_equal(statistics["diverging"], [False] * 4 + [True] * 2)
    np.testing.assert_array_equal(draws["a"][4:], draws["a"][[3, 3]])
