"""The log-uniform prior p(w) ~ 1 / |w| of variational dropout, and its divergence from a normal, see `divergences`."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import Normal, constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.kl import register_kl

from bnn_ppl import divergences
from bnn_ppl.settings import check_choice


class _Exact(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        return divergences.exact(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return gradients[0] * divergences.exact_slope(u)


def exact_divergence(u: Tensor) -> Tensor:
    """The exact divergence at u = mu^2 / (2 sigma^2), whose derivative is accurate to rounding too."""
    return _Exact.apply(u)


_DIVERGENCES: dict[str, Callable] = {
    "exact": exact_divergence,
    "sigmoid": divergences.sigmoid,
    "cubic": divergences.cubic,
    "ard": divergences.ard,
}


class ImproperLogUniform(TorchDistribution):
    r"""Improper prior with the density 1 / \|w\|, under which the scale of a weight is a priori unknown.

    **It does not normalise, and with usual likelihoods neither does the posterior**: what variational dropout minimises
    is no ELBO of a proper posterior (Hron et al. 2018). Its values may be compared between guides, not between priors.

    Parameters
    ----------
    kl
        The divergence from a `Normal` that ``TraceMeanField_ELBO`` takes: ``"exact"``; ``"sigmoid"`` (Molchanov et al.
        2017) and ``"cubic"`` (Kingma et al. 2015, for alpha up to 1; a larger alpha counts as 1) are fits of the
        literature; ``"ard"`` is that from a normal prior whose variance is chosen for each weight. All but the cubic
        are 0 for weights of mean 0.

    Raises
    ------
    ValueError
        If `kl` is none of the four.

    Notes
    -----
    `log_prob` is -log |w|, infinite at 0, whatever `kl` is. `sample` draws from the density cut to 0.001 <= |w| <= 1,
    only so that the hosts, which run a model to see its shapes, can do so. The exact divergence from a normal is
    E[log q(w) - log p(w)] + (1 + gamma + log(4 pi)) / 2, with Euler's gamma, so that an ELBO from `log_prob`, as the
    `elbo` of ``to_arviz``, is 2.0541 a weight above that of ``TraceMeanField_ELBO``.

    References
    ----------
    Kingma, Salimans & Welling (2015), Variational dropout and the local reparameterization trick; Hron, Matthews &
    Ghahramani (2018), Variational Bayesian dropout: pitfalls and fixes.

    Examples
    --------
    >>> pyro.sample("w", ImproperLogUniform().expand([784, 100]).to_event(2))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real

    def __init__(self, kl: str = "exact", *, validate_args: bool | None = None):
        check_choice("kl", kl, divergences.KINDS)
        self.kl = kl
        super().__init__(torch.Size(), torch.Size(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ImproperLogUniform":
        """The same for each entry of a batch."""
        new = self._get_checked_instance(ImproperLogUniform, _instance)
        new.kl = self.kl
        TorchDistribution.__init__(new, torch.Size(batch_shape), torch.Size(), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws from the density between 0.001 and 1, of both signs."""
        signed = 2 * torch.rand((*sample_shape, *self.batch_shape)) - 1
        return signed.sign() * (math.log(1e-3) * (1 - signed.abs())).exp()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, without a constant."""
        if self._validate_args:
            self._validate_sample(value)
        return -value.abs().log().expand(torch.broadcast_shapes(value.shape, self.batch_shape))


def divergence_at(p: ImproperLogUniform, u: Tensor) -> Tensor:
    """The divergence that a prior has chosen, at u = 1 / (2 alpha)."""
    return _DIVERGENCES[p.kl](u)


@register_kl(Normal, ImproperLogUniform)
def _divergence_from_normal(q: Normal, p: ImproperLogUniform) -> Tensor:
    return divergence_at(p, 0.5 * (q.loc / q.scale).square()).expand(q.batch_shape)
