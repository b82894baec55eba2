"""SWA and SWAG along Pyro's SVI; mirrors tests/numpyro/test_swa.py."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import LambdaLR
from torch.optim.swa_utils import AveragedModel

from bnn_ppl.pyro import SWA, SWAG
from bnn_ppl.schedules import CosineRestarts, LinearRamp
from tests import averaged, averaged_checks
from tests.averaging_hosts import Pyro as HOST


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def test_average_of_torch():
    """Its AveragedModel, from the same path."""
    run = averaged_checks.train(HOST, "AutoDelta", 11, SWA, model=averaged_checks.real, start=2, cycle_length=3)
    path = averaged_checks.at_snapshots(run)
    names = sorted(path[0])
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(path[0][name])) for name in names])
    average = AveragedModel(module)
    for params in path:
        for parameter, name in zip(module, names, strict=True):
            parameter.data = torch.tensor(params[name])
        average.update_parameters(module)
    found = run.get("averaged_params")
    assert set(found) == set(names)
    for name, value in zip(names, average.module, strict=True):
        np.testing.assert_allclose(found[name], value.detach(), rtol=1e-13)
        np.testing.assert_allclose(found[name], np.mean([params[name] for params in path], 0), rtol=1e-13)


def test_average_of_any_guide():
    averaged_checks.average_of_parameters(HOST)


@pytest.mark.parametrize("rank", [0, 3, 10])
def test_moments_of_swag(rank):
    averaged_checks.point_guide(HOST, rank)


def test_covariance_across_layers():
    averaged_checks.across_layers(HOST, 1000)


def test_guides_with_noise():
    averaged_checks.guides_with_noise(HOST)


@pytest.mark.parametrize("cls", [SWA, SWAG])
def test_bad_input(cls):
    model = averaged.small(HOST)
    pair = model, AutoDelta(model), HOST.adam(0.1), Trace_ELBO()
    with pytest.raises(ValueError, match="cycle_length must be an integer of at least 1, got 0"):
        cls(*pair, start=1, cycle_length=0)
    ramp = LinearRamp(0.1, 0.01, 100)
    optim = LambdaLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "lr_lambda": ramp})
    svi = cls(*pair[:2], optim, pair[-1], start=5, cycle_length=5, learning_rate=ramp)
    for _ in range(9):
        svi.step(*averaged.data(HOST))
        optim.step()
    with pytest.warns(UserWarning, match="learning_rate is .* at the first snapshot"):
        svi.step(*averaged.data(HOST))
    if cls is SWAG:
        with pytest.raises(ValueError, match="rank must be at least 2, for one deviation tells no covariance, got 1"):
            cls(*pair, start=1, cycle_length=1, rank=1)
        for rank in (-1, 2.5, False, "20"):
            with pytest.raises(ValueError, match=f"rank must be an integer of at least 0.* got {rank!r}"):
                cls(*pair, start=1, cycle_length=1, rank=rank)


@pytest.mark.parametrize("rate", [LinearRamp(0.05, 0.01, 4, begin=5), CosineRestarts(0.05, 5, floor=0.01)])
def test_schedules_in_the_optimiser(rate):
    """torch's LambdaLR takes them as they are."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for step in range(12):
        before = weight.item()
        optimiser.zero_grad()
        weight.backward()
        optimiser.step()
        scheduler.step()
        assert before - weight.item() == pytest.approx(rate(step), rel=1e-9)
