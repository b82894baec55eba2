"""Measured gradient noise, and the warning where it dominates; mirrors tests/numpyro/test_gradient_noise.py."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

import bnn_ppl
from bnn_ppl.pyro import SGHMC, SGLD, SGNHT
from tests import cases

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


def offset_model(y):
    theta = {n: pyro.sample(n, dist.Normal(ZERO, ONE).expand([v.shape[1]]).to_event(1)) for n, v in y.items()}
    with pyro.plate("data", cases.ROWS, subsample_size=cases.BATCH) as rows:
        for n, v in y.items():
            pyro.sample(f"y_{n}", dist.Normal(theta[n], cases.ROWS**0.5).to_event(1), obs=v[rows])


def data():
    return {name: torch.as_tensor(value) for name, value in cases.offset_data(cases.V).items()}


def run(kernel, draws=2, **options):
    mcmc = MCMC(kernel, warmup_steps=1, num_samples=draws, disable_progbar=True, **options)
    mcmc.run(data())
    return mcmc


@pytest.mark.parametrize("chains", [{}, {"num_chains": 2}])
def test_variance_at_the_last_draw(chains):
    kernel = SGHMC(offset_model, step_size=1e-3, friction=3.0, subsampling="with_replacement")
    mcmc = run(kernel, **chains)
    before = torch.get_rng_state()
    tree = bnn_ppl.to_arviz(mcmc, noise_batches=400)
    cases.assert_noise(tree["sample_stats"], chains.get("num_chains", 1), 400)
    assert torch.equal(before, torch.get_rng_state())


def test_warning_where_noise_dominates():
    with pytest.warns(
        UserWarning, match=r"kinetic temperature is \d\.\d+, and temperature is 1: the noise of the mini"
    ):
        bnn_ppl.to_arviz(run(SGHMC(offset_model, **cases.HOT, steps_per_draw=10), draws=100))


@pytest.mark.parametrize("case", cases.NOT_HOT)
@pytest.mark.filterwarnings("ignore:resample_scale=1.0 differs")
def test_no_warning_where_noise_does_not_matter(case):
    mcmc = run(cases.not_hot(case, SGHMC, SGNHT)(offset_model), draws=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnn_ppl.to_arviz(mcmc)


def full_data_model(y):
    theta = pyro.sample("theta", dist.Normal(ZERO, ONE))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def test_bad_requests():
    mcmc = run(SGLD(offset_model, step_size=1e-3))
    with pytest.raises(ValueError, match=r"noise_batches must be at least 2, .* got 1"):
        bnn_ppl.to_arviz(mcmc, noise_batches=1)
    with pytest.raises(ValueError, match=r"noise_batches must be an integer of at least 1, got 2.5"):
        bnn_ppl.to_arviz(mcmc, noise_batches=2.5)
    controlled = run(SGLD(offset_model, step_size=1e-3, control_variate="svrg"))
    with pytest.raises(ValueError, match="noise_batches=8 does not know the noise under control_variate"):
        bnn_ppl.to_arviz(controlled, noise_batches=8)
    whole = MCMC(SGLD(full_data_model, step_size=1e-3), warmup_steps=1, num_samples=2, disable_progbar=True)
    whole.run(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"noise_batches=8 needs .* a subsampled plate"):
        bnn_ppl.to_arviz(whole, noise_batches=8)
