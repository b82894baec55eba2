"""Snapshots along NumPyro's SVI; mirrors tests/pyro/test_fge.py."""

import jax
import pytest

from bnn_ppl.numpyro import FGE
from bnn_ppl.schedules import Triangular
from tests import averaged, averaged_checks
from tests.averaging_hosts import NumPyro as HOST


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("num_snapshots", [2, 4, 6, 20])
def test_snapshots_are_those_of_the_path(num_snapshots):
    averaged_checks.kept_snapshots(HOST, num_snapshots)


def test_ensemble():
    averaged_checks.ensemble(HOST)


def test_ensemble_of_guides():
    averaged_checks.ensemble_of_guides(HOST)


def test_at_the_lowest_rate():
    averaged_checks.at_the_lowest_rate(HOST, Triangular(0.05, 0.01, 6, begin=5))


def test_bad_input():
    model = averaged.small(HOST)
    pair = model, HOST.guides.AutoDelta(model), HOST.adam(0.1), HOST.infer.Trace_ELBO()
    for number in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"num_snapshots must be an integer of at least 1, got {number}"):
            FGE(*pair, start=1, cycle_length=1, num_snapshots=number)
    with pytest.warns(UserWarning, match=r"as low as 0\.01 at step 8: .* with start=9"):
        FGE(*pair, start=6, cycle_length=6, learning_rate=Triangular(0.05, 0.01, 6, begin=5))
    run = averaged_checks.train(HOST, "AutoDelta", 3, FGE, start=5, cycle_length=2)
    with pytest.raises(ValueError, match="no snapshot to average after 3 steps: the first falls after step 5"):
        run.get("snapshots", *run.args)
    with pytest.raises(ValueError, match="no snapshot to average"):
        run.get("snapshot_params")
