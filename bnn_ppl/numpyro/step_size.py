"""An advice on the step size of a kernel, from the curvature and the gradient noise where its chains start.

The largest eigenvalue is found by power iteration with products of the Hessian and a vector, averaged over minibatches;
the noise is the variance of the gradient over the same minibatches. The limits stand in `bnn_ppl.step_sizes`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from bnn_ppl.numpyro import noise
from bnn_ppl.numpyro.gradient_noise import gradient_noise
from bnn_ppl.numpyro.kernel import StochasticGradientKernel
from bnn_ppl.numpyro.minibatches import next_rows, start_stream
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
    key_data = random.fold_in(rng_key, 2)
    temperature = settings.temperature_at(jnp.int32(0))
    masses = [at_site(getattr(settings, "mass", 1.0), name) for name in leaf_names(z)]
    roots = jax.tree.unflatten(jax.tree.structure(z), [float(m) ** -0.5 for m in masses])

    def curved(v: Any) -> Any:
        """M^-1/2 H M^-1/2 v, averaged over the minibatches."""
        tangent = jax.tree.map(jnp.multiply, v, roots)

        def add(carry: tuple, step: Array) -> tuple[tuple, None]:
            total, stream = carry
            batch, stream = next_rows(target.plates, key_data, stream, step, settings.subsampling)
            product = jax.jvp(lambda at: jax.grad(target.energy)(at, temperature, batch), (z,), (tangent,))[1]
            return (jax.tree.map(jnp.add, total, product), stream), None

        start = jax.tree.map(jnp.zeros_like, z), start_stream(target.plates)
        (total, _), _ = lax.scan(add, start, jnp.arange(count, dtype=jnp.int32))
        return jax.tree.map(lambda t, root: t / count * root, total, roots)

    @jax.jit
    def measure() -> tuple[Array, dict[Any, Array]]:
        def iterate(v: Any, _: None) -> tuple[Any, Array]:
            product = curved(v)
            length = jnp.sqrt(dot(product, product))
            return jax.tree.map(lambda x: x / length, product), dot(v, product)

        start = draw_noise(noise.seed_words(random.fold_in(rng_key, 1)), jnp.int32(0), z, "normal")
        start = jax.tree.map(lambda x: x / jnp.sqrt(dot(start, start)), start)
        _, values = lax.scan(iterate, start, None, length=num_iterations)
        if count == 1:
            return jnp.abs(values[-1]), dict.fromkeys(leaf_names(z), jnp.zeros(()))
        return jnp.abs(values[-1]), gradient_noise(target, z, temperature, key_data, count, settings.subsampling)

    curvature, found = measure()
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(z)])
    noises = {name: float(variance) for name, variance in found.items()}
    total = number_of_coordinates(z)
    mean_noise = float(np.dot(sizes, list(noises.values())) / total)
    return advise(settings, float(curvature), noises, mean_noise, tolerance, float(np.dot(sizes, masses) / total))
