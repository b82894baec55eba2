"""Kernels, guides and tools for NumPyro models."""

try:
    import jax  # noqa: F401
    import numpyro  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("bnn_ppl.numpyro needs numpyro and jax: pip install 'bnn_ppl[numpyro]'") from error

from bnn_ppl.numpyro import priors
from bnn_ppl.numpyro.annealed_elbo import AnnealedELBO
from bnn_ppl.numpyro.batch_norm import update_batch_norm
from bnn_ppl.numpyro.fge import FGE
from bnn_ppl.numpyro.hwa import HWASVI
from bnn_ppl.numpyro.initialization import init_to_prior_center
from bnn_ppl.numpyro.local_reparameterization import local_reparameterization
from bnn_ppl.numpyro.log_uniform import ImproperLogUniform
from bnn_ppl.numpyro.plates import full_data
from bnn_ppl.numpyro.predict import predict
from bnn_ppl.numpyro.psgld import PSGLD
from bnn_ppl.numpyro.sghmc import SGHMC, norm_adjusting_sghmc
from bnn_ppl.numpyro.sgld import SGLD
from bnn_ppl.numpyro.sgnht import SGNHT
from bnn_ppl.numpyro.step_size import suggest_step_size
from bnn_ppl.numpyro.swa import SWA, SWAG
from bnn_ppl.numpyro.variance_network import AutoVarianceNetwork
from bnn_ppl.numpyro.variational_dropout import AutoVariationalDropout

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
    "suggest_step_size",
    "update_batch_norm",
]
