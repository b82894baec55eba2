"""What all stochastic-gradient kernels share: set-up, the loop over gradient steps, and what a draw records.

A kernel carries the gradient at its current position, so that each step costs one gradient and a draw's
statistics belong to the draw's own position: step k moves with the gradient of minibatch k, then evaluates that
of minibatch k + 1 at the new position. Positions, momenta and gradients are flat tensors with the sites in the
order of their names: a handful of operations a step, however many layers a network has.
"""

import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from bnn_ppl.batches import BatchStream, check_iterable, check_plates
from bnn_ppl.layout import check_centre, check_start_sites, check_target, only_plate
from bnn_ppl.pyro import potential
from bnn_ppl.pyro.compilation import Dynamics
from bnn_ppl.pyro.control_variates import control_at, corrected
from bnn_ppl.pyro.initialization import as_strategy
from bnn_ppl.pyro.layout import inspect_model, same_held, warn_held, warn_not_finite
from bnn_ppl.pyro.minibatches import IndexStream, as_tensor
from bnn_ppl.pyro.plates import full_data
from bnn_ppl.pyro.resume import WaitingStates, chain_state, restore
from bnn_ppl.pyro.statistics import position_statistics
from bnn_ppl.schedules import check_values, value_at
from bnn_ppl.settings import KernelSettings, at_site, check_choice

NOISES = ("normal",)


