"""update_batch_norm for Pyro: statistics by hand, torch's own function, predictions, and what stays as it was."""

from copy import deepcopy
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.nn import PyroModule, PyroSample
from torch.optim.swa_utils import update_bn

from bnn_ppl.pyro import predict, random_torch_module
from bnn_ppl.pyro.batch_norm import update_batch_norm
from tests.batch_norm import CUTS, X_TEST, N, averaged, draw_weights, forward
from tests.pyro.batch_norm import BATCHES, EQUAL, NAMES, NORMAL, X, Y, model_of, network, sites


@pytest.fixture(autouse=True)
def empty_store():
    yield
    pyro.clear_param_store()


def check(statistics, seed=1, cuts=CUTS, names=("1", "4")):
    for name, (mean, variance) in zip(names, averaged(draw_weights(seed), 1, cuts), strict=True):
        EQUAL(statistics[f"{name}.running_mean"], mean)
        EQUAL(statistics[f"{name}.running_var"], variance)


def state(net):
    """All that must stay as it is: values, modes and momenta."""
    values = {name: value.clone() for name, value in net.state_dict().items()}
    return values, [(m.training, getattr(m, "momentum", 0), len(m._forward_hooks)) for m in net.modules()]


def same(net, before):
    values, rest = state(net)
    assert rest == before[1]
    return [name for name in values if not torch.equal(values[name], before[0][name].nan_to_num(7.0))]


@pytest.mark.parametrize("momentum", [0.1, None, 0.73])
@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_averages_over_the_rows_of_all_batches(momentum, training):
    net = network(momentum)
    net.train(training)
    net[4].eval()
    before = state(net)
    random = torch.get_rng_state()
    statistics = update_batch_norm(model_of(net), sites(), BATCHES)
    check(statistics)
    check(net.state_dict())
    assert sorted(same(net, before)) == sorted(statistics)
    assert [int(statistics[f"{i}.num_batches_tracked"]) for i in (1, 4)] == [3, 3]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(value.requires_grad for value in statistics.values())
    net[1].reset_running_stats()
    check(statistics)  # which are copies
    net.load_state_dict(statistics, strict=False)
    check(net.state_dict())


def test_equal_batches_agree_with_torch():
    net = network()
    other = deepcopy(net)
    other.load_state_dict({name.removeprefix("net."): value for name, value in sites().items()}, strict=False)
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
    update_bn(batches, other)
    statistics = update_batch_norm(model_of(net), sites(), batches)
    for name, value in statistics.items():
        EQUAL(value, other.state_dict()[name])


def test_images_in_one_precision():
    images, labels = torch.randn(12, 2, 5, 5), torch.zeros(12)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Flatten())
    net.append(torch.nn.Linear(27, 1)).eval()
    other = deepcopy(net)
    update_bn([images[i : i + 4] for i in (0, 4, 8)], other)
    draw = {f"net.{name}": value.detach() for name, value in net.named_parameters()}
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 4)
    statistics = update_batch_norm(model_of(net), draw, batches)
    assert statistics["1.running_var"].dtype == torch.float32
    np.testing.assert_allclose(statistics["1.running_var"], other[1].running_var, rtol=1e-5)
    np.testing.assert_allclose(statistics["1.running_mean"], other[1].running_mean, rtol=1e-5, atol=1e-7)


def test_module_with_sampled_weights():
    net = PyroModule[torch.nn.Sequential](*(PyroModule[type(m)](*args) for m, args in _layers())).double().eval()
    for name in NAMES:
        *path, last = name.split(".")
        part = net[int(path[0])]
        setattr(part, last, PyroSample(NORMAL.expand(getattr(part, last).shape).to_event()))

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y=None):
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1), 0.5).to_event(1), obs=y)

    model = Model()
    check(update_batch_norm(model, sites(prefix="net."), BATCHES), names=("net.1", "net.4"))
    check(net.state_dict())


def _layers():
    arguments = [(2, 3), (3,), (), (3, 4), (4,), (), (4, 1)]
    return zip(network(), arguments, strict=True)


