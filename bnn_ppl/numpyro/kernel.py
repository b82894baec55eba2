"""What all stochastic-gradient kernels share: set-up, the loop over gradient steps, and what a draw records.

A kernel carries the gradient at its current position, so that each step costs one gradient and a draw's
statistics belong to the draw's own position: step k moves with the gradient of minibatch k, then evaluates that
of minibatch k + 1 at the new position. All randomness is a function of the chain's key and the gradient step, so
that a run cut in pieces equals a run in one piece, bit for bit.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.distributions.distribution import validation_enabled
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from bnn_ppl.batches import check_iterable
from bnn_ppl.layout import check_centre, check_start_sites, check_target, only_plate
from bnn_ppl.numpyro import noise, potential
from bnn_ppl.numpyro.compilation import jit_over_data, loop
from bnn_ppl.numpyro.control_variates import Control, control_at, corrected
from bnn_ppl.numpyro.convolutions import fast_convolutions
from bnn_ppl.numpyro.initialization import as_strategy
from bnn_ppl.numpyro.layout import Layout, inspect_model, warn_held, warn_not_finite
from bnn_ppl.numpyro.loading import Loader
from bnn_ppl.numpyro.minibatches import next_rows, start_stream
from bnn_ppl.numpyro.plates import as_arrays, full_data
from bnn_ppl.numpyro.potential import Evaluation, Target
from bnn_ppl.numpyro.statistics import position_statistics
from bnn_ppl.numpyro.trees import as_float, leaf_names, where
from bnn_ppl.schedules import value_at
from bnn_ppl.settings import KernelSettings, check_choice

NOISES = ("normal", "fast")


class Keys(NamedTuple):
    """Independent streams of one chain."""

    noise: Array
    momentum: Array
    data: Array


class StochasticGradientKernel(MCMCKernel):
    """Base of the kernels; a subclass gives `settings`, its state, `start`, `advance` and perhaps `statistics`.

    What moves besides the position (momenta, say) is a dict of trees, `extra`, whose keys are state fields.
    """

    sample_field = "z"
    state_type: Any
    statistic_fields: tuple[str, ...]
    extra_fields: tuple[str, ...] = ()

    def __init__(
        self,
        model: Callable | None,
        potential_fn: Callable | None,
        settings: KernelSettings,
        init_strategy: Callable | Mapping[str, Array] | None,
        minibatches: Iterable | None,
    ):
        check_target(model, potential_fn, settings)
        check_iterable(minibatches, potential_fn, settings)
        check_choice("noise", settings.noise, NOISES)
        self._model: Any = model
        self._potential_fn: Any = potential_fn
        self._loader = None if minibatches is None else Loader(minibatches)
        self._start = init_strategy
        self._init_strategy = as_strategy(init_strategy)
        self._held: dict | None = None
        self._warmup_draws = 0
        self._sample_fn: Callable | None = None
        self.settings = settings

    @property
    def model(self) -> Callable | None:
        """Full-data view of the model, so that the host and ArviZ see all rows.

        None with `potential_fn`, and with `minibatches`, which nobody holds at once.
        """
        return None if self._model is None or self._loader is not None else full_data(self._model)

    @property
    def default_fields(self) -> tuple[str, ...]:
        """State fields that the host's MCMC collects."""
        return (self.sample_field, *self.statistic_fields, *(("cycle",) if self.settings.cyclical else ()))

    @abstractmethod
    def start(self, words: Array, step: Array, z: Any, before: dict[str, Any] | None) -> dict[str, Any]:
        """What moves besides the position, where a chain starts.

        Or where it starts anew: `before` is then what its last finite draw had.
        """

    def begin_draw(self, step: Array, extra: dict[str, Any], gradient: Any) -> dict[str, Any]:
        """What changes between two draws, before the first step of the next: by default nothing."""
        return extra

    @abstractmethod
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

    def statistics(self, z: Any, extra: dict[str, Any], now: Evaluation) -> dict[str, Array]:
        """What a draw records besides the statistics of its position: by default nothing."""
        return {}

    def _statistics(self, step: Array, z: Any, extra: dict[str, Any], now: Evaluation) -> dict[str, Array]:
        dtype = jnp.result_type(*jax.tree.leaves(z))
        own = self.statistics(z, extra, now)
        return (
            position_statistics(z, now.energy, now.gradient)
            | own
            | {
                "step_size": jnp.asarray(value_at(self.settings.step_size, step), dtype),
                "temperature": jnp.asarray(self.settings.temperature_at(step), dtype),
                "cycle": self._cycle(step),
            }
        )

    def _arguments(self, args: tuple, kwargs: dict, batch: list[Array] | None = None) -> tuple[tuple, dict]:
        """The model's arguments: with a loader those of a batch, by default the first, before those given to run."""
        args, kwargs = as_arrays((args, kwargs))
        return (args, kwargs) if self._loader is None else self._loader.arguments(batch, args, kwargs)

    def _layout(self, args: tuple, kwargs: dict) -> Layout:
        """Look at the model on its arguments, those of `_arguments`."""
        streamed = self._loader is not None
        return inspect_model(self._model, args, kwargs, self.settings.batch_size, self._held, streamed)

    def _target(self, args: tuple, kwargs: dict) -> Target:
        if self._model is None:
            return Target(lambda z, temperature, batch: self._potential_fn(z), {})
        layout = self._layout(*self._arguments(args, kwargs))
        run = args, kwargs

        def energy(z: Any, temperature: Array, batch: Any) -> Array:
            args, kwargs = self._arguments(*run, batch)
            if self._loader is not None:
                batch = layout.first_rows()
            cooled = self.settings.likelihood_temperature
            return potential.potential_energy(self._model, layout, z, temperature, batch, args, kwargs, cooled)

        return Target(fast_convolutions(energy), layout.subsampled)

    def _evaluate(
        self,
        target: Target,
        keys: Keys,
        stream: dict,
        step: Array,
        z: Any,
        before: Array,
        temperature: Array,
        control: Control | None,
    ) -> tuple[Evaluation, dict]:
        """Potential and gradient on the next minibatch, and the stream past it; `before` is the potential before."""
        batch, rest = self._minibatch(target.plates, keys, stream, step, before)
        energy, gradient = jax.value_and_grad(target.energy)(z, temperature, batch)
        if control is not None:
            gradient = corrected(target.energy, control, batch, gradient)
        return Evaluation(energy, gradient), rest

    def _minibatch(self, plates: dict, keys: Keys, stream: dict, step: Array, before: Array) -> tuple[Any, dict]:
        """Rows of each plate at a gradient step, or the arrays of a batch, and the stream past them."""
        if self._loader is not None:
            return self._loader.batch(noise.seed_words(keys.data), step, before), stream
        return next_rows(plates, keys.data, stream, step, self.settings.subsampling)

    def init(
        self, rng_key: Array, num_warmup: int, init_params: Any, model_args: tuple, model_kwargs: dict | None
    ) -> Any:
        """State in which a chain starts, or a batch of chains for a batch of keys; the host calls this."""
        run = as_arrays((model_args, model_kwargs or {}))
        if self._loader is not None:
            self._loader.start(model_kwargs)
        args, kwargs = self._arguments(*run)
        with jax.ensure_compile_time_eval():
            self.settings.check_schedules(max(num_warmup, 1))
        self.settings.check_warmup(num_warmup)
        follow_rows = False
        if self._model is not None:
            self._held = None
            layout = self._layout(args, kwargs)
            if self._loader is not None:
                self._loader.check_plates(layout.plates)
            warn_held(layout)
            self._held = layout.held
            self.settings.check_sites(list(layout.shapes))
            check_start_sites(self._start, layout.shapes)
            self._check_start(init_params, layout, batched=not is_prng_key(rng_key))
            follow_rows = self._loader is None and potential.takes_rows(layout, args, kwargs)
        elif init_params is None:
            raise ValueError("potential_fn needs starting values: pass init_params= to MCMC.run")
        else:
            names = leaf_names(init_params)
            self.settings.check_sites(None if None in names else names)
        self._sample_fn = self._draw
        self._warmup_draws = num_warmup

        def start(args: tuple, kwargs: dict, rng_key: Array, init_params: Any) -> Any:
            one_chain = partial(self._start_chain, args=args, kwargs=kwargs)
            if is_prng_key(rng_key):
                return one_chain(rng_key, init_params)
            return jax.vmap(one_chain, out_axes=self._axes)(rng_key, init_params)

        with validation_enabled(False):  # its messages name no site, and _check_finite's do
            state = jit_over_data(start, *run)(rng_key, init_params)
            self._check_finite(state, *run)
            if follow_rows and not isinstance(state.lp_minibatch, jax.core.Tracer):
                z = state.z if is_prng_key(rng_key) else jax.tree.map(lambda x: x[0], state.z)
                potential.check_rows(self._model, layout, z, args, kwargs)
        warn_not_finite(args, kwargs)
        return state

    def _check_start(self, init_params: Any, layout: Layout, batched: bool) -> None:
        if init_params is None:
            return
        given = {name: jnp.shape(value)[1 if batched else 0 :] for name, value in init_params.items()}
        if given != layout.shapes:
            raise ValueError(
                f"init_params has the sites and shapes {given}, the model {layout.shapes}: give an unconstrained value "
                "of that shape for each latent site"
            )

    def _start_chain(self, rng_key: Array, init_params: Any, args: tuple, kwargs: dict) -> Any:
        key_start, key_extra, key_run = random.split(rng_key, 3)
        z = init_params
        if z is None:
            full = self._arguments(args, kwargs)
            z = potential.initial_values(self._model, self._layout(*full), key_start, self._init_strategy, *full)
        z = jax.tree.map(as_float, z)
        step = jnp.int32(0)
        target = self._target(args, kwargs)
        stream = start_stream(target.plates)
        extra = self.start(noise.seed_words(key_extra), step, z, None)
        control = None
        if self.settings.control_variate is not None:
            plate = only_plate(target.plates)
            centre = self._centre(args, kwargs) if self.settings.control_variate != "svrg" else z
            control = control_at(target.energy, plate, centre)
        keys, temperature = Keys(*random.split(key_run, 3)), self.settings.temperature_at(step)
        now, stream = self._evaluate(target, keys, stream, step, z, jnp.zeros(()), temperature, control)
        return self.state_type(
            step=step,
            z=z,
            stream=stream,
            control=control,
            evaluation=now,
            rng_key=key_run,
            diverging=jnp.bool_(False),
            **extra,
            **self._statistics(step, z, extra, now),
        )

    def _centre(self, args: tuple, kwargs: dict) -> Any:
        """The fixed centre of the control variate, unconstrained."""
        layout = self._layout(args, kwargs)
        given: Any = self.settings.control_variate
        if set(given) != set(layout.shapes):
            check_centre(given, {name: jnp.shape(value) for name, value in given.items()}, layout.shapes)
        return potential.initial_values(self._model, layout, random.key(0), as_strategy(given), args, kwargs)

    def _check_finite(self, state: Any, args: tuple, kwargs: dict) -> None:
        """Raise where a chain cannot start; under the host's pmap or vmap values are not known, and it diverges."""
        ok = jnp.isfinite(state.lp_minibatch) & jnp.isfinite(state.gradient_norm)
        if isinstance(ok, jax.core.Tracer) or ok.all():
            return
        z, rng_key = state.z, state.rng_key
        if ok.ndim:
            z, rng_key = jax.tree.map(lambda x: x[jnp.argmin(ok)], (z, rng_key))
        if self._model is None:
            cause = "potential_fn"
        else:
            layout = self._layout(*self._arguments(args, kwargs))
            keys, stream = Keys(*random.split(rng_key, 3)), start_stream(layout.subsampled)
            batch, _ = self._minibatch(layout.subsampled, keys, stream, jnp.int32(0), jnp.zeros(()))
            args, kwargs = self._arguments(args, kwargs, batch)
            rows = batch if self._loader is None else layout.first_rows()
            cause = potential.explain_not_finite(self._model, layout, z, rows, args, kwargs)
            cause += "" if self._loader is None else " of the first batch"
        raise ValueError(
            f"the potential is not finite where the chain starts, because of {cause}: check the data for NaN, the "
            "priors' supports, and the initial values (init_strategy, init_params)"
        )

    @property
    def _axes(self) -> Any:
        """Axes of a batch of chains: the step and the place in the data stream are common to all."""
        axes = dict.fromkeys(self.state_type._fields, 0) | {"step": None, "stream": None}
        return self.state_type(**axes)

    def sample(self, state: Any, model_args: tuple, model_kwargs: dict | None) -> Any:
        """State after one draw, which takes several gradient steps; the host calls this."""
        target = self._target(model_args, model_kwargs or {})
        one_chain = partial(self._draw, target)
        if is_prng_key(state.rng_key):
            return one_chain(state)
        return jax.vmap(one_chain, in_axes=(self._axes,), out_axes=self._axes)(state)

    def _draw(self, target: Target, state: Any) -> Any:
        keys = Keys(*random.split(state.rng_key, 3))
        noise_words = noise.seed_words(random.fold_in(keys.noise, state.step))
        momentum_words = noise.seed_words(random.fold_in(keys.momentum, state.step))
        before = {name: getattr(state, name) for name in self.extra_fields}

        def gradient_step(carry: tuple, counter: Array) -> tuple[tuple, None]:
            step, z, extra, stream, now = carry
            z, extra = self.advance(step, z, extra, now.gradient, noise_words, counter, momentum_words)
            temperature = self.settings.temperature_at(step)  # of this step: a draw's statistics belong to one
            now, stream = self._evaluate(target, keys, stream, step + 1, z, now.energy, temperature, control)
            return (step + 1, z, extra, stream, now), None

        control = state.control
        if self.settings.control_variate == "svrg":
            control = control_at(target.energy, only_plate(target.plates), state.z)
        extra = self.begin_draw(state.step, before, state.evaluation.gradient)
        start = (state.step, state.z, extra, state.stream, state.evaluation)
        step, z, extra, stream, now = loop(gradient_step, start, state.step, self.settings)
        last = step - 1
        statistics = self._statistics(last, z, extra, now)
        norms = [statistics[n] for n in ("gradient_norm", "position_norm_sq", "momentum_norm_sq") if n in statistics]
        finite = jnp.isfinite(now.energy + sum(norms) + sum(leaf.sum() for leaf in jax.tree.leaves(extra)))

        def back() -> tuple:
            words = noise.seed_words(random.fold_in(keys.momentum, -1 - state.step))
            return state.z, self.start(words, step, state.z, before), state.evaluation

        z, extra, now = lax.cond(finite, lambda: (z, extra, now), back)
        return state._replace(
            step=step,
            z=z,
            stream=stream,
            control=control,
            evaluation=now,
            diverging=~finite,
            **extra,
            **where(finite, statistics, self._statistics(last, z, extra, now)),
        )

    def _cycle(self, step: Array) -> Array:
        cyclical = self.settings.cyclical
        return jnp.int32(0) if cyclical is None else step // cyclical.cycle_length

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable:
        """Map from unconstrained to the user's coordinates, with the deterministic sites; the host calls this."""
        if self._model is None:
            return lambda z: z
        args, kwargs = self._arguments(model_args, model_kwargs or {})
        layout = self._layout(args, kwargs)
        return jax.jit(lambda z: potential.constrain(self._model, layout, z, args, kwargs))

    def get_diagnostics_str(self, state: Any) -> str:
        """Text behind the host's progress bar."""
        return (
            f"{int(state.step)} steps of size {float(state.step_size):.2e}. lp={float(state.lp_minibatch):.4g}. "
            f"T_conf={float(state.configurational_temperature):.3g}"
        )
