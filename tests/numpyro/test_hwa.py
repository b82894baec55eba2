"""Averaged laws of guides along NumPyro's SVI; mirrors tests/pyro/test_hwa.py."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal

from bnn_ppl.numpyro import FGE, SWA, SWAG, AnnealedELBO
from bnn_ppl.numpyro import HWASVI as HWA
from tests import averaged, averaged_checks
from tests.averaging_hosts import NumPyro as HOST

LOW_RANK = {"covariance": "low_rank", "rank": 2}
# Compiled as long as the others, for the same code.
SLOW = ("AutoDiagonalNormal", "AutoMultivariateNormal", "AutoVarianceNetwork", "AutoVariationalDropout", "local")
SLOW += ("AutoLowRankMultivariateNormal", "AutoGuideList")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def same(found, expected):
    """Losses, params, and the host's part of the state, bit for bit."""
    leaves, others = (jax.tree.leaves((r.losses, r.params, tuple(r.state[:2]))) for r in (found, expected))
    assert len(leaves) == len(others)
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, other)
    np.testing.assert_array_equal(*(random.key_data(r.state.rng_key) for r in (found, expected)))


def runs(name, cls=HWA, settings=LOW_RANK, **kwargs):
    args = averaged.data(HOST)
    for each, more in ((cls, {"start": 3, "cycle_length": 4} | settings), (SVI, {})):
        svi = each(*averaged.PAIRS[name](HOST), HOST.adam(0.05), Trace_ELBO(), **more)
        yield svi.run(random.key(0), 12, *args, **{"progress_bar": False} | kwargs)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in averaged.PAIRS])
def test_the_path_is_the_hosts(name):
    found, expected = runs(name)
    same(found, expected)
    assert int(found.state.num_snapshots) == 3


@pytest.mark.parametrize(
    ("cls", "settings", "kwargs"),
    [
        (HWA, LOW_RANK, {"progress_bar": True}),
        pytest.param(HWA, {}, {"stable_update": True}, marks=pytest.mark.slow),
        (HWA, {}, {"stable_update": True, "progress_bar": True}),
        pytest.param(HWA, {"start": 0}, {"size": 4}, marks=pytest.mark.slow),
        (FGE, {}, {}),
        pytest.param(FGE, {}, {"progress_bar": True}, marks=pytest.mark.slow),
        (SWA, {}, {}),
    ],
)
def test_the_path_of_each_loop(cls, settings, kwargs):
    same(*runs("AutoDelta", cls, settings, **kwargs))


@pytest.mark.parametrize(
    ("name", "cls", "settings"),
    [
        ("AutoNormal", HWA, {}),
        pytest.param("AutoLowRankMultivariateNormal", HWA, LOW_RANK, marks=pytest.mark.slow),
        ("AutoDelta", SWAG, {"rank": 2}),
        ("AutoDelta", FGE, {}),
    ],
)
def test_the_path_of_updates(name, cls, settings):
    averaged_checks.path_of(HOST, name, cls, settings)


@pytest.mark.parametrize("name", ["AutoNormal"])
def test_the_path_with_annealing(name):
    def changing(step):
        return {"kl_weight": jnp.minimum(1.0, 0.2 * (step + 1))}

    averaged_checks.path_of(HOST, name, HWA, {}, loss=AnnealedELBO(), changing=changing, kwargs={"size": 4})


def test_in_single_precision():
    with jax.enable_x64(False):
        same(*runs("AutoDelta"))


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


@pytest.mark.parametrize(
    ("kind", "covariance"),
    [*averaged_checks.DRAWS[:3], pytest.param(*averaged_checks.DRAWS[3], marks=pytest.mark.slow)],
)
def test_draws_and_elbo(kind, covariance):
    run, mean = averaged_checks.draws_and_losses(HOST, kind, covariance, 20_000, 20_000)
    averaged_checks.at_the_mean(HOST, run, mean)


def test_params_of_the_last_step_do_not_count():
    """Predictive puts them into guides, and here there are none."""
    run = averaged_checks.train(HOST, "AutoNormal", 8, start=2, cycle_length=2)
    before = jax.tree.map(np.array, run.svi.get_params(run.state))
    guide = run.get("averaged_guide")
    plain, given = (HOST.draws(run.model, guide, 10, run.args[:1], ("w", "s", "y"), p) for p in ({}, before))
    for name, value in plain.items():
        np.testing.assert_array_equal(value, given[name])
    for name, value in run.svi.get_params(run.state).items():
        np.testing.assert_array_equal(value, before[name])
    spread = jax.tree.map(lambda value: 1e-6 + 0 * value, before)  # and the guide itself takes its own
    draws = Predictive(run.svi.guide, params=before | {"w_auto_scale": spread["w_auto_scale"]}, num_samples=3)
    np.testing.assert_allclose(draws(random.key(0), *run.args)["w"], [before["w_auto_loc"]] * 3, atol=1e-4)


