"""predict on both hosts: what it refuses, and what it tells."""

import jax
import numpy as np
import numpyro.distributions as numpyro_dist
import pytest
import torch
import xarray as xr

from tests.averaging_hosts import NumPyro, Pyro
from tests.predicted import (
    CHAINS,
    CLASSES,
    DRAWS,
    LABELS,
    LINEAR,
    NUMPYRO,
    PLATES,
    PYRO,
    REGRESSION,
    VALUES,
    WEIGHTS,
    N,
    X,
    classifier,
    in_plate,
    normal,
    on,
    regression,
)

HOSTS = {"numpyro": NumPyro, "pyro": Pyro}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[NUMPYRO, PYRO], ids=lambda host: host.name)
def host(request):
    return request.param


def bad(host, message, draws=REGRESSION, arrays=(X, VALUES), model=regression, **arguments):
    with pytest.raises(ValueError, match=message):
        host.predict(draws, *on(host, *arrays), model=model and model(host), **arguments)


@pytest.mark.parametrize("name", ["num_draws", "row_batch_size", "draw_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "2"])
def test_numbers(host, name, value):
    bad(host, rf"{name} must be an integer of at least 1, got {value!r}", **{name: value})


def test_too_many_draws(host):
    bad(host, "num_draws=8, and there are 7 draws in a chain", num_draws=8)
    bad(host, "there are no draws", draws={name: value[:0] for name, value in REGRESSION.items()})


def test_what_is_no_source(host):
    for source in (None, [REGRESSION], xr):
        with pytest.raises(
            TypeError, match=rf"source must be a {host.name}\.infer\.MCMC after its run, a dict of draws"
        ):
            host.predict(source, *on(host, X), model=regression(host))


@pytest.mark.parametrize(
    ("cls", "give"),
    [
        ("SVI", "give the guide that it trained, svi.guide"),
        ("HWASVI", r"give svi\.averaged_guide\(\.\.\.\), or the guide"),
        ("FGE", r"give svi\.snapshots\(\.\.\.\), or the guide"),
    ],
)
def test_an_svi_is_no_source(host, cls, give):
    model, trainer = regression(host), HOSTS[host.name]
    settings = {} if cls == "SVI" else {"start": 1, "cycle_length": 1}
    new = getattr(trainer if cls == "SVI" else trainer.ours, cls)
    svi = new(model, trainer.guides.AutoDelta(model), trainer.adam(0.1), trainer.infer.Trace_ELBO(), **settings)
    with pytest.raises(TypeError, match=rf"source is an SVI \({cls}\), and it is its guide that has draws: {give}"):
        host.predict(svi, *on(host, X), model=model)


def test_a_model_is_needed(host):
    bad(host, r"model=None: a dict of draws brings no model", model=None)
    with pytest.raises(ValueError, match="model=None: a guide brings no model"):
        host.predict(lambda x: None, *on(host, X))


def test_draws_of_another_model(host):
    bad(host, r"latent sites \['noise'\] of the model have no draws; there are draws of \['w'\]", draws=LINEAR)
    bad(host, r"draws of site 'w' have the shape \(2, 7, 4\), and the model's site has \(3,\)",
        draws=REGRESSION | {"w": np.zeros((CHAINS, DRAWS, 4))})  # fmt: skip
    bad(host, r"draws of site 'w' have the shape \(3,\)", draws={"w": np.zeros(3), "noise": np.ones(())})
    few = REGRESSION | {"noise": np.ones((CHAINS, DRAWS - 1))}
    bad(host, r"draws differ in number from site to site, \{'w': \(2, 7\), 'noise': \(2, 6\)\}", draws=few)
    chains_and_none = REGRESSION | {"noise": np.ones(CHAINS * DRAWS)}
    bad(host, r"draws differ in number", draws=chains_and_none)


def test_no_rows(host):
    bad(host, r"array arguments have the lengths \[\]", arrays=())
    bad(host, r"array arguments have the lengths \[0, 0\]: .*y_test\)$", arrays=(X[:0], VALUES[:0]))
    with pytest.raises(ValueError, match=r"array arguments have the lengths \[\]: .* lists are no arrays, so make arr"):
        host.predict(REGRESSION, X.tolist(), model=regression(host))


@pytest.mark.parametrize("kind", [*PLATES, "none"])
@pytest.mark.parametrize("count", [1, 5, N - 1, N + 1, 2 * N])
def test_another_number_of_observations(host, kind, count):
    def without_plate(x, y):
        w = host.ppl.sample("w", normal(host, [3]))
        noise = host.ppl.sample("noise", host.dist.HalfNormal(host.array(1.0)))
        host.ppl.sample("y", host.dist.Normal(x @ w, noise), obs=y)

    model = without_plate if kind == "none" else regression(host, kind)
    for row_batch_size in (4, 1000):
        with pytest.raises(ValueError, match=r"as many rows of x as of y") as caught:
            host.predict(REGRESSION, *on(host, X, np.resize(VALUES, count)), model=model, row_batch_size=row_batch_size)
        assert str(count) in str(caught.value)


def test_arguments_that_are_equal_to_observations_by_chance(host):
    def model(x, scales, y):
        w = host.ppl.sample("w", normal(host, [3]))
        with host.ppl.plate("data", len(x)):
            host.ppl.sample("y", host.dist.Normal(x @ w, scales[0]), obs=y)

    for scales in (np.ones(1), np.array([1.0, 1.0, 3.0]), np.ones(2 * N)):
        y = np.where(np.arange(N) < 2 if len(scales) < N else True, 1.0, 2.0)
        found = host.predict(LINEAR, *on(host, X, scales, y), model=model, row_batch_size=4)
        np.testing.assert_array_equal(found["observed"], y)


def test_no_observed_site(host):
    def nothing(host):
        return lambda x, y: host.ppl.sample("w", normal(host, [3]))

    bad(host, r"no observed site with one value per row.* \['w'\]", model=nothing)

    def a_number(host):
        def model(x, y):
            w = host.ppl.sample("w", normal(host, [3]))
            host.ppl.sample("y", host.dist.Normal((x @ w).sum(), host.array(1.0)), obs=host.array(0.0))

        return model

    for site in (None, "y"):
        bad(host, r"no observed site with one value per row.* \['w', 'y'\]", draws=LINEAR, model=a_number, site=site)


def test_one_density_for_all_rows(host):
    def model(host):
        def model(x, y):
            w = host.ppl.sample("w", normal(host, [3]))
            host.ppl.sample("y", host.dist.Normal(x @ w, host.array(1.0)).to_event(1), obs=y)

        return model

    bad(host, r"site 'y' of shape \(11,\) has its rows among its 1 event dimensions", model=model)


def test_nothing_to_average(host):
    def model(host):
        def model(x, y):
            with host.ppl.plate("data", len(x)):
                host.ppl.sample("y", host.dist.Normal(x.sum(-1), host.array(1.0)), obs=y)

        return model

    bad(host, "no draw enters the model before site 'y'", model=model)


def test_local_latent_sites(host):
    def model(host):
        def model(x, y):
            w = host.ppl.sample("w", normal(host, [3]))
            with host.ppl.plate("data", len(x)):
                z = host.ppl.sample("z", host.dist.Normal(host.array(0.0), host.array(1.0)))
                host.ppl.sample("y", host.dist.Normal(x @ w + z, host.array(1.0)), obs=y)

        return model

    message = r"latent site 'z' has a value for each row of the data"
    bad(host, message, draws=LINEAR | {"z": np.zeros((CHAINS, DRAWS, 60))}, model=model)
    bad(host, r"observed sites \['z', 'y'\]", draws=LINEAR, model=model)
    bad(host, r"'y' has another distribution.* depends on \['z'\]", draws=LINEAR, model=model, site="y")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_not_finite(host, value):
    draws = REGRESSION | {"w": REGRESSION["w"].copy()}
    draws["w"][1, 2, 0] = value
    message = "the mean of site 'y' is not finite at row 0 under draw 2 of chain 1: leave out draws that diverged"
    bad(host, message, draws=draws, row_batch_size=4)
    flat = {name: v.reshape(-1, *v.shape[2:]) for name, v in draws.items()}
    bad(host, "not finite at row 0 under draw 9:", draws=flat, draw_batch_size=3)
    x, y = X.copy(), VALUES.copy()
    x[7, 1] = y[8] = value
    bad(host, "not finite at row 7 under draw 0 of chain 0", arrays=(x,), row_batch_size=3)
    bad(host, "the observation of site 'y' is not finite at row 8", arrays=(X, y), row_batch_size=4)


@pytest.mark.parametrize(("label", "text"), [(CLASSES, "4"), (-1, "-1")])
def test_labels_outside_the_classes(host, label, text):
    y = LABELS.copy()
    y[9] = label
    message = rf"observed site 'y' is {text} at row 9, and its classes are 0 to 3: give class numbers"
    bad(host, message, draws=WEIGHTS, arrays=(X, y), model=classifier, row_batch_size=4)


LAWS = {
    "normal": lambda host, f: host.dist.Normal(f[..., None] + host.array(np.zeros(3)), 1.0).to_event(1),
    "categorical": lambda host, f: host.dist.Categorical(logits=f[..., None] + host.array(np.zeros(3))),
}


@pytest.mark.parametrize(
    ("law", "y", "event"),
    [
        ("normal", VALUES[:, None], (3,)),
        ("normal", VALUES, (3,)),
        ("categorical", np.eye(3, dtype=int)[LABELS % 3], ()),
    ],
    ids=["one value for three", "too few axes", "one-hot rows"],
)
def test_observations_of_another_event(host, law, y, event):
    shape, wanted = ((4, *np.shape(y)[1:]), (4, *event))
    message = rf"site 'y' has values of shape {shape}, .* the event shape {event}: give values of shape {wanted}"
    message = message.replace("(", r"\(").replace(")", r"\)")
    bad(host, message, LINEAR, (X, y), lambda host: in_plate(host, lambda f: LAWS[law](host, f)), row_batch_size=4)


def test_class_numbers_that_are_no_integers(host):
    y = LABELS * 1.0
    if host is NUMPYRO:
        bad(host, "has values of type float64, and its classes are the integers 0 to 3", WEIGHTS, (X, y), classifier)
        return
    y[9] += 0.5
    bad(host, rf"observed site 'y' is {y[9]} at row 9, and its classes are 0 to 3", WEIGHTS, (X, y), classifier)


def test_one_hot_rows_without_a_single_one():
    y = np.eye(3)[LABELS % 3]
    y[9] = 0.5, 0.5, 0.0

    def model(host):
        return in_plate(host, lambda f: host.dist.OneHotCategorical(logits=f[..., None] + torch.zeros(3)))

    bad(
        PYRO, "observed site 'y' is -1 at row 9, .* give class numbers .or rows with a single 1.", LINEAR, (X, y), model
    )


def test_groups_for_draws_and_results_for_params(host):
    groups = {"posterior": xr.Dataset({"w": (("chain", "draw", "i"), LINEAR["w"])})}
    with pytest.raises(
        TypeError, match=r"source has a Dataset under 'posterior' instead of draws: give arrays by site"
    ):
        host.predict(groups, *on(host, X), model=regression(host))
    with pytest.raises(TypeError, match=r"params must be a dict of values by param site, got tuple: (give|leave)"):
        host.predict(LINEAR, *on(host, X), model=regression(host), params=(1.0,))


def test_labels_that_are_no_numbers_of_classes(host):
    y = LABELS % 2 * 1.0
    y[5] = 0.5

    def model(host):
        return in_plate(host, lambda f: host.dist.Bernoulli(logits=f))

    bad(
        host,
        r"observed site 'y' is 0\.5 at row 5, and its classes are 0 to 1",
        draws=LINEAR,
        arrays=(X, y),
        model=model,
    )


def test_means_of_the_wrong_shape(host):
    def model(host):
        def model(x, y):
            w = host.ppl.sample("w", normal(host, [3, 1]))
            host.ppl.sample("y", host.dist.Normal(x @ w, host.array(1.0)), obs=y)

        return model

    bad(
        host,
        r"observed site 'y' has values of shape \(11,\).*squeezing the network's output",
        draws={"w": LINEAR["w"][..., None]},
        model=model,
    )


def test_distributions_without_a_mean(host):
    def cauchy(host):
        return in_plate(host, lambda f: host.dist.Cauchy(f, host.array(1.0)))

    bad(host, r"the (mean|variance) of site 'y' is not finite .*has a mean and a variance", draws=LINEAR, model=cauchy)

    def transformed(host):
        transforms = numpyro_dist.transforms if host.name == "numpyro" else torch.distributions.transforms

        def response(f):
            return host.dist.TransformedDistribution(
                host.dist.Normal(f, host.array(1.0)), [transforms.SoftplusTransform()]
            )

        return in_plate(host, response)

    bad(host, r"site 'y' has the distribution TransformedDistribution, without a mean", draws=LINEAR, model=transformed)


def test_the_models_own_errors(host):
    def model(host):
        def model(x, y):
            raise ZeroDivisionError("of the model")

        return model

    with pytest.raises(ZeroDivisionError, match="of the model"):
        host.predict(LINEAR, *on(host, X, VALUES), model=model(host))
