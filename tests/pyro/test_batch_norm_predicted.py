"""What predict says of batch normalisation without statistics of the training data."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.nn.modules import module as hooks

from bnn_ppl import to_arviz
from bnn_ppl.pyro import predict, update_batch_norm
from tests.pyro.batch_norm import BATCHES, EQUAL, X, Y, model_of, network, sites


def sites_of_two():
    return {name: torch.stack([value, value]) for name, value in sites().items()}


def predicted(net):
    """Predictions in parts of 3 rows, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = predict(sites_of_two(), X, model=model_of(net), row_batch_size=3)
    assert {warning.filename for warning in caught} <= {__file__}
    return found["mean"], [str(warning.message) for warning in caught]


@pytest.mark.parametrize("norm", [{}, {"track_running_stats": False}])
def test_predictions_by_the_statistics_of_a_batch_are_told(norm):
    net = network(**norm)
    net[1].train()
    net[4].train(not norm)
    (words,) = predicted(net)[1]
    assert "layers of batch normalisation ['1', '4'] normalise each batch of rows by itself" in words
    assert "depend on the rows that are evaluated together: call network.eval()" in words
    assert "then update_batch_norm(model, draw, batches)" in words


def test_statistics_that_were_never_updated_are_told():
    net = network()
    model = model_of(net)
    net[1].running_mean += 1.0  # of an old file, without a number of batches
    (words,) = predicted(net)[1]
    assert "statistics of the layers of batch normalisation ['4'] were never updated" in words
    assert "then update_batch_norm(model, draw, batches)" in words
    net[1].train()
    assert len(predicted(net)[1]) == 2
    net.eval()
    update_batch_norm(model, sites(), BATCHES)
    one, told = predicted(net)
    assert not told
    EQUAL(one, predict(sites_of_two(), X, model=model, row_batch_size=None)["mean"])


def test_exported_log_likelihoods_tell_too():
    net = network()
    model = model_of(net)
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    svi.step(X, Y, subsample_size=3)
    update_batch_norm(model, sites(), BATCHES)

    def told(**groups):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            to_arviz(svi, model_args=(X, Y), model_kwargs={"subsample_size": 3}, num_samples=2, **groups)
        assert {warning.filename for warning in caught} <= {__file__}
        return [str(warning.message) for warning in caught]

    assert not told(log_likelihood=True, posterior_predictive=True)
    net[1].train()
    assert not told()
    (words,) = told(log_likelihood=True)
    assert "layers of batch normalisation ['1'] normalise each batch of rows by itself" in words
    assert told(posterior_predictive=True) == [words]


def test_a_network_that_fails_leaves_no_hooks_behind():
    net = network()

    def model(x, y=None):
        model_of(net)(x, y)
        net(x[:, :1])

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        predict(sites_of_two(), X, model=model)
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_compiled_networks_are_not_looked_into():
    net = network()
    compiled = torch.compile(net, backend="eager")

    def model(x, y=None):
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(compiled(x).squeeze(-1), noise), obs=y)

    with torch.no_grad():
        expected = net(X).squeeze(-1)
    EQUAL(predict({"noise": torch.ones(2)}, X, model=model)["mean"], expected)
    with pytest.raises(ValueError, match=r"if torch.compile hides it, give a model of the network that is not"):
        update_batch_norm(model, {"noise": 1.0}, BATCHES)
