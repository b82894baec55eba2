"""A network from a torch module, its priors, and the runs that the tests of networks share."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO

from bnn_ppl.pyro import SGLD, init_to_prior_center, potential, random_torch_module
from bnn_ppl.pyro import layout as layouts

N, B = 12, 4
rng = np.random.default_rng(0)
X = torch.tensor(rng.normal(size=(N, 2)))
Y = X @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.3 * torch.tensor(rng.normal(size=N))
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
SITES = {f"net.{name}" for name in NAMES}
NORMAL = dist.Normal(0.0, 1.0)
double = partial(torch.tensor, dtype=torch.float64)
PRIORS = {
    "0.weight": dist.Normal(double(0.0), double(0.7)),
    "0.bias": dist.StudentT(double(3.0), double(0.1), double(0.5)),
    "2.weight": dist.MultivariateNormal(torch.zeros(3).double(), torch.diag(double([0.5, 1.0, 2.0]))),
    "2.bias": dist.LogNormal(double(-1.0), double(0.5)),
}


def perceptron():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def model_of(torch_module, prior, name="net", **keywords):
    def model(x, y=None, subsample_size=None):
        net = random_torch_module(name, torch_module, prior)
        with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            mean = net(x[rows], **keywords).squeeze(-1)
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=None if y is None else y[rows])

    return model


def looked(model, *args, **kwargs):
    """Layout of a model, and its potential and gradient as a function of unconstrained values and a minibatch."""
    layout = layouts.inspect_model(model, init_to_prior_center, args, kwargs, None)

    def evaluate(z, batch, temperature=1.0):
        z = {name: value.clone().requires_grad_() for name, value in z.items()}
        energy = potential.potential_energy(model, layout, z, temperature, batch, args, kwargs)
        return energy.item(), dict(zip(z, torch.autograd.grad(energy, list(z.values())), strict=True))

    return layout, evaluate


def run(model, *args, kernel=SGLD, num_samples=3, **options):
    """A short chain."""
    mcmc = MCMC(kernel(model, **{"step_size": 1e-3} | options), num_samples, warmup_steps=0, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def learned(model, guide, *args, steps=100):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]