class StochasticGradientKernel(MCMCKernel):
    """Base of the kernels; a subclass gives `start`, `coefficients`, `move` and perhaps `statistics`.

    What moves besides the position (momenta, say) is a dict of flat tensors, `self._extra`.
    """

    statistic_fields: tuple[str, ...]
    _position: Tensor
    _energy: Tensor
    _grad: Tensor

    def __init__(
        self,
        model: Callable | None,
        potential_fn: Callable | None,
        settings: KernelSettings,
        init_strategy: Callable | Mapping[str, Tensor] | None,
        minibatches: Iterable | None,
        jit_compile: bool,
    ):
        check_target(model, potential_fn, settings)
        check_iterable(minibatches, potential_fn, settings)
        check_choice("noise", settings.noise, NOISES)
        self._model: Any = model
        self._potential_fn: Any = potential_fn
        self._minibatches = minibatches
        self._start = init_strategy
        self._init_strategy = as_strategy(init_strategy)
        self.settings = settings
        if settings.cyclical:
            self.statistic_fields = (*self.statistic_fields, "cycle")
        self.jit_compile = jit_compile
        self.transforms: dict[str, Any] | None = None
        self._given: dict[str, Tensor] | None = None
        self._waiting = WaitingStates([])
        self._dynamics = Dynamics(jit_compile)
        self.cleanup()

    def cleanup(self) -> None:
        """Forget the chain, but not the transforms, which the host still needs; the host calls this."""
        self._given = None
        self._last: dict[str, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled step and the loader's place, so that the host can send the kernel to other processes."""
        return self.__dict__ | {"_dynamics": Dynamics(self.jit_compile), "_loaded": None, "_plain_energy": None}

    @property
    def model(self) -> Callable | None:
        """Full-data view of the model; None with `potential_fn`, and with `minibatches`, which nobody holds at once."""
        return None if self._model is None or self._minibatches is not None else full_data(self._model)

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Unconstrained values at which the chain starts, by site; the host reads and may set them."""
        if self._last is None:
            raise ValueError("initial_params are known after setup, which MCMC.run calls, or after setting them")
        return self._last

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._given = params

    @abstractmethod
    def start(self, before: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """What moves besides the position, where a chain starts.

        Or where it starts anew: `before` is then what its last finite draw had.
        """

    def begin_draw(self) -> None:
        """Change in `self._extra` what changes between two draws, before the first step of the next."""

    @abstractmethod
    def coefficients(self, step: int) -> Sequence[Tensor | float]:
        """What `move` multiplies its terms with at a gradient step; before it, a redraw of `self._extra` if due."""

    @abstractmethod
    def move(
        self, position: Tensor, extra: dict[str, Tensor], gradient: Tensor, noise: Tensor, coefficients: Sequence
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Next position and extra: tensor operations alone, since they are compiled with the gradient."""

    def statistics(self) -> dict[str, Any]:
        """What a draw records besides the statistics of its position: by default nothing."""
        return {}

    def _statistics(self, step: int) -> dict[str, Any]:
        cyclical = self.settings.cyclical
        return {
            **position_statistics(self._position, self._energy, self._grad, self._numels),
            **self.statistics(),
            "step_size": self._value("step_size", step),
            "temperature": self._value("temperature", step),
            **({"cycle": step // cyclical.cycle_length} if cyclical else {}),
        }

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepare a chain on the model's arguments; the host calls this."""
        self.settings.check_schedules(max(warmup_steps, 1))
        resume = self._waiting.take()
        given = args, kwargs
        self._loaded = None
        if self._minibatches is not None:
            self._loaded = BatchStream(self._minibatches, as_tensor)
            args, kwargs = self._loaded.arguments(self._loaded.peek(), args, kwargs)
        if self._model is None:
            initial = self._setup_potential_fn(resume)
        else:
            initial = self._setup_model(args, kwargs, given)
        self._shapes = {name: initial[name].shape for name in sorted(initial)}
        self._numels = [shape.numel() for shape in self._shapes.values()]
        self._dtypes = {name: initial[name].dtype for name in self._shapes}
        self._warmup_steps = warmup_steps
        self._draws = 0
        self._warned = False
        self._divergences: list[int] = []
        self._records: dict[str, list[Any]] = {name: [] for name in self.statistic_fields}
        self._step = 0
        self._position = self._flatten(initial)
        self._streams = {
            name: IndexStream(plate, self.settings.subsampling, self._layout.devices[name])
            for name, plate in (self._layout.subsampled if self._model is not None else {}).items()
            if self._loaded is None
        }
        self._control: dict[str, Tensor] = {}
        centre = self.settings.control_variate
        if centre is not None:
            self._control = self._control_at(self._position if centre == "svrg" else self._unconstrained(centre))
        self._extra = self.start(None)
        self._last = self._unflatten(self._position)
        if resume is not None:
            restore(self, resume)
        else:
            self.settings.check_warmup(warmup_steps)
            self._evaluate()
            self._check_finite(args, kwargs)
            warn_not_finite(args, kwargs)
            if self._model is not None:
                z = self._unflatten(self._position)
                potential.check_fixed(self._model, self._layout, z, args, kwargs)
                if self._loaded is None:
                    potential.check_rows(self._model, self._layout, z, args, kwargs)

    def _setup_potential_fn(self, resume: dict[str, Any] | None) -> dict[str, Tensor]:
        if self._given is None and resume is None:
            raise ValueError("potential_fn needs starting values: pass initial_params= to MCMC")
        initial = resume["params"] if self._given is None else self._given  # type: ignore[index]
        self.settings.check_sites(list(initial))
        self.transforms = {}
        self._dynamics.prepare(
            self.move, lambda flat, temperature, batch, args, kwargs: self._potential_fn(self._unflatten(flat)), (), {}
        )
        return initial

    def _setup_model(self, args: tuple, kwargs: dict, run: tuple[tuple, dict]) -> dict[str, Tensor]:
        loaded = self._loaded
        layout = inspect_model(
            self._model, self._init_strategy, args, kwargs, self.settings.batch_size, streamed=loaded is not None
        )
        if loaded is not None:
            check_plates(self._minibatches, loaded.rows, layout.plates)
        warn_held(layout)
        before = getattr(self, "_layout", None)
        if before is not None and not same_held(layout, before):
            self._dynamics = Dynamics(self.jit_compile)  # the graph holds the old values as constants
        self._layout = layout
        self.settings.check_sites(list(layout.initial))
        check_start_sites(self._start, layout.initial)
        self.transforms = layout.transforms

        def energy(flat: Tensor, temperature: Any, batch: dict, args: tuple, kwargs: dict) -> Tensor:
            z = self._unflatten(flat)
            if loaded is not None:
                args, kwargs = loaded.arguments(list(batch.values()), args, kwargs)
                batch = layout.first_rows()
            cooled = self.settings.likelihood_temperature
            return potential.potential_energy(self._model, layout, z, temperature, batch, args, kwargs, cooled)

        self._plain_energy = lambda flat, temperature, batch: energy(flat, temperature, batch, *run)
        controlled = self.settings.control_variate is not None
        self._dynamics.prepare(self.move, corrected(energy) if controlled else energy, *run)
        initial = self._given or layout.initial
        given = {name: tuple(value.shape) for name, value in initial.items()}
        needed = {name: tuple(shape) for name, shape in layout.shapes.items()}
        if given != needed:
            raise ValueError(
                f"initial_params has the sites and shapes {given}, the model {needed}: give an unconstrained value of "
                "that shape for each latent site"
            )
        return initial

    def _flatten(self, params: dict[str, Tensor]) -> Tensor:
        return torch.cat([params[name].detach().reshape(-1) for name in self._shapes])

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        named = zip(self._shapes.items(), flat.split(self._numels), strict=True)
        return {name: piece.reshape(shape).to(self._dtypes[name]) for (name, shape), piece in named}

    def _unconstrained(self, values: Any) -> Tensor:
        """Flat position of values by site in the user's coordinates."""
        transforms, needed = self._layout.transforms, self._layout.shapes
        inner = {
            n: torch.as_tensor(v, dtype=self._dtypes.get(n), device=self._position.device) for n, v in values.items()
        }
        inner = {n: transforms[n](v) if n in transforms else v for n, v in inner.items()}
        check_centre(values, {n: tuple(v.shape) for n, v in inner.items()}, {n: tuple(s) for n, s in needed.items()})
        return self._flatten(inner)

    def _control_at(self, centre: Tensor) -> dict[str, Tensor]:
        plate = only_plate(self._layout.subsampled)
        return control_at(self._plain_energy, plate, centre, self._layout.devices[plate.name])

    def _per_coordinate(self, by_site: Any) -> Any:
        """A number, or a dict by site name as a flat tensor."""
        if not isinstance(by_site, Mapping):
            return by_site
        like = self._position
        return torch.cat([like.new_full((s.numel(),), at_site(by_site, n)) for n, s in self._shapes.items()])

    def _noise(self) -> Tensor:
        return torch.randn_like(self._position)

    def _value(self, name: str, step: int) -> float:
        """A hyperparameter at a gradient step, checked if it is a callable."""
        schedule = getattr(self.settings, name)
        if callable(schedule):
            check_values(name, schedule, [step], positive=False)
            self.settings.check_numbers([step])
        return float(self.settings.temperature_at(step) if name == "temperature" else value_at(schedule, step))

    def _next_batch(self) -> None:
        if self._loaded is None:
            self._batch = {name: stream.next() for name, stream in self._streams.items()} | self._control
        else:
            self._batch = {f"array {i}": leaf for i, leaf in enumerate(self._loaded.next())}

    def _evaluate(self) -> None:
        """Potential and gradient at the current position on the next minibatch."""
        self._next_batch()
        temperature = self._value("temperature", self._step)
        self._energy, self._grad = self._dynamics.evaluate(self._position, temperature, self._batch)

    def _advance(self) -> None:
        """One gradient step."""
        coefficients = self.coefficients(self._step)
        noise = self._noise()
        temperature = self._value("temperature", self._step)  # of this step: a draw's statistics belong to one
        self._step += 1
        self._next_batch()
        self._position, self._extra, self._energy, self._grad = self._dynamics.step(
            self._position, self._extra, self._grad, noise, coefficients, temperature, self._batch
        )

    def _check_finite(self, args: tuple, kwargs: dict) -> None:
        if torch.isfinite(self._energy) and torch.isfinite(self._grad).all():
            return
        cause = "potential_fn"
        if self._model is not None:
            z = self._unflatten(self._position)
            rows = self._batch if self._loaded is None else self._layout.first_rows()
            cause = potential.explain_not_finite(self._model, self._layout, z, rows, args, kwargs)
            cause += "" if self._loaded is None else " of the first batch"
        raise ValueError(
            f"the potential is not finite where the chain starts, because of {cause}: check the data for NaN, the "
            "priors' supports, and the initial values (init_strategy, initial_params)"
        )

    @torch.no_grad()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Positions after one draw, which takes several gradient steps; the host calls this."""
        if params is not self._last:
            self._position = self._flatten(params)
            self._evaluate()
        before, extra = (self._position, self._energy, self._grad), dict(self._extra)
        self.begin_draw()
        if self.settings.control_variate == "svrg":
            self._control = self._control_at(self._position)
        cyclical = self.settings.cyclical
        for _ in range(cyclical.steps_to_draw(self._step) if cyclical else self.settings.steps_per_draw):
            self._advance()
        statistics = self._statistics(self._step - 1)
        total = self._position.sum() + self._energy + self._grad.sum()
        diverging = not bool(torch.isfinite(sum((tensor.sum() for tensor in self._extra.values()), total)))
        if diverging:
            self._position, self._energy, self._grad = before
            self._extra = self.start(extra)
            statistics = self._statistics(self._step - 1)
            self._warn_diverging()
        self._record(statistics | {"diverging": diverging})
        self._last = self._unflatten(self._position)
        return self._last

    def _warn_diverging(self) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"the chain was not finite at gradient step {self._step} and went back to its last draw with a new "
            "momentum, as it will each time from now on: lower step_size, or raise friction, and look for NaN in the "
            "data; draws that diverged are in sample_stats['diverging']",
            UserWarning,
            stacklevel=3,
        )

    def _record(self, statistics: dict[str, Any]) -> None:
        self._current = statistics
        if self._draws >= self._warmup_steps:
            for name, value in statistics.items():
                self._records[name].append(value)
            if statistics["diverging"]:
                self._divergences.append(self._draws - self._warmup_steps)
        self._draws += 1

    def logging(self) -> OrderedDict:
        """Text behind the host's progress bar."""
        now = self._current
        return OrderedDict(
            [
                ("step size", f"{now['step_size']:.2e}"),
                ("lp", f"{now['lp_minibatch']:.4g}"),
                ("T_conf", f"{now['configurational_temperature']:.3g}"),
            ]
        )

    def diagnostics(self) -> dict[str, Any]:
        """Draws that diverged, the statistics of all draws by name, and the chain's last state."""
        dtypes = {"diverging": torch.bool, "cycle": torch.int64}
        records = {n: torch.tensor(v, dtype=dtypes.get(n, torch.float64)) for n, v in self._records.items()}
        return {"divergences": self._divergences, **records, "last_state": chain_state(self)}

    def state_dict(self, mcmc: Any = None) -> dict[str, Any]:
        """Where the chains stand, to resume exactly with `load_state_dict`.

        Parameters
        ----------
        mcmc
            The host's finished ``MCMC``, needed when it ran several chains; by default the chain that this kernel
            ran last.

        Returns
        -------
        dict
            ``{"chains": [...]}``, one state a chain: positions, momenta, gradient, place in the epoch, and the
            state of torch's generator. ``torch.save`` takes it.
        """
        if mcmc is None:
            return {"chains": [chain_state(self)]}
        if None in mcmc._diagnostics:
            raise ValueError("mcmc has not been run: call mcmc.run before taking its state")
        return {"chains": [diagnostics["last_state"] for diagnostics in mcmc._diagnostics]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next ``MCMC.run`` go on from `state`; give that MCMC ``warmup_steps=0``.

        Parameters
        ----------
        state
            From `state_dict`, with as many chains as the next run has.
        """
        self._waiting = WaitingStates(state["chains"])
