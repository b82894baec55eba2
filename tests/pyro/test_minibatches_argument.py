"""Batches of an iterable through Pyro's MCMC: what the chain does with them, its streams, and what is refused."""

import itertools
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

import bnn_ppl
from bnn_ppl.pyro import SGHMC, SGLD
from tests import cases, loaders
from tests.loaders import COLD, NOISE, ORDER, START, N, X, Y

PATH = loaders.path("baoab", ORDER)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(x, y, noise=NOISE, shift=0.0):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w + shift, noise), obs=y)


def by_index(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)) as idx:
        pyro.sample("y", dist.Normal(x[idx] @ w, NOISE), obs=y[idx])


def with_subsample(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", N, subsample=x) as batch:
        pyro.sample("y", dist.Normal(batch @ w, NOISE), obs=y)


def in_one_array(data):
    model(data[:, :2], data[:, 2])


def tensors(as_array=torch.tensor):
    return loaders.batches(as_array)


class Generated:
    """Batches whose iterators no other process can go on with."""

    def __iter__(self):
        yield from tensors()


def make(scheme="baoab", model=model, minibatches=None, **options):
    options = COLD[scheme] | {
        "temperature": 0.0,
        "init_strategy": {"w": START},
        "minibatches": tensors() if minibatches is None else minibatches,
    } | options  # fmt: skip
    return SGLD(model, **options) if scheme == "sgld" else SGHMC(model, integrator=scheme, **options)


def run(kernel, *args, num_samples=8, warmup_steps=1, num_chains=1, **kwargs):
    pyro.set_rng_seed(0)
    mcmc = MCMC(kernel, num_samples, warmup_steps=warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


def draws(mcmc):
    """Shape (chains, draws, 2)."""
    return mcmc.get_samples(group_by_chain=True)["w"].numpy()


def resumed(state, kernel, num_samples):
    kernel.load_state_dict(state)
    return run(kernel, num_samples=num_samples, warmup_steps=0, num_chains=len(state["chains"]))


# What the chain does


@pytest.mark.parametrize("scheme", COLD)
def test_cold_steps_are_exact(scheme):
    mcmc = run(make(scheme, steps_per_draw=4), num_samples=4)
    path = loaders.path(scheme, ORDER)
    expected = path[7:20:4]
    np.testing.assert_allclose(draws(mcmc)[0], expected, rtol=1e-10)
    after = ORDER[8:21:4]  # the statistics belong to the draw and to the minibatch after it
    lp = mcmc._diagnostics[0]["lp_minibatch"]
    np.testing.assert_allclose(lp, loaders.log_joint(expected, after), rtol=1e-10)


@pytest.mark.parametrize("form", ["index", "subsample", "array", "uneven"])
def test_batches_of_any_form_are_the_same(form):
    batches = {
        "array": [np.column_stack(batch) for batch in loaders.batches()],
        "uneven": [[X[a:b], Y[a:b]] for a, b in ((0, 4), (4, 5), (5, 10))],
    }.get(form)
    models = {"index": by_index, "subsample": with_subsample, "array": in_one_array}
    kernel = make(model=models.get(form, model), minibatches=batches)
    np.testing.assert_allclose(draws(run(kernel))[0], PATH[1:9], rtol=1e-10)


def test_augmented_rows_each_count_once():
    def regressions(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([loaders.COORDINATES]).to_event(1))
        with pyro.plate("data", loaders.AUGMENTED_ROWS, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x * w, 1.0).to_event(1), obs=y)

    batches = loaders.Augmented(1, "float64")
    kernel = SGLD(regressions, minibatches=batches, **loaders.AUGMENTED)
    mcmc = run(kernel, warmup_steps=loaders.AUGMENTED_WARMUP, num_samples=loaders.AUGMENTED_DRAWS)
    cases.assert_scores(batches.scores(draws(mcmc)[0]))


@pytest.mark.parametrize("named", [False, True])
def test_arguments_of_run_come_after_the_batch(named):
    batches = [{"y": y, "x": x} for x, y in tensors()] if named else None
    args, kwargs = ((), {"noise": 0.9}) if named else ((0.9,), {})
    mcmc = run(make(minibatches=batches), *args, shift=torch.tensor(0.3), **kwargs)
    expected = loaders.path("baoab", ORDER[:9], noise=0.9, shift=0.3)
    np.testing.assert_allclose(draws(mcmc)[0], expected[1:], rtol=1e-10)


def in_columns(value):
    """Stored column by column, as a transposed tensor is."""
    tensor = torch.tensor(value)
    return tensor.T.contiguous().T if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("compiler", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:jit_compile=True found no C")
def test_a_compiled_step_takes_every_batch(compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr("shutil.which", lambda name: None)
    batches = loaders.batches(in_columns)
    mcmc = run(make(jit_compile=True, minibatches=batches), 0.9, num_chains=2, shift=torch.tensor(0.3))
    expected = loaders.path("baoab", ORDER[:9], noise=0.9, shift=0.3)
    for chain in draws(mcmc):
        np.testing.assert_allclose(chain, expected[1:], rtol=1e-10)
    warm, eager = (draws(run(make(temperature=1.0, jit_compile=jit))) for jit in (True, False))
    np.testing.assert_allclose(warm, eager, rtol=1e-9)


# Streams


@pytest.mark.parametrize("count", [1, 3])
def test_every_chain_has_its_own_stream(count):
    batches = loaders.Counting(tensors())
    mcmc = run(make(minibatches=batches), num_samples=7, num_chains=count)
    assert draws(mcmc).shape[0] == count
    for chain in draws(mcmc):
        np.testing.assert_allclose(chain, PATH[1:8], rtol=1e-10)
    assert batches.epochs == count * loaders.epochs(8)


def test_every_run_begins_a_new_epoch():
    batches = loaders.Counting(tensors())
    kernel = make(minibatches=batches)
    run(kernel)
    np.testing.assert_allclose(draws(run(kernel))[0], PATH[1:9], rtol=1e-10)
    assert batches.epochs == 2 * loaders.epochs(9)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_chains_in_parallel(method, monkeypatch):
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 8)
    kernel = make(minibatches=Generated())
    run(kernel)  # so that it has a place in its batches
    mcmc = MCMC(kernel, 8, warmup_steps=1, num_chains=2, mp_context=method, disable_progbar=True)
    mcmc.run()
    assert type(mcmc.sampler).__name__ == "_MultiSampler"
    for chain in draws(mcmc):
        np.testing.assert_allclose(chain, PATH[1:9], rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2])
def test_a_resumed_run_begins_a_new_epoch(count):
    first = run(make(), num_samples=2, num_chains=count)  # 4 gradients
    later = resumed(first.kernel.state_dict(first), make(), 4)
    expected = loaders.path("baoab", np.concatenate([ORDER[:4], ORDER[:3]]))[3:]
    for chain in draws(later):
        np.testing.assert_allclose(chain, expected, rtol=1e-10)


def test_a_run_resumed_at_the_end_of_an_epoch_goes_on():
    whole = run(make(temperature=1.0), num_samples=8)
    first = run(make(temperature=1.0), num_samples=3)  # 5 gradients, 2 epochs
    later = resumed(first.kernel.state_dict(), make(temperature=1.0), 5)
    np.testing.assert_array_equal(np.concatenate([draws(first), draws(later)], 1), draws(whole))


def test_kernels_pickle_after_a_run():
    kernel = make(minibatches=Generated())
    run(kernel)
    np.testing.assert_allclose(draws(run(pickle.loads(pickle.dumps(kernel))))[0], PATH[1:9], rtol=1e-10)


def test_an_endless_iterator_serves_one_chain_after_another():
    kernel = make(minibatches=itertools.cycle(tensors()[:2]))
    both = draws(run(kernel, num_chains=2))
    for first, chain in enumerate(both):  # 10 gradients, then the 11th is a second one
        rows = ORDER[(np.arange(9) + 10 * first) % 2]
        np.testing.assert_allclose(chain, loaders.path("baoab", rows)[1:], rtol=1e-10)


# What is refused, and what happens on the way


@pytest.mark.parametrize(
    ("plate", "match"),
    [
        (lambda x: pyro.plate("data", N), "the model fails on the first batch of minibatches"),
        (lambda x: pyro.plate("data", N, subsample_size=3), "the model fails on the first batch of minibatches"),
        (lambda x: pyro.plate("data", len(x)), "plate 'data' has only the 4 rows .* would count 3 times"),
        (lambda x: pyro.plate("data", 100, subsample=x), "plate 'data' has 100 rows, but minibatches has"),
    ],
    ids=["no subsample_size", "another subsample_size", "no N", "another N"],
)
def test_plates_must_state_all_rows(plate, match):
    def with_plate(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with plate(x):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    with pytest.raises(ValueError, match=match):
        run(make(model=with_plate))


def test_dropout_is_refused():
    def dropping(x, y):
        model(torch.nn.functional.dropout(x, 0.5), y)

    with pytest.raises(ValueError, match=r"site 'y' differs between two calls .* dropout"):
        run(make(model=dropping))


def with_nan(batch):
    batches = tensors()
    batches[batch][1][1] = torch.nan
    return batches


@pytest.mark.filterwarnings("ignore:an argument of the model")
def test_nan_in_the_first_batch():
    where = r"observed site 'y' \(1 of 4 values, first at row 1 of plate 'data'\) of the first batch"
    for count in (1, 2):
        with pytest.raises(ValueError, match=where):
            run(make(minibatches=with_nan(0)), num_chains=count)


def test_nan_in_a_later_batch_makes_a_draw_diverge():
    with pytest.warns(UserWarning, match="the chain was not finite at gradient step 1"):
        mcmc = run(make("sgld", minibatches=with_nan(1)), warmup_steps=0)
    has_nan = (ORDER == 5).any(1)  # row 5 is in batch 1
    np.testing.assert_array_equal(mcmc._diagnostics[0]["diverging"], has_nan[1:9])
    assert np.isfinite(draws(mcmc)).all()
    still = np.diff(np.concatenate([START[None], draws(mcmc)[0]]), axis=0) == 0
    np.testing.assert_array_equal(still.all(1), has_nan[1:9])


def test_the_message_of_a_loader_reaches_the_user():
    def failing():
        yield from tensors()
        raise OSError("the disk is on fire")

    with pytest.raises(OSError, match="the disk is on fire"):
        run(make(minibatches=failing()))
    with pytest.raises(ValueError, match="ended, and it cannot be started again: pass a DataLoader"):
        run(make(minibatches=iter(tensors())))


def read_only(value):
    array = np.array(value)
    array.flags.writeable = False
    return array


def test_read_only_arrays_are_copied():
    batches = loaders.batches(read_only)
    np.testing.assert_allclose(draws(run(make(minibatches=batches)))[0], PATH[1:9], rtol=1e-10)


# Into ArviZ


def test_to_arviz():
    mcmc = run(make(temperature=1.0), num_chains=2)
    tree = bnn_ppl.to_arviz(mcmc)
    assert tree["posterior"]["w"].shape == (2, 8, 2)
    assert tree["sample_stats"]["lp_minibatch"].shape == (2, 8)
    for option in ("log_likelihood", "posterior_predictive"):
        with pytest.raises(ValueError, match=r"of minibatches=, or a guide.*has no full data"):
            bnn_ppl.to_arviz(mcmc, **{option: True})
