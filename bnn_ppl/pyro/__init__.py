"""Kernels, guides and tools for Pyro models."""

try:
    import pyro  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("bnn_ppl.pyro needs pyro-ppl and torch: pip install 'bnn_ppl[pyro]'") from error

from bnn_ppl.pyro import priors
from bnn_ppl.pyro.annealed_elbo import AnnealedELBO
from bnn_ppl.pyro.batch_norm import update_batch_norm
from bnn_ppl.pyro.fge import FGE
from bnn_ppl.pyro.hwa import HWASVI
from bnn_ppl.pyro.initialization import init_to_prior_center
from bnn_ppl.pyro.local_reparameterization import local_reparameterization
from bnn_ppl.pyro.log_uniform import ImproperLogUniform
from bnn_ppl.pyro.networks import random_torch_module
from bnn_ppl.pyro.plates import full_data
from bnn_ppl.pyro.predict import predict
from bnn_ppl.pyro.psgld import PSGLD
from bnn_ppl.pyro.sghmc import SGHMC, norm_adjusting_sghmc
from bnn_ppl.pyro.sgld import SGLD
from bnn_ppl.pyro.sgnht import SGNHT
from bnn_ppl.pyro.step_size import suggest_step_size
from bnn_ppl.pyro.swa import SWA, SWAG
from bnn_ppl.pyro.variance_network import AutoVarianceNetwork
from bnn_ppl.pyro.variational_dropout import AutoVariationalDropout

__all__ = [
    "FGE",
    "HWASVI",
    "PSGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "SWA",
    "SWAG",
    "AnnealedELBO",
    "AutoVarianceNetwork",
    "AutoVariationalDropout",
    "ImproperLogUniform",
    "full_data",
    "init_to_prior_center",
    "local_reparameterization",
    "norm_adjusting_sghmc",
    "predict",
    "priors",
    "random_torch_module",
    "suggest_step_size",
    "update_batch_norm",
]