def test_module_with_learned_weights():
    net = network()

    def model(x, y=None):
        f = pyro.module("net", net)
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(f(x).squeeze(-1), noise).to_event(1), obs=y)

    net.load_state_dict(sites(seed=1, prefix=""), strict=False)
    check(update_batch_norm(model, {"noise": 1.0}, BATCHES))
    before = state(net)
    store = {name: value.clone() for name, value in pyro.get_param_store().items()}
    assert sorted(store) == sorted(f"net$$${name}" for name in NAMES)
    assert not same(net, before)


@pytest.mark.parametrize("given", [True, False])
def test_values_of_params(given):
    net = network()

    def model(x, y=None):
        f = random_torch_module("net", net, {"0.*": NORMAL, "[1346].*": None})
        pyro.sample("y", dist.Normal(f(x).squeeze(-1), 0.5).to_event(1), obs=y)

    values = sites()
    draw = {name: value for name, value in values.items() if name.startswith("net.0.")}
    params = {name.replace("net.", "net$$$"): value for name, value in values.items() if name not in draw}
    if given:
        check(update_batch_norm(model, draw, BATCHES, params=params))
    else:
        for name, value in params.items():
            pyro.param(name, value)
        check(update_batch_norm(model, draw, BATCHES))


def outputs(seed):
    weights = draw_weights(seed)
    return forward(weights, X_TEST, averaged(weights, 1))[0]


def test_predictions_use_the_statistics():
    net = network()
    model = model_of(net)
    update_batch_norm(model, sites(), BATCHES)
    draws = {name: value[None] for name, value in sites().items()}
    found = predict(draws, torch.tensor(X_TEST), model=model)
    EQUAL(found["mean"], outputs(1))
    EQUAL(Predictive(model, draws, return_sites=["mean"])(torch.tensor(X_TEST))["mean"][0], outputs(1))


def test_each_draw_with_its_own_statistics():
    model = model_of(network())
    seeds = [1, 2, 3]
    draws = {name: torch.stack([sites(seed)[name] for seed in seeds]) for name in sites()}
    total = 0.0
    for s in range(len(seeds)):
        draw = {name: value[s] for name, value in draws.items()}
        check(update_batch_norm(model, draw, BATCHES), seeds[s])
        one = {name: value[None] for name, value in draw.items()}
        total = total + predict(one, torch.tensor(X_TEST), model=model)["mean"]
    EQUAL(total / len(seeds), np.mean([outputs(seed) for seed in seeds], 0))


def test_dropout_stays_off_in_evaluation_mode():
    net = network()
    net[2] = torch.nn.Sequential(net[2], torch.nn.Dropout(0.5)).eval()
    check(update_batch_norm(model_of(net), sites(), BATCHES))
    net.train()
    random = torch.get_rng_state()
    statistics = update_batch_norm(model_of(net), sites(), BATCHES)
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(AssertionError):
        check(statistics)


@pytest.mark.parametrize(
    ("size", "subsample_size"),
    [(None, 2), (None, None), (100, 5), (100, 3), (N, 5)],
    ids=["subsampled", "whole", "states N", "the last one fits", "N of a few"],
)
def test_plates_hold_the_rows_of_a_batch(size, subsample_size):
    model = model_of(network(), size)
    check(update_batch_norm(model, sites(), BATCHES, subsample_size=subsample_size))


def test_other_plates_stay_as_they_are():
    net = network()

    def model(x, y=None):
        with pyro.plate("units", 6):
            scale = pyro.sample("scale", dist.HalfNormal(1.0))
        model_of(net)(x * scale.mean(), y)

    check(update_batch_norm(model, sites() | {"scale": np.ones(6)}, BATCHES))


def test_a_network_that_owns_its_statistics_keeps_them_after_an_error():
    net = network().train()

    def model(x, y=None):
        pyro.sample("y", dist.Normal(pyro.module("net", net)(x).squeeze(-1), 0.5).to_event(1), obs=y)

    before = state(net)
    with pytest.raises(ValueError, match=r"draw has no values for \['y'\]"):
        update_batch_norm(model, {}, [(X,)])
    assert not same(net, before)


