"""An advice on the step size of a kernel, from the curvature and the gradient noise where its chains start.

The largest eigenvalue is found by power iteration with products of the Hessian and a vector, averaged over minibatches;
the noise is the variance of the gradient over the same minibatches. The limits stand in `bnn_ppl.step_sizes`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from bnn_ppl.numpyro import noise
from bnn_ppl.numpyro.kernel import Keys, StochasticGradientKernel
from bnn_ppl.numpyro.trees import dot, draw_noise, leaf_names, number_of_coordinates
from bnn_ppl.settings import at_site
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
        For start, minibatches and the first vector of the power iteration.

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
    rng_key = random.key(seed)
    state = kernel.init(rng_key, 0, None, args, kwargs)
    target = kernel._target(args, kwargs)
    z, settings = state.z, kernel.settings
    count = num_batches if target.plates else 1
    keys = Keys(*random.split(rng_key, 3))
    temperature = settings.temperature_at(jnp.int32(0))
    masses = [at_site(getattr(settings, "mass", 1.0), name) for name in leaf_names(z)]
    roots = jax.tree.unflatten(jax.tree.structure(z), [float(m) ** -0.5 for m in masses])

    def batches() -> list[Any]:
        found, stream = [], {name: (jnp.int32(0), jnp.int32(0)) for name in target.plates}
        for step in range(count):
            batch, stream = kernel._minibatch(target.plates, keys, stream, jnp.int32(step), jnp.zeros(()))
            found.append(batch)
        return found

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches())

    def over_batches(f: Callable) -> Any:
        return lax.map(lambda item: f(item[0]), (stacked, jnp.arange(count)))  # without plates `stacked` is empty

    def gradient(z: Any, batch: Any) -> Any:
        return jax.grad(target.energy)(z, temperature, batch)

    def curved(v: Any) -> Any:
        """M^-1/2 H M^-1/2 v, averaged over the minibatches."""
        tangent = jax.tree.map(jnp.multiply, v, roots)
        products = over_batches(lambda batch: jax.jvp(partial(gradient, batch=batch), (z,), (tangent,))[1])
        return jax.tree.map(lambda p, root: p.mean(0) * root, products, roots)

    @jax.jit
    def measure() -> tuple[Array, list[Array]]:
        def iterate(v: Any, _: None) -> tuple[Any, Array]:
            product = curved(v)
            length = jnp.sqrt(dot(product, product))
            return jax.tree.map(lambda x: x / length, product), dot(v, product)

        start = draw_noise(noise.seed_words(random.fold_in(rng_key, 1)), jnp.int32(0), z, "normal")
        start = jax.tree.map(lambda x: x / jnp.sqrt(dot(start, start)), start)
        _, values = lax.scan(iterate, start, None, length=num_iterations)
        gradients = over_batches(lambda batch: gradient(z, batch))
        ddof = 1 if count > 1 else 0
        return jnp.abs(values[-1]), [leaf.var(axis=0, ddof=ddof).mean() for leaf in jax.tree.leaves(gradients)]

    curvature, variances = measure()
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(z)])
    noises = dict(zip(leaf_names(z), map(float, variances), strict=True))
    total = number_of_coordinates(z)
    mean_noise = float(np.dot(sizes, list(noises.values())) / total)
    return advise(settings, float(curvature), noises, mean_noise, tolerance, float(np.dot(sizes, masses) / total))
