"""Refusals of to_arviz with an SVI: arguments, results and guides that do not fit."""

from copy import copy

import jax
import numpy as np
import numpyro.infer
import pyro.infer
import pytest
import torch

from bnn_ppl import to_arviz
from tests.svi_hosts import HOSTS, NOISE, B, N, X, Y, data, full_covariance, groups_of, linear, trained


@pytest.fixture(params=list(HOSTS))
def host(request):
    return HOSTS[request.param]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be an integer of at least 1, got 0"),
        ({"num_samples": 2.5}, ValueError, "num_samples must be an integer of at least 1, got 2.5"),
        (
            {"model_args": X},
            TypeError,
            r"model_args must be a tuple.*got ndarray: for one argument write model_args=\(x,",
        ),
        ({"model_kwargs": [1]}, TypeError, "model_kwargs must be a dict.*got list"),
        (
            {"model_args": None},
            ValueError,
            r"model_args of 0 and model_kwargs=\['size'\] do not fit.*missing.*'x'.*pass",
        ),
        ({"model_kwargs": {"scale": 1}}, ValueError, r"model_kwargs=\['scale'\] do not fit.*unexpected.*'scale'"),
        ({"noise_batches": 4}, ValueError, "noise_batches=4 is for an MCMC, and source is an SVI: leave it out"),
        ({"var_names": ["w_auto_loc"]}, ValueError, r"names \['w_auto_loc'\], and the sites are \['w', 'total'\]"),
        ({"rows": [1]}, ValueError, r"rows=\[1\].*no effect without log_likelihood=True"),
        ({"rows": [N], "log_likelihood": True}, ValueError, "rows of plate 'data' must be from 0 to 11"),
        ({"batch_size": N + 1, "log_likelihood": True}, ValueError, "batch_size=13 is larger than plate 'data'"),
        ({"dims": {"v": ["a"]}}, ValueError, r"dims names \['v'\]"),
    ],
)
def test_bad_arguments(host, arguments, error, message):
    _, svi, given = trained(host, size=B)
    with pytest.raises(error, match=message):
        to_arviz(svi, **(given | {"model_args": data(host), "model_kwargs": {"size": B}} | arguments))


def test_bad_losses(host):
    _, svi, given = trained(host)
    given = {"svi_result": given["svi_result"].state} if host.name == "numpyro" else {}
    with pytest.raises(TypeError, match="losses must be a list of numbers, one a step"):
        to_arviz(svi, model_args=data(host), losses=["high"], **given)
    for losses, shape in (([], r"\(0,\)"), ([[1.0]], r"\(1, 1\)"), (3.0, r"\(\)")):
        with pytest.raises(ValueError, match=f"losses must be a list of one or more.*{shape}"):
            to_arviz(svi, model_args=data(host), losses=losses, **given)


def test_result_of_numpyro():
    host = HOSTS["numpyro"]
    model, svi, given = trained(host)
    result = given["svi_result"]
    with pytest.raises(ValueError, match=r"svi_result is missing.*pass what svi.run returned"):
        to_arviz(svi, model_args=data(host))
    with pytest.raises(TypeError, match=r"svi_result must be what svi.run returned.*got dict"):
        to_arviz(svi, model_args=data(host), svi_result=result.params)
    with pytest.raises(ValueError, match=r"losses given, and svi_result has those.*leave losses out"):
        to_arviz(svi, model_args=data(host), svi_result=result, losses=[1.0])
    other = host.SVI(model, svi.guide, svi.optim, numpyro.infer.Trace_ELBO())
    with pytest.raises(ValueError, match="svi_result of type SVIState needs the SVI that it came from"):
        to_arviz(other, model_args=data(host), svi_result=result.state)


def test_result_of_pyro():
    host = HOSTS["pyro"]
    _, svi, _ = trained(host)
    with pytest.raises(ValueError, match=r"svi_result of type dict: a Pyro SVI has none.*leave it out"):
        to_arviz(svi, model_args=data(host), svi_result={})