@pytest.mark.parametrize(
    "batches",
    [
        (list(batch) for batch in BATCHES),
        [{"x": x, "y": y} for x, y in BATCHES],
        [(x, y, None) for x, y in BATCHES],
    ],
    ids=["generator", "dict", "None"],
)
def test_batches_of_several_kinds(batches):
    check(update_batch_norm(model_of(network()), sites(), batches))


def test_a_layer_that_runs_twice_counts_twice():
    norm = torch.nn.BatchNorm1d(2, affine=False).double()
    net = torch.nn.Sequential(norm, torch.nn.Linear(2, 2).double(), norm, torch.nn.Linear(2, 1).double())
    draw = {f"net.{name}": value.detach().clone() for name, value in net.named_parameters()}
    other = deepcopy(net)
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
    update_bn(batches, other)
    update_batch_norm(model_of(net), draw, batches)
    EQUAL(norm.running_var, other[0].running_var)
    assert norm.num_batches_tracked == 6


def test_statistics_that_were_not_finite_are_replaced():
    net = network()
    net[1].running_var.fill_(torch.nan)
    net[4].running_mean.fill_(torch.inf)
    check(update_batch_norm(model_of(net), sites(), BATCHES))


def _fails(what):
    net = network()
    model, draw, batches, options = model_of(net), sites(), BATCHES, {}
    if what == "no layer":
        model = model_of(torch.nn.Sequential(torch.nn.Linear(2, 1)).double())
        draw = {"net.0.weight": torch.zeros(1, 2).double(), "net.0.bias": torch.zeros(1).double()}
    elif what == "not tracked":
        model = model_of(network(track_running_stats=False))
    elif what == "made inside":
        model = lambda x, y: model_of(network())(x, y)  # noqa: E731
    elif what == "two networks":

        def model(x, y):
            model_of(net)(x, y)
            network()(x)

    elif what == "missing":
        del draw["net.4.bias"]
    elif what == "no observations":
        batches = [(x,) for x, y in BATCHES]
    elif what == "all draws":
        draw = {name: torch.stack([value, value]) for name, value in draw.items()}
    elif what == "not finite":
        batches = [*BATCHES, (X * torch.nan, Y)]
    elif what == "one row":
        batches = [*BATCHES, (X[:1], Y[:1])]
    else:
        batches = {"empty": [], "used": iter([]), "array": X, "dict": {"x": X}, "none": None, "no rows": [()]}[what]
    return net, partial(update_batch_norm, model, draw, batches, **options)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no layer", "no layer of batch normalisation .* runs in the model"),
        ("not tracked", r"\['1', '4'\] have track_running_stats=False.*=True"),
        ("made inside", r"\['1', '4'\] are made anew.*outside the model"),
        ("two networks", "two networks .* called '1'.*Sequential"),
        ("missing", r"draw has no values for \['net.4.bias'\]"),
        ("no observations", r"draw has no values for \['y'\].*observations"),
        ("all draws", r"draw\['net.0.weight'\] has shape \(2, 3, 2\).*\(3, 2\).*value\[0\]"),
        ("not finite", r"statistics of \['1', '4'\] are not finite.*batches"),
        ("one row", "more than 1 value per channel"),
        ("empty", "batches is empty .list.: give the training data"),
        ("used", "batches is empty .list_iterator."),
        ("array", "batches must be an iterable of batches.*got Tensor"),
        ("dict", "batches must be an iterable.*got dict"),
        ("none", "batches must be an iterable.*got NoneType"),
        ("no rows", r"lengths \[\].*model's arguments"),
    ],
)
def test_errors_say_what_to_do_and_change_nothing(what, words):
    net, call = _fails(what)
    net[1].running_mean += 1
    net[4].num_batches_tracked += 5
    net[1].train()
    before = state(net)
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert not same(net, before)
    if what == "one row":
        assert "join it to another" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("model", "draw", "params", "words"),
    [
        (None, {}, None, "model must be callable, got None"),
        (print, [1], None, r"draw must be a dict of values by site, got \[1\]"),
        (print, {}, 3, "params must be a dict of values by site, got 3"),
    ],
)
def test_arguments_of_another_kind(model, draw, params, words):
    with pytest.raises(ValueError, match=words):
        update_batch_norm(model, draw, BATCHES, params=params)
