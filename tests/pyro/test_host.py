"""Pyro's own MCMC drives the kernels unchanged: chains, processes, hooks, resume, data of all kinds."""

import io
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.nn import PyroModule, PyroSample

from bnn_ppl.models.pyro import linear_regression
from bnn_ppl.pyro import SGHMC, SGLD, norm_adjusting_sghmc
from tests.pyro.host import B, N, X, Y, assert_same, draws, make, model, quadratic, rng, run


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def many_processors(monkeypatch):
    """Pyro gives chains processes of their own where there are more processors than chains."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 8)


# Chains


def test_one_chain():
    mcmc = run()
    assert {name: value.shape for name, value in draws(mcmc).items()} == {"w": (1, 4, 2), "scale": (1, 4)}
    assert (mcmc.get_samples()["scale"] > 0).all()
    assert_same(draws(run()), draws(mcmc))
    assert (draws(run(seed=1))["w"] != draws(mcmc)["w"]).all()


def test_warm_up_draws_are_dropped():
    longer = run(num_samples=6, warmup_steps=0).get_samples()
    assert_same(run(num_samples=4, warmup_steps=2).get_samples(), {name: value[2:] for name, value in longer.items()})


def test_more_chains_than_processors_run_one_after_another():
    mcmc = run(num_chains=3)
    samples = draws(mcmc)
    assert samples["w"].shape == (3, 4, 2)
    assert len(torch.unique(samples["w"][:, 0, 0])) == 3  # each starts anew
    assert_same({name: value[:1] for name, value in samples.items()}, draws(run()))
    assert_same(draws(run(num_chains=3)), samples)
    diagnostics = mcmc.diagnostics()
    assert set(diagnostics["step_size"]) == {"chain 0", "chain 1", "chain 2"}
    assert diagnostics["lp_minibatch"]["chain 2"].shape == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_chains_in_processes(method, many_processors):
    kernel = make(linear_regression())

    def sample():
        pyro.set_rng_seed(0)
        mcmc = MCMC(kernel, 3, warmup_steps=1, num_chains=2, mp_context=method, disable_progbar=True)
        mcmc.run(X, Y, subsample_size=B)
        return mcmc

    mcmc = sample()
    assert type(mcmc.sampler).__name__ == "_MultiSampler"
    samples = draws(mcmc)
    assert all(value.shape[:2] == (2, 3) and (value[0] != value[1]).all() for value in samples.values())
    np.testing.assert_array_equal(mcmc._diagnostics[1]["temperature"], 1.0)
    if method == "fork":
        assert_same(draws(sample()), samples)


# What the host does around the kernel


def test_hooks_see_every_draw():
    seen = []

    def hook(kernel, params, stage, i):
        seen.append((stage, i, kernel.logging()["step size"], sorted(params)))

    run(hook_fn=hook)
    assert [entry[:2] for entry in seen] == [("Warmup", 0), ("Sample", 0), ("Sample", 1), ("Sample", 2), ("Sample", 3)]
    assert {entry[2] for entry in seen} == {"2.00e-02"}
    assert all(entry[3] == ["scale", "w"] for entry in seen)


def test_the_progress_bar_shows_the_kernels_text(capsys, monkeypatch):
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # Pyro switches its bar off under either
        monkeypatch.delenv(name, raising=False)
    mcmc = run(disable_progbar=False)
    printed = capsys.readouterr().err
    assert "Sample: 100%" in printed
    assert "step size=2.00e-02, lp=" in printed
    assert list(mcmc.kernel.logging()) == ["step size", "lp", "T_conf"]


def test_summary(capsys):
    run(num_chains=2).summary()
    printed = capsys.readouterr().out
    assert "w[0]" in printed
    assert "Number of divergences: 0" in printed


def test_save_params():
    mcmc = run(save_params=["scale"])
    assert set(mcmc.get_samples()) == {"scale"}
    assert_same(mcmc.get_samples(), {"scale": run().get_samples()["scale"]})


def test_diagnostics_are_the_draws_own():
    mcmc = run()
    chain = mcmc._diagnostics[0]
    assert set(mcmc.kernel.statistic_fields) < set(chain)
    assert all(len(chain[name]) == 4 for name in mcmc.kernel.statistic_fields)
    samples = mcmc.get_samples()
    squares = (samples["w"] ** 2).sum(-1) + samples["scale"].log() ** 2
    np.testing.assert_allclose(chain["position_norm_sq"], squares)
    assert mcmc.diagnostics()["divergences"] == {"chain 0": []}


def test_streaming_mcmc():
    pyro.set_rng_seed(0)
    streaming = StreamingMCMC(make(), 4, warmup_steps=1, disable_progbar=True)
    streaming.run(X, Y)
    samples = run().get_samples()
    np.testing.assert_allclose(streaming.get_statistics()[0, "w"]["mean"], samples["w"].mean(0))
    np.testing.assert_allclose(streaming.get_statistics()[0, "scale"]["variance"], samples["scale"].var(0))
    assert streaming.diagnostics()["diverging"]["chain 0"].shape == (4,)


def test_kernels_pickle_before_and_after_a_run():
    kernel = make(linear_regression())
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(kernel))
        assert copy.settings == kernel.settings
        assert_same(draws(run(copy)), draws(run(kernel)))


def test_a_kernel_serves_models_of_other_shapes():
    kernel = make()
    run(kernel, X[:12], Y[:12])
    assert_same(draws(run(kernel)), draws(run()))


# Starting values, potential_fn


def test_initial_params():
    start = {"w": torch.tensor([0.5, -0.5]), "scale": torch.tensor(-1.0)}
    still = {"step_size": 1e-8, "temperature": 0.0}
    samples = run(make(**still), initial_params=start).get_samples()
    np.testing.assert_allclose(samples["w"][0], start["w"], atol=1e-6)
    np.testing.assert_allclose(samples["scale"][0], np.exp(-1.0), atol=1e-6)
    several = {name: torch.stack([value, value + 1.0]) for name, value in start.items()}
    samples = draws(run(make(**still), initial_params=several, num_chains=2))
    np.testing.assert_allclose(samples["w"][:, 0], several["w"], atol=1e-6)


@pytest.mark.parametrize("num_chains", [1, 2])
def test_potential_fn(num_chains):
    start = {"a": torch.zeros(2), "b": torch.tensor(1.0)}
    if num_chains > 1:
        start = {name: torch.stack([value] * num_chains) for name, value in start.items()}
    pyro.set_rng_seed(0)
    kernel = SGHMC(None, quadratic, step_size=0.1, friction=1.0)
    mcmc = MCMC(kernel, 3, warmup_steps=0, initial_params=start, num_chains=num_chains, disable_progbar=True)
    mcmc.run()
    samples = draws(mcmc)
    assert samples["a"].shape == (num_chains, 3, 2)
    energy = ((samples["a"] - 1.0) ** 2).sum(-1) + (samples["b"] - 1.0) ** 2
    np.testing.assert_allclose(torch.stack([d["lp_minibatch"] for d in mcmc._diagnostics]), -energy)
    assert kernel.model is None


# Resume


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(state, num_samples=2, kernel=None, **options):
    """A run that goes on from `state`, with a new kernel and the generator in another state."""
    kernel = kernel or make()
    kernel.load_state_dict(state)
    return run(kernel, seed=99, num_samples=num_samples, warmup_steps=0, **options)


@pytest.mark.parametrize(
    "make_kernel",
    [
        make,
        lambda: make(mass={"w": 2.0, "scale": 1.0}),
        lambda: SGLD(model, step_size=1e-3, subsampling="without_replacement"),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(make_kernel):
    whole = run(make_kernel(), num_samples=6)
    first = run(make_kernel(), num_samples=2)
    second = resumed(saved_and_loaded(first.kernel.state_dict()), kernel=make_kernel())
    third = resumed(second.kernel.state_dict(), kernel=second.kernel)  # the same kernel, too
    joined = {name: torch.cat([draws(m)[name] for m in (first, second, third)], 1) for name in ("w", "scale")}
    assert_same(joined, draws(whole))
    statistics = torch.cat([m._diagnostics[0]["lp_minibatch"] for m in (first, second, third)])
    np.testing.assert_array_equal(statistics, whole._diagnostics[0]["lp_minibatch"])


def test_several_chains_resume_each_from_its_own_state():
    first = run(num_chains=2, num_samples=3)
    state = saved_and_loaded(first.kernel.state_dict(first))
    assert len(state["chains"]) == 2
    both = draws(resumed(state, num_chains=2))
    for chain in range(2):
        alone = draws(resumed({"chains": state["chains"][chain : chain + 1]}))
        assert_same(alone, {name: value[chain : chain + 1] for name, value in both.items()})


@pytest.mark.slow
def test_chains_in_processes_resume_each_from_its_own_state(many_processors):
    whole = run(num_chains=2, num_samples=4)
    first = run(num_chains=2, num_samples=2)
    assert type(first.sampler).__name__ == "_MultiSampler"
    second = resumed(first.kernel.state_dict(first), num_chains=2)
    assert_same(
        {name: torch.cat([draws(m)[name] for m in (first, second)], 1) for name in ("w", "scale")}, draws(whole)
    )


def test_a_resume_is_of_one_run():
    kernel = make()
    first = run(kernel, num_samples=2)
    kernel.load_state_dict(first.kernel.state_dict())
    run(kernel, num_samples=2, warmup_steps=0)
    assert_same(draws(run(kernel)), draws(run()))


def test_a_state_of_another_model_is_refused():
    state = run().kernel.state_dict()
    kernel = SGHMC(None, quadratic, step_size=0.1, friction=1.0)
    kernel.load_state_dict(state)
    with pytest.raises(ValueError, match=r"(?s)the state to resume comes from .*'w'.* and this one has .*'a'"):
        run(kernel, initial_params={"a": torch.zeros(2), "b": torch.tensor(1.0)})


def test_a_state_must_fit():
    state = run().kernel.state_dict()
    other = SGLD(model, step_size=1e-3)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"comes from a chain with .*SGHMC.*and this one has .*SGLD"):
        run(other, warmup_steps=0)
    again = make()
    again.load_state_dict(state)
    with pytest.raises(ValueError, match="warmup_steps=2 for a chain that goes on"):
        run(again, warmup_steps=2)
    with pytest.raises(ValueError, match="the kernel has no chain yet"):
        make().state_dict()


# Data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_follows_the_model(dtype):
    torch.set_default_dtype(dtype)
    mcmc = run(None, X.to(dtype), Y.to(dtype))
    assert {value.dtype for value in mcmc.get_samples().values()} == {dtype}
    assert {value.dtype for value in mcmc.kernel.state_dict()["chains"][0]["extra"].values()} == {dtype}


def test_integer_inputs():
    def counts(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=B) as idx:
            pyro.sample("y", dist.Poisson((w * x[idx]).exp()), obs=y[idx])

    x, y = torch.arange(N) % 3, torch.tensor(rng.poisson(1.0, N))
    samples = draws(run(SGLD(counts, step_size=1e-3), x.to(torch.uint8), y.to(torch.int32)))
    assert_same(samples, draws(run(SGLD(counts, step_size=1e-3), x.double(), y.double())))


# Kernels


@pytest.mark.parametrize(
    "kernel",
    [
        SGHMC.from_learning_rate(model, learning_rate=0.01, momentum=0.9, num_data=N, temperature=0.1),
        norm_adjusting_sghmc(model, boost=3.0, adjust=0.5, momentum_scale=3.0, friction=5.0, step_size=0.02,
                             resample_every=2),
        SGHMC(model, step_size=lambda t: 0.02 / (1.0 + t), friction=5.0, mass={"w": 1.0, "scale": 2.0},
              temperature=lambda t: min(1.0, t / 10), integrator="symplectic_euler"),
        SGLD(model, step_size=1e-3, gradient_noise_variance={"w": 1.0, "scale": 0.0}, subsampling="with_replacement"),
    ],
    ids=["learning_rate", "norm_adjusting", "schedules", "compensated"],
)  # fmt: skip
def test_every_option_runs(kernel):
    mcmc = run(kernel)
    statistics = {name: mcmc._diagnostics[0][name] for name in kernel.statistic_fields}
    assert all(torch.isfinite(value).all() for value in (mcmc.get_samples() | statistics).values())


# Networks whose priors were made before the run, with the host's validation in them


class Network(PyroModule):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0, validate_args=True).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0, validate_args=True).expand([1]).to_event(1))
        self.dropout = dropout

    def forward(self, x, y):
        plate = pyro.plate("data", len(x), subsample_size=4)
        with plate as rows:
            pass
        mean = self.linear(x[rows]).squeeze(-1)
        mean = torch.nn.functional.dropout(mean, self.dropout)
        with plate:
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y[rows])


def test_a_network_of_validated_priors_may_diverge():
    kernel = SGLD(Network(), step_size=10.0, steps_per_draw=200)
    with pytest.warns(UserWarning, match="not finite at gradient step"):
        mcmc = run(kernel, X, Y, num_samples=3, warmup_steps=0)
    assert mcmc._diagnostics[0]["diverging"].all()


def test_a_network_of_validated_priors_can_be_traced(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.warns(UserWarning, match="no C"):
        traced = run(SGLD(Network(), step_size=1e-3, jit_compile=True), X, Y)
    assert_same(draws(traced), draws(run(SGLD(Network(), step_size=1e-3), X, Y)))


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"site 'y' differs between two calls .* dropout"):
        run(SGLD(Network(dropout=0.5), step_size=1e-3), X, Y)
