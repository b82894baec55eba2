"""Stochastic gradient Langevin dynamics, tempered: ``theta += -h g~ + sqrt(2 h T) xi``, see `bnn_ppl.updates`.

References: Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics; their epsilon is 2 h.
Leimkuhler & Matthews (2013), Rational construction of stochastic numerical methods for molecular sampling.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bnn_ppl import updates
from bnn_ppl.namespaces import namespace
from bnn_ppl.numpyro.kernel import StochasticGradientKernel
from bnn_ppl.numpyro.potential import Evaluation
from bnn_ppl.numpyro.trees import draw_noise, leaf_names
from bnn_ppl.schedules import Schedule, value_at
from bnn_ppl.settings import SGLDSettings, at_site
from bnn_ppl.statistics import POSITION


class SGLDState(NamedTuple):
    """State of a chain; the statistics are those of the last draw, see `SGLD`."""

    step: Array
    z: Any
    noise: Any
    stream: dict
    control: Any
    evaluation: Evaluation
    lp_minibatch: Array
    step_size: Array
    temperature: Array
    configurational_temperature: Array
    site_configurational_temperature: Array
    position_norm_sq: Array
    site_position_norm_sq: Array
    gradient_norm: Array
    site_gradient_norm: Array
    cycle: Array
    diverging: Array
    rng_key: Array


class SGLD(StochasticGradientKernel):
    """Tempered SGLD, as a kernel for ``numpyro.infer.MCMC``.

    Parameters
    ----------
    model
        NumPyro model; its subsampled plates give the minibatches. Without one the full data are used.
    potential_fn
        Instead of `model`: function of the unconstrained values, any tree of arrays, that returns the scalar U.
        Needs ``init_params=`` in ``MCMC.run``.
    step_size
        h, above 0: multiplies the gradient of the sum over the data (Welling & Teh's epsilon is 2 h); a number or
        a callable of the gradient step, counted from the start of warm-up.
    temperature
        T of the target p(theta, y)^(1/T), at least 0; a number or a callable. 1 is the posterior, 0 is SGD.
    steps_per_draw
        Gradient steps between two draws of the host's MCMC.
    integrator
        ``"euler"``, or ``"lm"`` (Leimkuhler and Matthews), which carries its noise over a step: no bias of the variance
        on a Gaussian, whatever the step size, for full-data gradients or little noise in them.
    noise
        ``"normal"``, or ``"fast"``: bounded noise with the moments of a normal up to the third, kurtosis 2.94,
        cheaper on a CPU and enough for a scheme of weak order 1.
    subsampling
        ``"epoch"``: each index once per epoch, in a fresh order; ``"without_replacement"``: a fresh subset each
        step; ``"with_replacement"``.
    batch_size
        Rows of a minibatch for a model with a full-data plate; an int, or a dict by plate name. The data must
        pass through the plate's indices or ``numpyro.subsample``.
    init_strategy
        NumPyro init strategy, such as ``init_to_median``, or a dict of values by site in the user's coordinates, such
        as a draw, a guide's median or an optimiser's result; sites not in it start near the prior's centre. By
        default `init_to_prior_center`.
    minibatches
        Iterable of batches, for data that are larger than memory or augmented: a torch DataLoader, a list. Each is
        a tuple of arrays (the model's first arguments), a dict (keyword arguments) or one array; arguments of
        ``MCMC.run`` follow. The model is called on one batch, and its plate states the rows of all:
        ``plate("data", N, subsample_size=len(x))``. B is the length of the first batch; a short last one is
        filled up from the next epoch, so that each row counts once an epoch. Shuffling is the iterable's work, and
        without it the draws are biased. Random augmentation, fresh in each epoch, makes the target
        exp(E[log likelihood]) times the prior, with each row counted once. Each chain iterates on its own. A
        resumed run begins a new epoch; NumPyro, which calls back to Python at each step, goes on where it was if
        kernel and process are the same.
    gradient_noise_variance
        V, variance of one component of the minibatch gradient of U (sum scale), subtracted from the injected
        noise; a number, or a dict by site name.
    likelihood_temperature
        L of p(theta) p(y | theta)^(1/L), above 0: a "power posterior", **which is another target** than that of
        `temperature`, and may be combined with it. Needs a `model`.
    control_variate
        Reduces the noise of the minibatch gradients, for twice their cost: ``"svrg"`` compares each with that at the
        position where the draw began, where all rows are visited once; a dict of values by site, such as an optimiser's
        result in the user's coordinates, with that at this fixed centre. It pays where the chain stays near the centre;
        far away it adds noise. Needs a model with one subsampled plate.

    Raises
    ------
    ValueError
        For arguments out of range here, and for models that cannot be sampled at the start of ``MCMC.run``.

    Notes
    -----
    Each draw records the statistics of `bnn_ppl.statistics` but those of momenta, and `diverging`, as `SGHMC` does.
    """

    state_type = SGLDState
    extra_fields = ("noise",)
    statistic_fields = (*POSITION, "diverging")
    settings: SGLDSettings

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | Schedule,
        temperature: float | Schedule = 1.0,
        steps_per_draw: int = 1,
        integrator: str = "euler",
        noise: str = "normal",
        subsampling: str = "epoch",
        batch_size: int | Mapping[str, int] | None = None,
        init_strategy: Callable | Mapping[str, Array] | None = None,
        minibatches: Iterable | None = None,
        gradient_noise_variance: float | Mapping[str, float] = 0.0,
        likelihood_temperature: float = 1.0,
        control_variate: str | Mapping[str, Array] | None = None,
    ):
        settings = SGLDSettings(
            step_size=step_size,
            temperature=temperature,
            steps_per_draw=steps_per_draw,
            integrator=integrator,
            noise=noise,
            subsampling=subsampling,
            batch_size=batch_size,
            gradient_noise_variance=gradient_noise_variance,
            likelihood_temperature=likelihood_temperature,
            control_variate=control_variate,
        )
        super().__init__(model, potential_fn, settings, init_strategy, minibatches)

    def start(self, words: Array, step: Array, z: Any, before: dict[str, Any] | None) -> dict[str, Any]:
        """The noise of the step before, where the integrator carries it."""
        carries = self.settings.integrator == "lm"
        return {"noise": draw_noise(words, jnp.int32(0), z, self.settings.noise) if carries else None}

    def advance(
        self,
        step: Array,
        z: Any,
        extra: dict[str, Any],
        gradient: Any,
        noise_words: Array,
        counter: Array,
        momentum_words: Array,
    ) -> tuple[Any, dict[str, Any]]:
        """One gradient step."""
        step_size = value_at(self.settings.step_size, step)
        temperature = self.settings.temperature_at(step)
        normal = draw_noise(noise_words, counter, z, self.settings.noise)
        carried = extra["noise"] is not None
        move = updates.leimkuhler_matthews if carried else updates.sgld
        trees = (z, gradient, normal, extra["noise"]) if carried else (z, gradient, normal)
        moved = []
        leaves = [jax.tree.leaves(tree) for tree in trees]
        for *arrays, name in zip(*leaves, leaf_names(z), strict=True):
            variance = updates.sgld_noise_variance(
                step_size, temperature, at_site(self.settings.gradient_noise_variance, name)
            )
            numbers = {"step_size": step_size, "noise_scale": namespace(variance).sqrt(variance)}
            moved.append(move(*arrays, **{k: jnp.asarray(v, arrays[0].dtype) for k, v in numbers.items()}))
        return jax.tree.unflatten(jax.tree.structure(z), moved), {"noise": normal if carried else None}
