"""Kernels by the scheme of their steps, and their runs in Pyro's MCMC."""

import numpy as np
import pyro
import torch
from pyro.infer import MCMC

from bnn_ppl.pyro import SGHMC, SGLD
from tests import laws

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


def make_kernel(scheme, model=None, **arguments):
    if scheme in laws.OVERDAMPED:
        return SGLD(model, integrator="euler" if scheme == "sgld" else scheme, **arguments)
    return SGHMC(model, integrator=scheme, **arguments)


def run(kernel, *args, draws, warmup=0, start=None, seed=0, chains=1):
    """Run the host's MCMC: positions and momenta by site, shape (draws, units), and statistics, shape (draws,).

    With several chains, which run one after another, all have an axis of chains in front.
    """
    pyro.set_rng_seed(seed)
    momenta = []

    def keep_momentum(kernel, params, stage, i):
        if stage.startswith("Sample") and isinstance(kernel, SGHMC):
            momenta.append(kernel.state_dict()["chains"][0]["extra"]["momentum"].numpy())

    mcmc = MCMC(
        kernel,
        num_samples=draws,
        warmup_steps=warmup,
        initial_params=start,
        num_chains=chains,
        hook_fn=keep_momentum,
        disable_progbar=True,
    )
    mcmc.run(*args)
    theta = {name: value.numpy() for name, value in mcmc.get_samples(group_by_chain=chains > 1).items()}
    statistics = {name: value.numpy() for name, value in mcmc._diagnostics[0].items() if torch.is_tensor(value)}
    if not momenta:
        return theta, None, statistics
    sizes = [theta[name][(0,) * (1 + (chains > 1))].size for name in sorted(theta)]
    parts = np.split(np.stack(momenta), np.cumsum(sizes)[:-1], axis=1)
    return theta, {n: part.reshape(theta[n].shape) for n, part in zip(sorted(theta), parts, strict=True)}, statistics
