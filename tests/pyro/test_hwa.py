"""Averaged laws of guides along Pyro's SVI; mirrors tests/numpyro/test_hwa.py."""

import io

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from bnn_ppl.pyro import FGE, SWA, SWAG, AnnealedELBO
from bnn_ppl.pyro import HWASVI as HWA
from tests import averaged, averaged_checks
from tests.averaging_hosts import Pyro as HOST

LOW_RANK = {"covariance": "low_rank", "rank": 2}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("name", averaged.PAIRS)
def test_the_path_is_the_hosts(name, size):
    averaged_checks.path_of(HOST, name, HWA, LOW_RANK, kwargs={"size": size})


@pytest.mark.parametrize(("cls", "settings"), [(HWA, {}), (FGE, {}), (SWA, {}), (SWAG, {"rank": 2})])
def test_the_path_with_a_scheduler(cls, settings):
    def rate(step):
        return 0.1 / (step + 1)

    averaged_checks.path_of(HOST, "AutoDelta", cls, settings, optim=HOST.adam(rate), scheduled=True)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDelta"])
def test_the_path_with_annealing(name):
    def changing(step):
        return {"kl_weight": min(1.0, 0.2 * (step + 1))}

    averaged_checks.path_of(HOST, name, HWA, {}, loss=AnnealedELBO(), changing=changing, kwargs={"size": 4})


def test_in_single_precision():
    torch.set_default_dtype(torch.float32)
    averaged_checks.path_of(HOST, "AutoNormal", HWA, LOW_RANK)


@pytest.mark.parametrize(("kind", "covariance"), averaged_checks.MOMENTS)
def test_moments_by_hand(kind, covariance):
    averaged_checks.moments_by_hand(HOST, kind, covariance)


@pytest.mark.parametrize("covariance", ["mixture", "low_rank"])
def test_constant_trajectory(covariance):
    averaged_checks.constant_trajectory(HOST, covariance)


def test_mixture_of_points_is_that_of_iterates():
    averaged_checks.mixture_is_iterate(HOST)


def test_forgetting():
    averaged_checks.forgetting(HOST)


def test_means_are_of_unconstrained_coordinates():
    averaged_checks.in_unconstrained_coordinates(HOST)


@pytest.mark.parametrize(("kind", "covariance"), averaged_checks.DRAWS)
def test_draws_and_elbo(kind, covariance):
    run, mean = averaged_checks.draws_and_losses(HOST, kind, covariance, 500, 250)
    averaged_checks.at_the_mean(HOST, run, mean)


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoDiagonalNormal"])
def test_nothing_is_left_behind(kind):
    """Neither in the parameters, nor in the store, nor in the random state."""
    run = averaged_checks.train(HOST, kind, 8, start=2, cycle_length=2, covariance="parameters")
    params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    own = {name: value.detach().clone() for name, value in run.svi.guide.named_parameters()}
    state = torch.get_rng_state()
    for covariance in ("parameters", "mixture"):
        if covariance == "mixture":
            run = averaged_checks.train(HOST, kind, 8, start=2, cycle_length=2)
            state = torch.get_rng_state()
        guide = run.get("averaged_guide")
        guide.median(*run.args)
        run.get("averaged_params")
        assert torch.equal(torch.get_rng_state(), state)
        guide(*run.args)
        assert {name for name, _ in run.svi.guide.named_parameters()} == set(own)
        for name, value in pyro.get_param_store().items():
            assert torch.equal(value, params[name])
            assert value.requires_grad
        for name, value in run.svi.guide.named_parameters():
            assert torch.equal(value, own[name])


def new(kind="AutoNormal", cls=HWA, **settings):
    model = averaged.small(HOST)
    guide = getattr(HOST.guides, kind)(model)
    settings = {"start": 3, "cycle_length": 4, "optim": HOST.adam(0.05), "loss": Trace_ELBO()} | settings
    return cls(model, guide, **settings)


def save(state):
    """A state, written and read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def kept(svi):
    values = svi._kept if isinstance(svi._kept, list) else [group for group in svi._kept if group]
    return [value for group in values for value in group.values()]


@pytest.mark.parametrize("cls", [HWA, FGE])
@pytest.mark.parametrize("kind", ["AutoNormal", "AutoDiagonalNormal", "AutoDelta"])
@pytest.mark.parametrize("where", ["another", "same", "another_process"])
def test_resume(kind, cls, where):
    """In the middle of a window; in another process guide and store are empty."""
    settings = LOW_RANK if cls is HWA else {}
    args = averaged.data(HOST)
    whole = averaged_checks.train(HOST, kind, 13, cls, start=3, cycle_length=4, **settings)
    first = averaged_checks.train(HOST, kind, 5, cls, start=3, cycle_length=4, **settings)
    state, svi = save(first.svi.state_dict()), first.svi
    for _ in range(3):  # what follows is forgotten
        svi.step(*args)
    torch.randn(7)
    if where != "same":
        if where == "another_process":
            pyro.clear_param_store()
        svi = new(kind, cls, **settings)
    svi.load_state_dict(state)
    losses = [svi.step(*args) for _ in range(8)]
    assert whole.losses == first.losses + losses
    for name, value in pyro.get_param_store().items():
        np.testing.assert_array_equal(value.detach(), whole.path[-1][name])
    assert len(kept(svi)) == len(kept(whole.svi))
    for found, expected in zip(kept(svi), kept(whole.svi), strict=True):
        assert torch.equal(found, expected)
    np.testing.assert_array_equal(svi.snapshot_steps(), [3, 7, 11])
    if cls is HWA:  # the guide has the parameters too
        pyro.set_rng_seed(1)
        found = svi.averaged_guide().median(*args)
        assert torch.isfinite(found["w"]).all()


def test_after_a_run_of_the_hosts_own():
    """Its guide and optimiser go on; steps are counted from there."""
    plain = averaged_checks.train(HOST, "AutoNormal", 13, SVI)
    first = averaged_checks.train(HOST, "AutoNormal", 5, SVI)
    svi = HWA(first.model, first.svi.guide, first.svi.optim, Trace_ELBO(), start=3, cycle_length=4)
    assert first.losses + [svi.step(*first.args) for _ in range(8)] == plain.losses
    np.testing.assert_array_equal(svi.snapshot_steps(), [3, 7])


def test_where_snapshots_fall():
    for start, cycle_length, steps in ((0, 4, 12), (1, 1, 5), (5, 2, 9), (2, 10, 13)):
        run = averaged_checks.train(HOST, "AutoDelta", steps, FGE, start=start, cycle_length=cycle_length)
        expected = averaged.steps_of(start or cycle_length, cycle_length, steps)
        np.testing.assert_array_equal(run.get("snapshot_steps"), expected)


def test_start_beyond_the_run():
    averaged_checks.too_early(averaged_checks.train(HOST, "AutoDelta", 3, start=5, cycle_length=2))


def test_few_snapshots():
    averaged_checks.few_snapshots(HOST)


@pytest.mark.parametrize("name", averaged.REFUSED)
def test_guides_without_locations(name):
    averaged_checks.without_locations(HOST, name)


@pytest.mark.parametrize(("arguments", "message"), averaged.BAD)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        new(**arguments)
