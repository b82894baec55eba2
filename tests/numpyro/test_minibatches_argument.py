"""Batches of an iterable through NumPyro's MCMC: what the chain does with them, its streams, and what is refused."""

import gc
import itertools
import os
import pickle
import subprocess
import sys
import weakref

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

import bnn_ppl
from bnn_ppl.numpyro import SGHMC, SGLD
from bnn_ppl.numpyro.loading import Loader
from tests import cases, loaders
from tests.loaders import COLD, NOISE, ORDER, START, N, X, Y

KEY = random.key(3)
PATH = loaders.path("baoab", ORDER)


@pytest.fixture(autouse=True, scope="module")
def float64():
    """For all threads, since batches are loaded in another one."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def model(x, y, noise=NOISE, shift=0.0):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("data", N, subsample_size=len(x)):
        numpyro.sample("y", dist.Normal(x @ w + shift, noise), obs=y)


def by_index(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("data", N, subsample_size=len(x)) as idx:
        numpyro.sample("y", dist.Normal(x[idx] @ w, NOISE), obs=y[idx])


def in_one_array(data):
    model(data[:, :2], data[:, 2])


class Generated:
    """Batches whose iterators no other process can go on with."""

    def __init__(self):
        self.live = weakref.WeakSet()

    def __reduce__(self):
        return Generated, ()

    def __iter__(self):
        epoch = (batch for batch in loaders.batches())
        self.live.add(epoch)
        return epoch


def make(scheme="baoab", model=model, minibatches=None, **options):
    options = COLD[scheme] | {
        "temperature": 0.0,
                "init_strategy": {"w": START},
        "minibatches": loaders.batches() if minibatches is None else minibatches,
    } | options  # fmt: skip
    return SGLD(model, **options) if scheme == "sgld" else SGHMC(model, integrator=scheme, **options)


def run(kernel, *args, key=KEY, num_warmup=1, num_samples=8, mcmc_options=None, **kwargs):
    options = {"num_warmup": num_warmup, "num_samples": num_samples, "progress_bar": False} | (mcmc_options or {})
    mcmc = MCMC(kernel, **options)
    mcmc.run(key, *args, **kwargs)
    return mcmc


def draws(mcmc):
    """Shape (chains, draws, 2)."""
    return np.asarray(mcmc.get_samples(group_by_chain=True)["w"])


def chains(count, method):
    return {"num_chains": count, "chain_method": method}


def resume(mcmc):
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key)
    return mcmc


# What the chain does


@pytest.mark.parametrize("scheme", COLD)
def test_cold_steps_are_exact(scheme):
    mcmc = run(make(scheme, steps_per_draw=4), num_samples=4)
    path = loaders.path(scheme, ORDER)
    expected = path[7:20:4]
    np.testing.assert_allclose(draws(mcmc)[0], expected, rtol=1e-10)
    after = ORDER[8:21:4]  # the statistics belong to the draw and to the minibatch after it
    lp = mcmc.get_extra_fields()["lp_minibatch"]
    np.testing.assert_allclose(lp, loaders.log_joint(expected, after), rtol=1e-10)


@pytest.mark.parametrize("form", ["index", "array", "uneven"])
def test_batches_of_any_form_are_the_same(form):
    batches = {
        "index": loaders.batches(jnp.asarray),
        "array": [np.column_stack(batch) for batch in loaders.batches()],
        "uneven": [[X[a:b], Y[a:b]] for a, b in ((0, 4), (4, 5), (5, 10))],
    }[form]
    kernel = make(model={"index": by_index, "array": in_one_array}.get(form, model), minibatches=batches)
    np.testing.assert_allclose(draws(run(kernel))[0], PATH[1:9], rtol=1e-10)


def test_augmented_rows_each_count_once():
    def regressions(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([loaders.COORDINATES]).to_event(1))
        with numpyro.plate("data", loaders.AUGMENTED_ROWS, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(x * w, 1.0).to_event(1), obs=y)

    batches = loaders.Augmented(1, "float64")
    kernel = SGLD(regressions, minibatches=batches, **loaders.AUGMENTED)
    mcmc = run(kernel, num_warmup=loaders.AUGMENTED_WARMUP, num_samples=loaders.AUGMENTED_DRAWS)
    cases.assert_scores(batches.scores(draws(mcmc)[0]))


@pytest.mark.parametrize("named", [False, True])
def test_arguments_of_run_come_after_the_batch(named):
    batches = [{"y": y, "x": x} for x, y in loaders.batches()] if named else None
    args, kwargs = ((), {"noise": 0.9}) if named else ((0.9,), {})
    mcmc = run(make(minibatches=batches), *args, shift=0.3, mcmc_options={"jit_model_args": named}, **kwargs)
    expected = loaders.path("baoab", ORDER[:9], noise=0.9, shift=0.3)
    np.testing.assert_allclose(draws(mcmc)[0], expected[1:], rtol=1e-10)


# Streams


@pytest.mark.parametrize(("count", "method"), [(2, "sequential"), (3, "vectorized")])
def test_every_chain_has_its_own_stream(count, method):
    batches = loaders.Counting(loaders.batches())
    mcmc = run(make(minibatches=batches), num_samples=7, mcmc_options=chains(count, method))
    assert draws(mcmc).shape[0] == count
    for chain in draws(mcmc):
        np.testing.assert_allclose(chain, PATH[1:8], rtol=1e-10)
    assert batches.epochs == count * loaders.epochs(8)


def test_every_run_begins_a_new_epoch():
    batches = loaders.Counting(loaders.batches())
    mcmc = run(make(minibatches=batches))
    mcmc.run(KEY)
    np.testing.assert_allclose(draws(mcmc)[0], PATH[1:9], rtol=1e-10)
    assert batches.epochs == 2 * loaders.epochs(9)


def test_a_chain_of_the_same_key_begins_anew():
    kernel = make()
    for _ in range(2):
        state = kernel.init(KEY, 0, None, (), None)
        np.testing.assert_allclose(kernel.sample(state, (), None).z["w"], PATH[0], rtol=1e-10)


@pytest.fixture(scope="module")
def two_chains():
    return run(make(temperature=1.0), mcmc_options=chains(2, "vectorized"))


def test_chain_methods_give_the_same_draws(two_chains):
    one_by_one = run(make(temperature=1.0), mcmc_options=chains(2, "sequential"))
    np.testing.assert_allclose(draws(two_chains), draws(one_by_one), rtol=1e-10)
    assert len(np.unique(draws(two_chains))) == 2 * 8 * 2


DEVICES = """
import sys, time
import jax, numpy as np
sys.path.insert(0, {root!r})
from tests import loaders
from tests.numpyro.test_minibatches_argument import chains, draws, make, resume, run

