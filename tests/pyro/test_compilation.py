"""Pyro's MCMC with jit_compile=True: the draws of eager chains, with and without a compiler; models it cannot trace."""

import shutil
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn_ppl.pyro import SGLD
from tests.pyro.host import B, X, Y, assert_same, draws, make, quadratic, run


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def many_processors(monkeypatch):
    """Pyro gives chains processes of their own where there are more processors than chains."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 8)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)


def two_plates(x, y, table):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=B) as idx:
        pyro.sample("y", dist.Normal(x[idx] @ w, scale), obs=y[idx])
    rows, columns = pyro.plate("rows", len(table), subsample_size=3, dim=-2), pyro.plate("columns", 2, dim=-1)
    with rows as i, columns:
        pyro.sample("table", dist.Normal(w, scale), obs=table[i])


def tables():
    return X, Y, torch.tensor(np.random.default_rng(1).normal(size=(6, 2)))


@pytest.mark.slow
def test_compiled_draws_equal_eager_ones():
    kernel = make(two_plates, jit_compile=True)
    eager = draws(run(make(two_plates), *tables()))
    compiled = run(kernel, *tables(), num_chains=2)  # the second chain and the next run use the same graph
    assert_same({n: v[:1] for n, v in draws(compiled).items()}, eager, rtol=1e-9, atol=1e-12)
    graph = kernel._dynamics._graph
    x, y, table = tables()
    assert_same(
        draws(run(kernel, x, y + 1.0, table)), draws(run(make(two_plates), x, y + 1.0, table)), rtol=1e-9, atol=1e-12
    )
    assert kernel._dynamics._graph is graph


@pytest.mark.parametrize("temperature", [0.3, lambda t: 1.0 / (1.0 + t)])
def test_without_a_compiler_the_traced_graph_runs(no_compiler, temperature):
    eager = draws(run(make(two_plates, temperature=temperature), *tables()))
    with pytest.warns(UserWarning, match="found no C\\+\\+ compiler .* runs the traced graph uncompiled"):
        traced = run(make(two_plates, jit_compile=True, temperature=temperature), *tables())
    assert_same(draws(traced), eager, rtol=1e-9, atol=1e-12)


def test_a_traced_potential_fn_and_network(no_compiler):
    start = {"a": torch.zeros(2), "b": torch.tensor(1.0)}
    with pytest.warns(UserWarning, match="compiler"):
        traced = run(SGLD(None, quadratic, step_size=0.1, jit_compile=True), initial_params=start)
    assert_same(draws(traced), draws(run(SGLD(None, quadratic, step_size=0.1), initial_params=start)), rtol=1e-9)


def test_a_graph_is_made_anew_for_other_constants(no_compiler):
    def with_constants(x, y, z, scale=1.0):
        offset = pyro.param("offset", torch.tensor(0.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=B) as idx:
            pyro.sample("y", dist.Normal(x[idx] @ w + offset, scale), obs=None if y is None else y[idx])

    traced, eager = (SGLD(with_constants, step_size=1e-3, jit_compile=jit) for jit in (True, False))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "param sites")
        warnings.filterwarnings("ignore", "jit_compile=True found no C")
        for offset in (0.0, 5.0):
            for args in ((X, Y, None), (X, Y, "text"), (X, Y, None, 0.5), (X.double(), Y + 1.0, None, 0.5)):
                pyro.clear_param_store()
                pyro.get_param_store()["offset"] = torch.tensor(offset)
                assert_same(draws(run(traced, *args)), draws(run(eager, *args)), rtol=1e-9, atol=1e-12)
    pyro.clear_param_store()


@pytest.mark.slow
def test_a_forked_chain_warns_and_runs_the_traced_graph(many_processors):
    with pytest.raises(UserWarning, match=r'in a forked chain .* mp_context="spawn"'):  # an error by our settings
        run(make(jit_compile=True), num_chains=2)


@pytest.mark.parametrize("branch", ["if", "item"])
def test_a_model_that_branches_on_a_tensor_is_named(branch):
    def branching(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if branch == "if":
            loc = w * x[:, 0] if w > 0 else x[:, 0]
        else:
            loc = x[:, 0] * (w + 0.0 * w.item())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"jit_compile=True cannot trace the model.*after site 'w'.*jit_compile=False"):
        run(SGLD(branching, step_size=1e-3, jit_compile=True))
    run(SGLD(branching, step_size=1e-3))