def save(state):
    """A state of arrays, written and read."""
    state = state._replace(rng_key=np.asarray(random.key_data(state.rng_key)))
    found = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
    return jax.tree.map(jnp.asarray, found)._replace(rng_key=random.wrap_key_data(jnp.asarray(found.rng_key)))


def equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (a, b))
        np.testing.assert_array_equal(a, b)


def new(kind=AutoNormal, cls=HWA, **settings):
    model = averaged.small(HOST)
    return cls(model, kind(model), HOST.adam(0.05), Trace_ELBO(), **{"start": 3, "cycle_length": 4} | settings)


@pytest.mark.parametrize("cls", [HWA, FGE])
def test_resume_by_updates(cls):
    """Written in the middle of a window and read by another object."""
    args = averaged.data(HOST)
    kind, settings = (AutoNormal, LOW_RANK) if cls is HWA else (AutoDelta, {})
    svi = new(kind, cls, **settings)
    state = svi.init(random.key(0), *args)
    update = jax.jit(svi.update)
    states = [state := update(state, *args)[0] for _ in range(13)]
    other = new(kind, cls, **settings)
    other.init(random.key(5), *args)
    state, update = save(states[4]), jax.jit(other.update)
    for _ in range(8):
        state, _ = update(state, *args)
    equal(state, states[-1])
    np.testing.assert_array_equal(other.snapshot_steps(state), [3, 7, 11])


@pytest.mark.parametrize("bar", [False, True])
def test_resume_of_runs(bar):
    args, options = averaged.data(HOST), {"progress_bar": bar}
    whole = new(AutoDiagonalNormal, **LOW_RANK).run(random.key(0), 13, *args, **options)
    svi = new(AutoDiagonalNormal, **LOW_RANK)
    first = svi.run(random.key(0), 5, *args, **options)
    other = new(AutoDiagonalNormal, **LOW_RANK)
    other.init(random.key(5), *args)
    rest = other.run(random.key(9), 8, *args, init_state=save(first.state), **options)
    equal(rest.state, whole.state)
    np.testing.assert_array_equal(np.concatenate([first.losses, rest.losses]), whole.losses)
    np.testing.assert_array_equal(other.snapshot_steps(rest.state), [3, 7, 11])


def test_after_a_run_of_the_hosts_own():
    """Snapshots begin then, at steps counted from its start."""
    args = averaged.data(HOST)
    model = averaged.small(HOST)
    plain = SVI(model, AutoDelta(model), HOST.adam(0.05), Trace_ELBO())
    first = plain.run(random.key(0), 5, *args, progress_bar=False)
    whole = plain.run(random.key(0), 8, *args, init_state=first.state, progress_bar=False)
    svi = new(AutoDelta)
    found = svi.run(random.key(9), 8, *args, init_state=first.state, progress_bar=False)
    same(found, whole)
    np.testing.assert_array_equal(svi.snapshot_steps(found.state), [7, 11])


def test_where_snapshots_fall():
    args = averaged.data(HOST)
    for start, cycle_length, steps in ((0, 4, 12), (1, 1, 5), (5, 2, 9), (2, 10, 13)):
        svi = new(AutoDelta, FGE, start=start, cycle_length=cycle_length)
        state = svi.init(random.key(0), *args)
        run = jax.jit(svi.update)
        for _ in range(steps):
            state, _ = run(state, *args)
        expected = averaged.steps_of(start or cycle_length, cycle_length, steps)
        np.testing.assert_array_equal(svi.snapshot_steps(state), expected)


def test_start_beyond_the_run():
    svi = new(AutoDelta, start=5, cycle_length=2)
    with pytest.warns(UserWarning, match="start=5: the 3 steps of this run end before a snapshot falls, so that it"):
        svi.run(random.key(0), 3, *averaged.data(HOST), progress_bar=False)
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


@pytest.mark.parametrize("cls", [HWA, FGE])
def test_what_is_no_state(cls):
    args = averaged.data(HOST)
    svi = new(AutoDelta, cls, start=1, cycle_length=1)
    result = svi.run(random.key(0), 2, *args, progress_bar=False)
    own = ["averaged_guide", "averaged_params", "averaged_moments"] if cls is HWA else ["snapshots", "snapshot_params"]
    for name in (*own, "averaging_weights", "snapshot_steps", "update", "stable_update"):
        for given in (result, result.params, None):
            message = f"svi_state must be a state of this SVI, got {type(given).__name__}: give result.state of"
            with pytest.raises(TypeError, match=message):
                getattr(svi, name)(given, *(args if "update" in name else ()))
    with pytest.raises(
        TypeError, match=r"init_state must be a state of this SVI, got SVIRunResult: give result\.state"
    ):
        svi.run(random.key(0), 2, *args, init_state=result)


def test_init_is_not_compiled():
    svi = new()
    with pytest.raises(ValueError, match=r"init looks at the sites of the guide and cannot be compiled: .* jax\.jit"):
        jax.jit(svi.init)(random.key(0), *averaged.data(HOST))