class Slow(loaders.Counting):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.01)
            yield batch

assert jax.device_count() == 2
batches = Slow(loaders.batches())
parallel = run(make(temperature=1.0, minibatches=batches), mcmc_options=chains(2, "parallel"))
expected = run(make(temperature=1.0), mcmc_options=chains(2, "vectorized"))
np.testing.assert_allclose(draws(parallel), draws(expected), rtol=1e-10)
np.testing.assert_allclose(draws(resume(parallel)), draws(resume(expected)), rtol=1e-10)
assert batches.epochs == 2 * loaders.epochs(17)
"""


@pytest.mark.slow
def test_chains_in_parallel():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
    }
    script = DEVICES.format(root=os.getcwd())
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_goes_on():
    def warm(**options):
        return run(make(temperature=1.0), mcmc_options=chains(2, "sequential"), **options)

    first = warm(num_samples=4)
    pieces = [draws(first), draws(resume(first))]
    np.testing.assert_array_equal(np.concatenate(pieces, 1), draws(warm(num_samples=8)))


def test_a_new_kernel_begins_a_new_epoch():
    first = run(make(), num_samples=2, mcmc_options=chains(2, "vectorized"))
    later = MCMC(make(), num_warmup=0, num_samples=4, progress_bar=False, **chains(2, "vectorized"))
    later.post_warmup_state = first.last_state
    later.run(first.last_state.rng_key)
    expected = loaders.path("baoab", np.concatenate([ORDER[:4], ORDER[:3]]))[3:]
    for chain in draws(later):
        np.testing.assert_allclose(chain, expected, rtol=1e-10)


def test_kernels_pickle_after_a_run():
    batches = Generated()
    kernel = make(minibatches=batches)
    run(kernel)
    run(kernel, key=random.key(4))
    gc.collect()
    assert len(batches.live) == 1  # and keep no iterators, which may have workers, of earlier runs
    np.testing.assert_allclose(draws(run(pickle.loads(pickle.dumps(kernel))))[0], PATH[1:9], rtol=1e-10)


def test_an_endless_iterator_serves_one_chain_after_another():
    kernel = make(minibatches=itertools.cycle(loaders.batches()[:2]))
    both = draws(run(kernel, mcmc_options=chains(2, "sequential")))
    for first, chain in enumerate(both):  # 10 gradients, then the 11th is a second one
        rows = ORDER[(np.arange(9) + 10 * first) % 2]
        np.testing.assert_allclose(chain, loaders.path("baoab", rows)[1:], rtol=1e-10)


class Rotated:
    """Every epoch begins with the last batch of the one before."""

    def __init__(self, batches):
        self.next = batches

    def __iter__(self):
        now = self.next
        self.next = [*now[-1:], *now[:-1]]
        return iter(now)


def test_first_batches_of_chains_may_differ_in_length():
    both = draws(run(make(minibatches=Rotated(loaders.batches())), num_samples=1, mcmc_options=chains(2, "vectorized")))
    for chain, rows in zip(both, (ORDER[:2], (ORDER[:2] + 8) % N), strict=True):
        np.testing.assert_allclose(chain[0], loaders.path("baoab", rows)[1], rtol=1e-10)


def test_one_iterator_for_chains_at_once_is_refused():
    kernel = make(minibatches=itertools.cycle(loaders.batches()))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"one and the same iterator to several chains.*pass a list"):
        run(kernel, mcmc_options=chains(2, "vectorized"))


# What is refused, and what happens on the way


@pytest.mark.parametrize(
    ("plate", "match"),
    [
        (lambda x: numpyro.plate("data", N), "the model fails on the first batch of minibatches"),
        (lambda x: numpyro.plate("data", N, subsample_size=3), "the model fails on the first batch of minibatches"),
        (lambda x: numpyro.plate("data", len(x)), "plate 'data' has only the 4 rows .* would count 3 times"),
        (lambda x: numpyro.plate("data", 100, subsample_size=len(x)), "plate 'data' has 100 rows, but minibatches has"),
    ],
    ids=["no subsample_size", "another subsample_size", "no N", "another N"],
)
def test_plates_must_state_all_rows(plate, match):
    def with_plate(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with plate(x):
            numpyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    with pytest.raises(ValueError, match=match):
        run(make(model=with_plate))


def test_dropout_is_refused():
    def dropping(x, y):
        keep = random.bernoulli(numpyro.prng_key(), 0.5, x.shape)
        model(x * keep, y)

    with pytest.raises(ValueError, match=r"random keys of its own .* dropout"):
        run(make(model=dropping))


def with_nan(batch):
    batches = loaders.batches(np.array)
    batches[batch][1][1] = np.nan
    return batches


@pytest.mark.filterwarnings("ignore:an argument of the model")
def test_nan_in_the_first_batch():
    where = r"observed site 'y' \(1 of 4 values, first at row 1 of plate 'data'\) of the first batch"
    for count, batches in ((1, with_nan(0)), (2, Rotated(with_nan(2)))):  # in the second chain's first batch
        with pytest.raises(ValueError, match=where):
            run(make(minibatches=batches), mcmc_options=chains(count, "vectorized"))


def test_nan_in_a_later_batch_makes_a_draw_diverge():
    mcmc = run(make("sgld", minibatches=with_nan(1)), num_warmup=0, num_samples=8)
    has_nan = (ORDER == 5).any(1)  # row 5 is in batch 1
    np.testing.assert_array_equal(mcmc.get_extra_fields()["diverging"], has_nan[1:9])
    assert np.isfinite(draws(mcmc)).all()
    still = np.diff(np.concatenate([START[None], draws(mcmc)[0]]), axis=0) == 0
    np.testing.assert_array_equal(still.all(1), has_nan[1:9])
    with pytest.warns(UserWarning, match="diverg"):
        bnn_ppl.to_arviz(mcmc)


def test_the_message_of_a_loader_reaches_the_user():
    def failing():
        yield from loaders.batches()
        raise OSError("the disk is on fire")

    with pytest.raises(jax.errors.JaxRuntimeError, match="the disk is on fire"):
        run(make(minibatches=failing()))
    with pytest.raises(jax.errors.JaxRuntimeError, match="ended, and it cannot be started again: pass a DataLoader"):
        run(make(minibatches=iter(loaders.batches())))


@pytest.fixture
def float32():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def test_data_of_64_bits_become_32_without_a_warning(float32):
    mcmc = run(make())
    assert draws(mcmc).dtype == np.float32
    np.testing.assert_allclose(draws(mcmc)[0], PATH[1:9], rtol=1e-5)


def test_64_bits_that_do_not_reach_the_loading_thread(float32):
    loader = Loader(loaders.batches())
    with jax.enable_x64(True):
        inputs = jnp.zeros(2, jnp.uint32), jnp.int32(0), jnp.zeros(())
        program = jax.jit(loader.batch).lower(*inputs).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"float64 need 64 bits .* call numpyro.enable_x64\(\)"):
        program(*inputs)


# Into ArviZ


def test_to_arviz(two_chains):
    tree = bnn_ppl.to_arviz(two_chains)
    assert tree["posterior"]["w"].shape == (2, 8, 2)
    assert tree["sample_stats"]["lp_minibatch"].shape == (2, 8)
    for option in ("log_likelihood", "posterior_predictive"):
        with pytest.raises(ValueError, match=r"of minibatches=, or a guide.*has no full data"):
            bnn_ppl.to_arviz(two_chains, **{option: True})


def test_plain_arviz(two_chains):
    tree = az.from_numpyro(two_chains)
    assert tree["posterior"]["w"].shape == (2, 8, 2)
    assert set(two_chains.get_extra_fields()) == set(tree["sample_stats"].data_vars)
