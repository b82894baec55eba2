"""Kernels by the scheme of their steps, and their runs in NumPyro's MCMC."""

import jax
import numpy as np
from jax import random
from numpyro.infer import MCMC

from bnn_ppl.numpyro import SGHMC, SGLD
from tests import laws


def make_kernel(scheme, model=None, **arguments):
    if scheme in laws.OVERDAMPED:
        return SGLD(model, integrator="euler" if scheme == "sgld" else scheme, **arguments)
    return SGHMC(model, integrator=scheme, **arguments)


def run(kernel, *args, draws, warmup=0, start=None, seed=0, chains=1, method="vectorized"):
    """Run the host's MCMC; the momentum is collected where there is one."""
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
    )
    fields = ("momentum",) if isinstance(kernel, SGHMC) else ()
    mcmc.run(random.key(seed), *args, init_params=start, extra_fields=fields)
    return mcmc


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def results(mcmc, group_by_chain=False):
    """Positions and momenta by site, shape (draws, units), and statistics by name, shape (draws,)."""
    statistics = as_numpy(mcmc.get_extra_fields(group_by_chain))
    return as_numpy(mcmc.get_samples(group_by_chain)), statistics.pop("momentum", None), statistics
