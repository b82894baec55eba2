"""An advice on the step size of a kernel, from the curvature and the gradient noise where its chains start.

The largest eigenvalue is found by power iteration with products of the Hessian and a vector, averaged over minibatches;
the noise is the variance of the gradient over the same minibatches. The limits stand in `bnn_ppl.step_sizes`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn_ppl.pyro.gradient_noise import gradient_noise
from bnn_ppl.pyro.kernel import StochasticGradientKernel
from bnn_ppl.step_sizes import StepSizeAdvice, advise, check_request


def suggest_step_size(
    kernel: StochasticGradientKernel,
    *args: Any,
    tolerance: float = 0.1,
    num_batches: int = 32,
    num_iterations: int = 30,
    seed: int = 0,
    **kwargs: Any,
) -> StepSizeAdvice:
    """How large a step a kernel may take.

    Parameters
    ----------
    kernel
        `SGLD`, `SGHMC` or `SGNHT` of a model, with any step size. Its `init_strategy` says where to look: values of a
        late draw or of an optimiser tell most, since networks are flatter where chains start.
    *args, **kwargs
        Arguments of the model, as for ``MCMC.run``.
    tolerance
        Relative error of variances that is aimed at, above 0.
    num_batches
        Minibatches that are averaged, at least 2; a model without subsampled plates has one. Their noise is that
        without `control_variate`.
    num_iterations
        Of the power iteration.
    seed
        For start, minibatches and the first vector of the power iteration. torch's own generator is left alone.

    Returns
    -------
    StepSizeAdvice
        Print it: the suggestion, and what limits it.

    Raises
    ------
    ValueError
        If an argument is out of range, or the kernel has no model or adapts its mass.
    """
    check_request(kernel, tolerance, num_batches, num_iterations)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _measured(kernel, args, kwargs, tolerance, num_batches, num_iterations)


def _measured(
    kernel: StochasticGradientKernel, args: tuple, kwargs: dict, tolerance: float, num_batches: int, num_iterations: int
) -> StepSizeAdvice:
    kernel.setup(0, *args, **kwargs)
    settings, position = kernel.settings, kernel._position
    count = num_batches if kernel._streams else 1
    batches = [{name: stream.next() for name, stream in kernel._streams.items()} for _ in range(count)]
    temperature = float(settings.temperature_at(0))
    mass = kernel._per_coordinate(getattr(settings, "mass", 1.0))
    mass = mass if isinstance(mass, Tensor) else torch.full_like(position, mass)
    root = mass**-0.5

    def gradient(flat: Tensor, batch: dict[str, Tensor], **options: Any) -> Tensor:
        energy = kernel._plain_energy(flat, temperature, batch)
        return torch.autograd.grad(energy, flat, **options)[0]

    def curved(v: Tensor) -> Tensor:
        """M^-1/2 H M^-1/2 v, averaged over the minibatches."""
        total = torch.zeros_like(v)
        for batch in batches:
            flat = position.detach().requires_grad_()
            total += torch.autograd.grad(gradient(flat, batch, create_graph=True), flat, root * v)[0]
        return root * total / count

    v = torch.randn_like(position)
    v /= v.norm()
    for _ in range(num_iterations):
        product = curved(v)
        curvature = abs(float(v @ product))
        v = product / product.norm()
    variance = torch.zeros_like(position)
    if count > 1:
        layout = kernel._layout
        variance = gradient_noise(
            lambda batch: gradient(position.detach().requires_grad_(), batch),
            layout.subsampled, layout.devices, count, settings.subsampling,
        )  # fmt: skip
    by_site = dict(zip(kernel._shapes, (float(p.mean()) for p in variance.split(kernel._numels)), strict=True))
    kernel.cleanup()
    return advise(settings, curvature, by_site, float(variance.mean()), tolerance, float(np.mean(mass.cpu().numpy())))