def test_guide_that_was_not_trained(host):
    model = linear(host)
    svi, given = host.train(model, full_covariance(host, np.zeros(2), np.eye(2)), data(host))
    svi.guide = host.guides.AutoNormal(model)
    with pytest.raises(ValueError, match="guide AutoNormal has not been trained: run SVI"):
        to_arviz(svi, model_args=data(host), **given)

    def guide(x, y, size=None):
        host.ppl.sample(
            "w", host.dist.Normal(host.ppl.param("other", host.array([0.0, 0.0])), host.array(1.0)).to_event(1)
        )

    svi.guide = guide
    with pytest.raises(
        ValueError, match=r"guide guide has not been trained: its params \['other'\] have no values: run"
    ):
        to_arviz(svi, model_args=data(host), **given)
    if host.name == "pyro":
        assert "other" not in pyro.get_param_store()


def test_latent_sites_in_a_subsampled_plate(host):
    ppl, dist = host.ppl, host.dist

    def model(y, size=None):
        with ppl.plate("data", N, subsample_size=size):
            z = ppl.sample("z", dist.Normal(host.array(0.0), host.array(1.0)))
            ppl.sample("y", dist.Normal(z, host.array(1.0)), obs=ppl.subsample(y, event_dim=0))

    args = data(host)[1:]
    svi, given = host.train(model, host.guides.AutoNormal(model), args, {"size": B})
    with pytest.raises(
        ValueError, match=r"latent site 'z' lies in the subsampled plate 'data'.*4 of its 12 rows: leave"
    ):
        to_arviz(svi, model_args=args, model_kwargs={"size": B}, **given)
    svi, given = host.train(model, host.guides.AutoNormal(model), args)
    groups = groups_of(to_arviz(svi, model_args=args, num_samples=5, log_likelihood=True, **given))
    assert groups["posterior"]["z"].dims == ("chain", "draw", "data")
    assert groups["log_likelihood"]["y"].shape == (1, 5, N)


def test_sites_without_a_guide(host):
    ppl, dist = host.ppl, host.dist

    def unobserved(x, y, size=None):
        w = ppl.sample("w", dist.Normal(host.array(0.0), host.array(1.0)).expand([2]).to_event(1))
        with ppl.plate("data", N):
            ppl.sample("y", dist.Normal(x @ w, host.array(NOISE)))

    _, svi, given = trained(host)
    svi = copy(svi)
    svi.model = unobserved
    with pytest.raises(ValueError, match=r"no draws of the model's latent sites \['y'\].*data were None: pass"):
        to_arviz(svi, model_args=data(host), **given)


def by_index(host, law, size, event=()):
    """Model of which the rows are taken by the plate's indices."""
    ppl, dist = host.ppl, host.dist

    def model(x, y, known=None):
        prior = dist.Normal(host.array(0.0), host.array(1.0)).expand([2, *event])
        w = ppl.sample("w", prior.to_event(1 + len(event)))
        with ppl.plate("data", N, subsample_size=size) as i:
            fn = law(x[i] @ w)
            ppl.sample("y", fn if known is None else fn.mask(known[i]), obs=y[i])

    return model


@pytest.mark.parametrize("size", [None, B])
def test_rows_that_the_data_do_not_have(host, size):
    model = by_index(host, lambda mean: host.dist.Normal(mean, host.array(NOISE)), size)
    x, y = data(host)
    svi, given = host.train(model, host.guides.AutoNormal(model), (x, y), steps=1)
    for args in ((x, y[:-1]), (x[:-2], y), (x, y[:B])):
        with pytest.raises(ValueError, match=r"plate 'data' has 12 rows.*that its data do not have.*x and y alike"):
            to_arviz(svi, model_args=args, num_samples=2, **given)
    if size is not None:
        longer = np.append(Y, np.float64(0.3))
        longer = host.array(longer) if host.name == "pyro" else longer.astype(float)
        with pytest.warns(UserWarning, match="site 'y' have 13 rows and its plate has 12") as caught:
            to_arviz(svi, model_args=(x, longer), num_samples=2, **given)
        assert caught[0].filename == __file__


