"""update_batch_norm for NumPyro: statistics by hand with linen and nnx, predictions, SVI, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import torch
from flax import linen, nnx
from jax import random
from numpyro.contrib.module import flax_module, random_flax_module, random_nnx_module
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from bnn_ppl import to_arviz
from bnn_ppl.numpyro import SWAG, predict
from bnn_ppl.numpyro.batch_norm import update_batch_norm
from tests.batch_norm import CUTS, X_TEST, N, averaged, draw_weights, forward
from tests.batch_norm import X as X_NUMPY
from tests.batch_norm import Y as Y_NUMPY

X, Y = jnp.asarray(X_NUMPY, jnp.float32), jnp.asarray(Y_NUMPY, jnp.float32)
BATCHES = [(X[cut], Y[cut]) for cut in CUTS]
PARTS = ["0.kernel", "0.bias", "1.scale", "1.bias", "3.kernel", "3.bias", "4.scale", "4.bias", "6.kernel", "6.bias"]
NORMAL = dist.Normal(0, 1)
CLOSE = partial(np.testing.assert_allclose, rtol=3e-6, atol=3e-6)
MOMENTA = (0.9, 0.995)


class Linen(linen.Module):
    momenta: tuple = MOMENTA
    dropout: float = 0.0

    @linen.compact
    def __call__(self, x, train):
        def norm(i):
            return linen.BatchNorm(not train, momentum=self.momenta[i], name=str(1 + 3 * i))

        x = jnp.tanh(norm(0)(linen.Dense(3, name="0")(x)))
        x = linen.Dropout(self.dropout, deterministic=not train)(x)
        return linen.Dense(1, name="6")(jnp.tanh(norm(1)(linen.Dense(4, name="3")(x))))[..., 0]


class NNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.Dict(
            {
                "0": nnx.Linear(2, 3, rngs=rngs),
                "1": nnx.BatchNorm(3, momentum=MOMENTA[0], rngs=rngs),
                "3": nnx.Linear(3, 4, rngs=rngs),
                "4": nnx.BatchNorm(4, momentum=MOMENTA[1], rngs=rngs),
                "6": nnx.Linear(4, 1, rngs=rngs),
            }
        )
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x, train):
        layers = self.layers
        x = jnp.tanh(layers["1"](layers["0"](x), use_running_average=not train))
        x = self.dropout(x, deterministic=not train)
        x = jnp.tanh(layers["4"](layers["3"](x), use_running_average=not train))
        return layers["6"](x)[..., 0]


def linen_net(train, **settings):
    return random_flax_module("net", Linen(**settings), NORMAL, X[:2], train, mutable=["batch_stats"])


MODULE = NNX()


def nnx_net(train):
    return random_nnx_module("net", MODULE, NORMAL)


def model_of(network, size=None):
    def model(x, y=None, train=False, subsample_size=None):
        net = network(train)
        with numpyro.plate("data", size or len(x), subsample_size=subsample_size) as rows:
            mean = numpyro.deterministic("mean", net(x if size else x[rows], train))
            numpyro.sample("y", dist.Normal(mean, 0.5), obs=None if y is None else y if size else y[rows])

    return model


NETWORKS = {
    "linen": (linen_net, "net/{}", lambda state: state["net$state"]["batch_stats"]),
    "nnx": (nnx_net, "net/layers.{}", lambda state: state["net$state"]["state"]["layers"]),
}
both = pytest.mark.parametrize("kind", list(NETWORKS))
LINEN = model_of(linen_net)


def sites(seed=1, kind="linen"):
    name = NETWORKS[kind][1]
    return {name.format(part): jnp.asarray(v) for part, v in zip(PARTS, draw_weights(seed), strict=True)}


def check(statistics, seed=1, kind="linen", close=CLOSE):
    found = NETWORKS[kind][2](statistics)
    for name, (mean, variance) in zip(("1", "4"), averaged(draw_weights(seed), 0), strict=True):
        close(found[name]["mean"], mean)
        close(found[name]["var"], variance)


@both
def test_statistics_are_averages_over_the_rows_of_all_batches(kind):
    statistics = update_batch_norm(model_of(NETWORKS[kind][0]), sites(kind=kind), BATCHES, train=True)
    check(statistics, kind=kind)
    assert list(statistics) == ["net$state"]


def test_double_precision():
    with jax.enable_x64(True):
        batches = [(X_NUMPY[cut], Y_NUMPY[cut]) for cut in CUTS]
        statistics = update_batch_norm(LINEN, sites(), batches, train=True)
        check(statistics, close=partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12))


@pytest.mark.parametrize("momenta", [(0.0, 0.5), (0.99, 0.9999), (1 / 3, 0.123456789)])
def test_any_momentum(momenta):
    model = model_of(partial(linen_net, momenta=momenta))
    loose = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
    check(update_batch_norm(model, sites(), BATCHES, train=True), close=loose)


@both
def test_swag_on_the_path_of_svi(kind):
    """Looking for the laws of the guide runs the network, which writes into its statistics."""
    model = model_of(NETWORKS[kind][0])
    arguments = (model, AutoDelta(model), optax.sgd(1e-4), Trace_ELBO())
    svi = SWAG(*arguments, start=2, cycle_length=2, rank=3)
    result, plain = (s.run(random.key(0), 8, X, Y, train=True, progress_bar=False) for s in (svi, SVI(*arguments)))
    assert int(result.state.num_snapshots) == 4
    jax.tree.map(np.testing.assert_array_equal, result.params, plain.params)
    ours, hosts = (NETWORKS[kind][2](r.state.mutable_state) for r in (result, plain))
    for name, statistic in [("1", "mean"), ("1", "var"), ("4", "mean"), ("4", "var")]:
        np.testing.assert_array_equal(ours[name][statistic], hosts[name][statistic])
    statistics = update_batch_norm(model, svi.averaged_guide(result.state).median(), BATCHES, train=True)
    assert np.isfinite(NETWORKS[kind][2](statistics)["4"]["var"]).all()


def test_nnx_module_and_other_state_stay_as_they_are():
    model = model_of(nnx_net)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(MODULE, nnx.BatchStat)))
    trained = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(X, Y, train=True)["net$state"]["value"]
    count = trained["state"]["dropout"]["rngs"]["count"] + 5
    trained["state"]["dropout"]["rngs"]["count"] = count
    trained["state"]["layers"]["1"]["var"] *= jnp.nan
    params = {"net$state": trained}
    old = jax.tree.map(jnp.copy, params)
    statistics = update_batch_norm(model, sites(kind="nnx"), BATCHES, params=params, train=True)
    check(statistics, kind="nnx")
    assert statistics["net$state"]["state"]["dropout"]["rngs"]["count"] == count
    jax.tree.map(np.testing.assert_array_equal, random_to_data(params), random_to_data(old))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(MODULE, nnx.BatchStat)), before)


def random_to_data(tree):
    return jax.tree.map(lambda x: random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


def test_learned_and_held_params():
    def model(x, y=None, train=False):
        net = flax_module("net", Linen(), X[:2], train, mutable=["batch_stats"])
        numpyro.sample("y", dist.Normal(net(x, train), numpyro.param("noise", 1.0)).to_event(1), obs=y)

    params = {"net$params": {str(i): {} for i in (0, 1, 3, 4, 6)}, "noise": 0.5}
    for part, value in zip(PARTS, draw_weights(1), strict=True):
        params["net$params"][part[0]][part[2:]] = jnp.asarray(value)
    check(update_batch_norm(model, {}, BATCHES, params=params, train=True))
    with pytest.raises(ValueError, match=r"param sites \['noise'\] of the model have no values: pass params="):
        update_batch_norm(model, {}, BATCHES, params={"net$params": params["net$params"]}, train=True)
    with pytest.raises(ValueError, match=r"param sites \['net\$params'\] of the model have no values"):
        update_batch_norm(model, {}, BATCHES, params={"noise": 0.5}, train=True)


def outputs(seed):
    weights = draw_weights(seed)
    return forward(weights, X_TEST, averaged(weights, 0))[0]


def shapes_of(model):
    """Params of a network whose weights are all random: shapes alone, as svi_result.params has them."""
    traced = numpyro.handlers.trace(numpyro.handlers.seed(partial(model, train=True), 0))
    return {"net$params": jax.eval_shape(lambda: traced.get_trace(X, Y)["net$params"]["value"])}


@both
def test_each_draw_with_its_own_statistics(kind):
    model = model_of(NETWORKS[kind][0])
    params, evaluated = shapes_of(model), partial(model, train=False)
    seeds = [1, 2]
    draws = {name: jnp.stack([sites(seed, kind)[name] for seed in seeds]) for name in sites(kind=kind)}
    total = 0.0
    for s in range(len(seeds)):
        draw = {name: value[s] for name, value in draws.items()}
        statistics = update_batch_norm(model, draw, BATCHES, params=params, train=True)
        one = {name: value[None] for name, value in draw.items()}
        found = predict(one, jnp.asarray(X_TEST), model=evaluated, params=params | statistics)["mean"]
        CLOSE(found, outputs(seeds[s]), rtol=1e-5, atol=1e-5)
        total = total + found
    CLOSE(total / len(seeds), np.mean([outputs(seed) for seed in seeds], 0), rtol=1e-5, atol=1e-5)
    host = Predictive(evaluated, one, params=params | statistics)(random.key(0), jnp.asarray(X_TEST))
    CLOSE(host["mean"][0], found)


def test_with_svi():
    def guide(x, y=None, train=False):  # as AutoDelta, which takes 20 seconds to start
        for name, value in sites().items():
            numpyro.sample(name, dist.Delta(numpyro.param(f"{name}_loc", value), event_dim=value.ndim))

    svi = SVI(LINEN, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
    state = svi.init(random.key(0), X, Y, train=True)
    params = svi.get_params(state) | state.mutable_state
    statistics = update_batch_norm(LINEN, sites(), BATCHES, params=params, train=True)
    found = predict(
        guide,
        jnp.asarray(X_TEST),
        model=partial(LINEN, train=False),
        params=params | statistics,
        scheme="deterministic",
    )
    CLOSE(found["mean"], outputs(1), rtol=1e-5, atol=1e-5)
    assert jax.tree.map(jnp.shape, statistics) == jax.tree.map(jnp.shape, state.mutable_state)
    mean = predict(guide, X, model=partial(LINEN, train=False), params=params | statistics, scheme="deterministic")
    tree = to_arviz(
        svi,
        svi_result=state._replace(mutable_state=statistics),
        model_args=(X, Y),
        model_kwargs={"train": False},
        num_samples=1,
        log_likelihood=True,
    )
    expected = dist.Normal(mean["mean"].values, 0.5).log_prob(Y)
    CLOSE(tree["log_likelihood"]["y"].values[0, 0], expected, rtol=1e-5, atol=1e-5)
    after, loss = jax.jit(partial(svi.update, train=True))(state._replace(mutable_state=statistics), X, Y)
    assert np.isfinite(loss)
    assert jax.tree.map(jnp.shape, statistics) == jax.tree.map(jnp.shape, after.mutable_state)
    assert jax.tree.leaves(params["net$params"]) == []


def test_predictions_without_statistics():
    draws, params = {name: value[None] for name, value in sites().items()}, shapes_of(LINEN)
    message = r"mutable sites \['net\$state'\] of the model have no values, .*: pass params=update_batch_norm\("
    with pytest.raises(ValueError, match=message):
        predict(draws, jnp.asarray(X_TEST), model=LINEN, params=params)


def test_dropout_is_the_same_in_each_run():
    def model(x, y=None, train=False):
        module = Linen(dropout=0.5)
        net = random_flax_module("net", module, NORMAL, X[:2], train, apply_rng=["dropout"], mutable=["batch_stats"])
        rngs = {"dropout": numpyro.prng_key()} if train else None
        numpyro.sample("y", dist.Normal(net(x, train, rngs=rngs), 0.5).to_event(1), obs=y)

    once, twice = (update_batch_norm(model, sites(), batches, train=True) for batches in (BATCHES[:1], BATCHES[:1] * 2))
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    found = NETWORKS["linen"][2](once)
    (mean, _), (after_dropout, _) = averaged(draw_weights(1), 0, CUTS[:1])
    CLOSE(found["1"]["mean"], mean)
    assert abs(found["4"]["mean"] - after_dropout).max() > 0.01


@pytest.mark.parametrize(
    ("size", "subsample_size"),
    [(None, 2), (None, None), (100, 5), (100, 3), (N, 5)],
    ids=["subsampled", "whole", "states N", "the last one fits", "N of a few"],
)
def test_plates_hold_the_rows_of_a_batch(size, subsample_size):
    model = model_of(linen_net, size)
    check(update_batch_norm(model, sites(), BATCHES, train=True, subsample_size=subsample_size))


def test_other_plates_stay_as_they_are():
    def model(x, y=None, train=False):
        with numpyro.plate("units", 6):
            scale = numpyro.sample("scale", dist.HalfNormal(1))
        LINEN(x * scale.mean(), y, train)

    check(update_batch_norm(model, sites() | {"scale": np.ones(6)}, BATCHES, train=True))


@pytest.mark.parametrize(
    "batches",
    [
        (list(batch) for batch in BATCHES),
        [{"x": np.asarray(x), "y": np.asarray(y)} for x, y in BATCHES],
        [(x, y, True, None) for x, y in BATCHES],
        [(torch.tensor(np.asarray(x)), torch.tensor(np.asarray(y))) for x, y in BATCHES],
    ],
    ids=["generator", "dict", "flags", "torch"],
)
def test_batches_of_several_kinds(batches):
    options = {} if isinstance(batches, list) and len(batches[0]) == 4 else {"train": True}
    check(update_batch_norm(LINEN, sites(), batches, **options))


def without_state(train):
    return random_flax_module("net", Linen(), NORMAL, X[:2], train)


class Norm(linen.Module):
    """Batch normalisation that keeps a sum instead of an average, or a mean alone."""

    kind: str

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(3, name="0")(x)
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(3))
        mean.value = mean.value * 2 + x.mean(0)
        if self.kind == "sum":
            variance = self.variable("batch_stats", "var", lambda: jnp.zeros(3))
            variance.value = variance.value * 2 + x.var(0)
        return (x - x.mean(0))[..., 0]


def other_net(kind):
    return lambda train: random_flax_module("net", Norm(kind), NORMAL, X[:2], train, mutable=["batch_stats"])


def _fails(what):
    model, draw, batches, train = LINEN, sites(), BATCHES, True
    if what == "no network":
        model, draw = (lambda x, y, train: numpyro.sample("y", dist.Normal(x.sum(1), 1).to_event(1), obs=y)), {}
    elif what == "no mutable":
        model = model_of(without_state)
    elif what in ("sum", "mean alone"):
        model, draw = model_of(other_net(what)), {name: value for name, value in sites().items() if "0." in name}
    elif what == "evaluation":
        train = False
    elif what == "missing":
        del draw["net/4.bias"]
    elif what == "no observations":
        batches = [(x,) for x, y in BATCHES]
    elif what == "all draws":
        draw = {name: jnp.stack([value, value]) for name, value in draw.items()}
    elif what == "not finite":
        batches = [*BATCHES, (X * jnp.nan, Y)]
    elif what == "huge draw":
        draw["net/3.kernel"] *= 1e25
    elif what == "not finite at first":
        batches = [(X * jnp.nan, Y)]
    else:
        batches = {"empty": [], "used": iter([]), "array": X, "dict": {"x": X}, "none": None, "no rows": [()]}[what]
    return partial(update_batch_norm, model, draw, batches, train=train)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no network", r"mutable sites \[\] of the model hold no .*mutable=\[\"batch_stats\"\]"),
        ("no mutable", r"cannot keep running statistics: .*mutable=\[\"batch_stats\"\]"),
        ("mean alone", r"mutable sites \['net\$state'\] of the model hold no statistics"),
        ("sum", r"'net\$state/batch_stats' does not average its statistics with one momentum"),
        ("evaluation", r"evaluation mode.* 'net\$state/batch_stats/1'.*train=True"),
        ("missing", r"draw has no values for \['net/4.bias'\]"),
        ("no observations", r"draw has no values for \['y'\].*observations"),
        ("all draws", r"draw\['net/0.bias'\] has shape \(2, 3\).*\(3,\).*value\[0\]"),
        ("not finite", r"statistics of \['net\$state/batch_stats/1', .*/4'\] are not finite.*batches"),
        ("not finite at first", r"statistics of \['net\$state/batch_stats/1', .*are not finite"),
        ("huge draw", r"statistics of \['net\$state/batch_stats/4'\] are not finite"),
        ("empty", "batches is empty .list.: give the training data"),
        ("used", "batches is empty .list_iterator."),
        ("array", "batches must be an iterable of batches"),
        ("dict", "batches must be an iterable.*got dict"),
        ("none", "batches must be an iterable.*got NoneType"),
        ("no rows", r"lengths \[\].*model's arguments"),
    ],
)
def test_errors_say_what_to_do(what, words):
    with pytest.raises(ValueError, match=words):
        _fails(what)()


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