@pytest.mark.parametrize("size", [None, B])
def test_observations_of_another_event(host, size):
    """One value would stand for all three."""
    model = by_index(host, lambda mean: host.dist.Normal(mean, 1.0).to_event(1), size, (3,))
    x, y = data(host)
    svi, given = host.train(
        model, host.guides.AutoNormal(model), (x, y[:, None] + host.array([0.0, 0.0, 0.0])), steps=1
    )
    message = rf"values of shape \({size or N}, 1\), .* event shape \(3,\): give values of shape \({size or N}, 3\)"
    with pytest.raises(ValueError, match=message):
        to_arviz(svi, model_args=(x, y[:, None]), num_samples=2, **given)


@pytest.mark.parametrize("size", [None, B])
def test_labels_that_are_no_classes(host, size):
    array = torch.as_tensor if host.name == "pyro" else jax.numpy.asarray
    model = by_index(host, lambda logits: host.dist.Categorical(logits=logits), size, (3,))
    x, labels = data(host)[0], np.arange(N) % 3
    svi, given = host.train(model, host.guides.AutoNormal(model), (x, array(labels)), steps=1)
    middle = np.where(np.arange(N) == B + 1, 7, labels)
    for bad, message in ((labels + 1, "is 3 at row 2"), (labels - 1, "is -1 at row 0"), (middle, "is 7 at row 5")):
        with pytest.raises(ValueError, match=f"observed site 'y' {message}, and its classes are 0 to 2: give.*mask"):
            to_arviz(svi, model_args=(x, array(bad)), num_samples=2, **given)
    masked = middle if host.name == "numpyro" else np.where(middle < 3, middle, 0.5)  # Pyro itself fails on 7
    tree = to_arviz(svi, model_args=(x, array(masked), array(middle < 3)), num_samples=2, log_likelihood=True, **given)
    assert np.isfinite(groups_of(tree)["log_likelihood"]["y"]).all()
    with pytest.raises(ValueError, match=r"observed site 'y' (is 0.5 at row 0|has values of type float32), and its"):
        to_arviz(svi, model_args=(x, host.array(labels + 0.5)), num_samples=2, **given)


def test_labels_of_one_batch(host):
    array = torch.as_tensor if host.name == "pyro" else jax.numpy.asarray
    ppl, dist = host.ppl, host.dist

    def model(x, y):
        w = ppl.sample("w", dist.Normal(host.array(0.0), host.array(1.0)).expand([2, 3]).to_event(2))
        with ppl.plate("data", 3 * N, subsample_size=len(y)):
            ppl.sample("y", dist.Categorical(logits=x @ w), obs=y)

    x, labels = data(host)[0], np.arange(N) % 3
    svi, given = host.train(model, host.guides.AutoNormal(model), (x, array(labels)), steps=1)
    with pytest.raises(ValueError, match="observed site 'y' is 3 at row 2, and its classes are 0 to 2"):
        to_arviz(svi, model_args=(x, array(labels + 1)), num_samples=2, **given)


def test_rows_without_a_single_one():
    host = HOSTS["pyro"]
    model = by_index(host, lambda logits: host.dist.OneHotCategorical(logits=logits), B, (3,))
    x, rows = data(host)[0], torch.eye(3)[torch.arange(N) % 3]
    svi, given = host.train(model, host.guides.AutoNormal(model), (x, rows), steps=1)
    with pytest.raises(ValueError, match=r"observed site 'y' is .* at row 0, and its distribution is over rows with"):
        to_arviz(svi, model_args=(x, 2 * rows), num_samples=2, **given)


@pytest.mark.parametrize(
    "arguments",
    [{"svi_result": 1}, {"model_args": ()}, {"model_kwargs": {}}, {"num_samples": 5}, {"losses": [1.0]}],
)
def test_arguments_of_an_svi_with_an_mcmc(host, arguments):
    kernel = host.ppl.infer.NUTS(linear(host))
    if host.name == "numpyro":
        mcmc = numpyro.infer.MCMC(kernel, num_warmup=1, num_samples=1, progress_bar=False)
    else:
        mcmc = pyro.infer.MCMC(kernel, 1)
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} of type .* is for an SVI, and source is an MCMC.*leave it out"):
        to_arviz(mcmc, **arguments)


def test_what_is_neither(host):
    with pytest.raises(TypeError, match=r"source must be a .*MCMC.*or an SVI"):
        to_arviz(host.guides.AutoNormal(linear(host)))
