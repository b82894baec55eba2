"""What a user sets on a kernel, with every check that needs no model: shared by both backends."""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bnn_ppl import updates
from bnn_ppl.schedules import Cyclical, Schedule, check_count, check_values, scrambled, trial_steps, value_at

_LARGEST = 2**32 - 1
SUBSAMPLING = ("epoch", "without_replacement", "with_replacement")


class Integrator(NamedTuple):
    """One step of an underdamped dynamics, its coefficients, and the variance of its noise."""

    step: Callable
    coefficients: Callable[..., updates.Coefficients]
    noise_variance: Callable


INTEGRATORS = {
    "baoab": Integrator(updates.baoab, updates.baoab_coefficients, updates.baoab_noise_variance),
    "symplectic_euler": Integrator(
        updates.symplectic_euler,
        updates.symplectic_euler_coefficients,
        updates.symplectic_euler_noise_variance,
    ),
}

BySite = float | Mapping[str, float]

ADAPTED_MASSES = {"adapt": 0.99, "adapt_coordinates": 0.999}  # decay of the average of squared gradients
NEVER = 2**31 - 1  # a gradient step that no chain comes to


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError that lists the choices unless `value` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _values(by_site: BySite) -> dict[Any, float]:
    return dict(by_site) if isinstance(by_site, Mapping) else {None: by_site}


def at_site(by_site: BySite, site: Any) -> float:
    """Value of a number, or of a dict by site name, at one site."""
    return by_site[site] if isinstance(by_site, Mapping) else by_site


def _check_number(label: str, value: Any, *, positive: bool) -> None:
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{label} must be a number, got {value!r}")
    check_values(label, float(value), (), positive=positive)


def _check_by_site(name: str, by_site: BySite, *, positive: bool) -> None:
    for site, value in _values(by_site).items():
        _check_number(name if site is None else f"{name}[{site!r}]", value, positive=positive)


def _check_sites(name: str, by_site: BySite, sites: Iterable[str] | None) -> None:
    if not isinstance(by_site, Mapping):
        return
    if sites is None:
        raise ValueError(
            f"{name}={dict(by_site)!r} goes by site name, but the positions are no dict of arrays: give one number"
        )
    missing, unknown = sorted(set(sites) - set(by_site)), sorted(set(by_site) - set(sites))
    if missing or unknown:
        parts = [f"lacks the sites {missing}"] * bool(missing) + [f"names {unknown}, no latent sites"] * bool(unknown)
        raise ValueError(f"{name} {' and '.join(parts)}; the latent sites are {sorted(sites)}: give each one value")


@dataclass(frozen=True)
class KernelSettings:
    """Arguments that every kernel has; see the kernels for their meaning."""

    step_size: float | Schedule
    temperature: float | Schedule = 1.0
    gradient_noise_variance: BySite = 0.0
    steps_per_draw: int = 1
    subsampling: str = "epoch"
    batch_size: int | Mapping[str, int] | None = None
    noise: str = "normal"
    likelihood_temperature: float = 1.0
    control_variate: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not (self.control_variate in (None, "svrg") or isinstance(self.control_variate, Mapping)):
            raise ValueError(
                f"control_variate must be None, 'svrg' or a dict of values by site, got {self.control_variate!r}"
            )
        _check_number("likelihood_temperature", self.likelihood_temperature, positive=True)
        check_values("step_size", self.step_size, (), positive=True)
        check_values("temperature", self.temperature, (), positive=False)
        _check_by_site("gradient_noise_variance", self.gradient_noise_variance, positive=False)
        check_count("steps_per_draw", self.steps_per_draw)
        if self.cyclical and self.steps_per_draw != 1:
            raise ValueError(
                f"steps_per_draw={self.steps_per_draw} together with step_size={self.step_size!r}, which says where "
                "draws fall: leave steps_per_draw out, and choose cycle_length and draws_per_cycle"
            )
        check_choice("subsampling", self.subsampling, SUBSAMPLING)
        if isinstance(self.batch_size, Mapping):
            for plate, rows in self.batch_size.items():
                check_count(f"batch_size[{plate!r}]", rows)
        elif self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        self.check_numbers([0] if not self.varies() else [])

    @property
    def cyclical(self) -> Cyclical | None:
        """The step size where it also says where draws fall."""
        return self.step_size if isinstance(self.step_size, Cyclical) else None

    def temperature_at(self, step: Any) -> Any:
        """Temperature at a gradient step, that of the exploration in cycles included."""
        temperature = value_at(self.temperature, step)
        return self.cyclical.temperature(step, temperature) if self.cyclical else temperature

    def gradient_steps(self, num_draws: int) -> int:
        """Gradient steps of the first draws."""
        if not self.cyclical:
            return num_draws * self.steps_per_draw
        cycles, draws = divmod(num_draws, self.cyclical.draws_per_cycle)
        return cycles * self.cyclical.cycle_length + (self.cyclical.draw_ends[draws - 1] if draws else 0)

    def varies(self) -> bool:
        """Whether what `check_numbers` checks changes over the steps."""
        return callable(self.step_size) or callable(self.temperature)

    def check_sites(self, sites: Iterable[str] | None) -> None:
        """Check the dicts by site against the latent sites; None where positions have no site names."""
        _check_sites("gradient_noise_variance", self.gradient_noise_variance, sites)

    def frozen(self) -> tuple[str, str] | None:
        """The argument by which something is estimated in the warm-up alone, and what to set instead; or None."""
        return None

    def adapts_until(self, num_draws: int) -> int:
        """Gradient step at which a kernel that adapts stops, for a warm-up of so many draws."""
        return self.gradient_steps(num_draws) if self.frozen() else NEVER

    def check_warmup(self, num_draws: int) -> None:
        """Check that a warm-up of so many draws serves the kernels that need one."""
        if num_draws == 0 and (frozen := self.frozen()) is not None:
            raise ValueError(
                f"{frozen[0]} adapts during the warm-up, and there is none: give MCMC num_warmup (NumPyro, which in "
                "another process wants that of the first run to go on from a state) or warmup_steps (Pyro), or set "
                f"{frozen[1]}"
            )

    def check_schedules(self, num_draws: int) -> None:
        """Try the callables on a grid of the gradient steps of `num_draws` draws."""
        steps = trial_steps(self.gradient_steps(num_draws))
        check_values("step_size", self.step_size, steps, positive=True)
        check_values("temperature", self.temperature, steps, positive=False)
        if self.varies():
            self.check_numbers(steps)

    def check_numbers(self, steps: Iterable[int]) -> None:
        """Check what depends on several arguments, at some gradient steps."""
        for step in steps:
            step_size = float(value_at(self.step_size, step))
            temperature = float(self.temperature_at(step))
            for site, noise in _values(self.gradient_noise_variance).items():
                if noise > 0 and updates.sgld_noise_variance(step_size, temperature, noise) < 0:
                    self._raise_compensation(step, site, noise, 2 * temperature / max(step_size, 1e-300))

    def _raise_compensation(self, step: int, site: str | None, variance: float, most: float) -> None:
        where = "" if site is None else f" at site {site!r}"
        raise ValueError(
            f"gradient_noise_variance={variance!r}{where} asks to subtract more noise than is injected at gradient "
            f"step {step}, where at most {most:.4g} can be: use a smaller step_size, a larger batch or temperature, "
            "or a smaller gradient_noise_variance"
        )


@dataclass(frozen=True)
class SGLDSettings(KernelSettings):
    """Arguments of SGLD; see the kernels for their meaning."""

    integrator: str = "euler"

    def __post_init__(self) -> None:
        check_choice("integrator", self.integrator, ("euler", "lm"))
        super().__post_init__()


@dataclass(frozen=True)
class SGNHTSettings(KernelSettings):
    """Arguments of SGNHT; see the kernels for their meaning."""

    friction: float = 1.0

    def __post_init__(self) -> None:
        _check_number("friction", self.friction, positive=True)
        super().__post_init__()
        if not callable(self.temperature) and self.temperature == 0:
            raise ValueError("temperature must be above 0 for SGNHT, whose thermostat holds it, got 0: use SGHMC")


@dataclass(frozen=True)
class PSGLDSettings(KernelSettings):
    """Arguments of PSGLD; see the kernels for their meaning."""

    decay: float = 0.99
    damping: float = 1.0
    freeze: bool = True

    def __post_init__(self) -> None:
        _check_number("damping", self.damping, positive=True)
        _check_number("decay", self.decay, positive=False)
        if self.decay >= 1:
            raise ValueError(f"decay must be in [0, 1), the share of the average that a step keeps, got {self.decay!r}")
        if not isinstance(self.freeze, bool):
            raise ValueError(f"freeze must be True or False, got {self.freeze!r}")
        super().__post_init__()

    def frozen(self) -> tuple[str, str] | None:
        """The argument by which something is estimated in the warm-up alone, and what to set instead; or None."""
        return ("freeze=True", "freeze=False") if self.freeze else None


@dataclass(frozen=True)
class SGHMCSettings(KernelSettings):
    """Arguments of SGHMC; see the kernels for their meaning."""

    friction: float = 1.0
    mass: BySite | str = 1.0
    resample_every: int | None = None
    resample_scale: float | Schedule | None = None
    resample_jitter: bool = False
    integrator: str = "baoab"

    def __post_init__(self) -> None:
        check_choice("integrator", self.integrator, INTEGRATORS)
        _check_number("friction", self.friction, positive=True)
        if isinstance(self.mass, str):
            self._check_adapted()
        else:
            _check_by_site("mass", self.mass, positive=True)
        if self.resample_every is not None:
            check_count("resample_every", self.resample_every)
        if not isinstance(self.resample_jitter, bool):
            raise ValueError(f"resample_jitter must be True or False, got {self.resample_jitter!r}")
        if self.resample_jitter and self.resample_every is None:
            raise ValueError("resample_jitter=True has no effect without resample_every, the mean period: set that")
        if self.resample_scale is not None:
            if self.resample_every is None:
                raise ValueError(
                    f"resample_scale={self.resample_scale!r} has no effect without resample_every: set "
                    "resample_every to the number of gradient steps between momentum refreshes"
                )
            check_values("resample_scale", self.resample_scale, (), positive=False)
        super().__post_init__()
        if self.changes_target():
            warnings.warn(
                f"resample_scale={self.resample_scale} differs from temperature={self.temperature}: the chain "
                f"samples at an effective temperature between the two, nearer to {self.resample_scale} the smaller "
                "friction x time between refreshes is. Leave resample_scale out to sample at the temperature",
                UserWarning,
                stacklevel=4,
            )

    def _check_adapted(self) -> None:
        if self.mass not in ADAPTED_MASSES:
            names = " or ".join(map(repr, ADAPTED_MASSES))
            raise ValueError(f"mass must be a number, a dict by site name, {names}, got {self.mass!r}")
        if any(_values(self.gradient_noise_variance).values()):
            raise ValueError(
                f"gradient_noise_variance={self.gradient_noise_variance!r} together with mass={self.mass!r}, under "
                "which nobody knows how much can be subtracted: give masses, or leave gradient_noise_variance out"
            )

    @property
    def given_mass(self) -> BySite:
        """The masses, 1 where they are estimated: `friction` is then per unit of mass."""
        return 1.0 if isinstance(self.mass, str) else self.mass

    def frozen(self) -> tuple[str, str] | None:
        """The argument by which something is estimated in the warm-up alone, and what to set instead; or None."""
        return (f"mass={self.mass!r}", "mass to a number") if isinstance(self.mass, str) else None

    def refresh_is_due(self, step: Any) -> Any:
        """Whether the momentum is redrawn before a gradient step."""
        assert self.resample_every is not None
        if not self.resample_jitter:
            return step % self.resample_every == 0
        return scrambled(step) <= np.uint32(_LARGEST // self.resample_every)

    def resample_scale_at(self, step: Any) -> Any:
        """Variance of a redrawn momentum over the mass, at a gradient step."""
        return self.temperature_at(step) if self.resample_scale is None else value_at(self.resample_scale, step)

    def changes_target(self) -> bool:
        """Whether the momentum refresh is known to act at another temperature than the rest of the step."""
        scale = self.resample_scale
        if scale is None or callable(scale) or callable(self.temperature):
            return False
        return not math.isclose(scale, self.temperature)  # beta / alpha of the norm-adjusting notes rounds

    def check_sites(self, sites: Iterable[str] | None) -> None:
        """Check the dicts by site against the latent sites; None where positions have no site names."""
        super().check_sites(sites)
        _check_sites("mass", self.given_mass, sites)

    def check_schedules(self, num_draws: int) -> None:
        """Try the callables on a grid of the gradient steps of `num_draws` draws."""
        super().check_schedules(num_draws)
        if self.resample_scale is not None:
            steps = trial_steps(self.gradient_steps(num_draws))
            check_values("resample_scale", self.resample_scale, steps, positive=False)

    def check_numbers(self, steps: Iterable[int]) -> None:
        """Check what depends on several arguments, at some gradient steps."""
        variance = INTEGRATORS[self.integrator].noise_variance
        masses, noises = _values(self.given_mass), _values(self.gradient_noise_variance)
        sites = {*masses, *noises} - ({None} if len({*masses, *noises}) > 1 else set())
        for step in steps:
            step_size = float(value_at(self.step_size, step))
            temperature = float(self.temperature_at(step))
            for site in sites:
                mass = masses.get(site, masses.get(None))
                noise = noises.get(site, noises.get(None))
                if mass is None or noise is None:  # a site that one dict lacks: check_sites names it
                    continue
                friction_per_step = step_size * self.friction / mass
                if self.integrator == "symplectic_euler" and step_size > 0 and not 0 < friction_per_step < 2:
                    where = "" if site is None else f" at site {site!r}"
                    raise ValueError(
                        f"integrator='symplectic_euler' needs a = step_size * friction / mass in (0, 2), got "
                        f"{friction_per_step:.4g}{where} at gradient step {step}: lower step_size or friction, or "
                        "use integrator='baoab', which has no such limit"
                    )
                arguments = (step_size, self.friction, mass, temperature)
                if noise > 0 and variance(*arguments, noise) < 0:
                    heat = variance(*arguments, 0.0)
                    self._raise_compensation(step, site, noise, heat / (heat - variance(*arguments, 1.0)))


def learning_rate_arguments(
    learning_rate: float, momentum: float, num_data: int, mass: float | str, integrator: str
) -> dict[str, Any]:
    """Step size and friction at which SGHMC with T = 0 is SGD with this learning rate and momentum.

    For ``"baoab"``, c = momentum, h = sqrt(2 l M / (N (1 + c))) and C = -M ln c / h; for ``"symplectic_euler"``,
    a = 1 - momentum, h = sqrt(l M / N) and C = a M / h. The learning rate l is that of the mean loss U / N. Masses that
    are adapted count as 1, since `friction` is then per unit of mass: l is divided by the mass of a coordinate.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    check_choice("integrator", integrator, INTEGRATORS)
    m: Any = 1.0 if mass in tuple(ADAPTED_MASSES) else mass
    for name, value in (("learning_rate", learning_rate), ("mass", m), ("momentum", momentum)):
        if not isinstance(value, numbers.Real):
            raise ValueError(
                f"{name} must be a number here, got {value!r}: for schedules and for values by site, give step_size, "
                "friction and mass to SGHMC itself"
            )
    check_values("learning_rate", learning_rate, (), positive=True)
    check_values("mass", m, (), positive=True)
    check_count("num_data", num_data)
    low_ok = momentum > 0 if integrator == "baoab" else momentum >= 0
    if not (low_ok and momentum < 1):
        interval = "(0, 1)" if integrator == "baoab" else "[0, 1)"
        raise ValueError(f"momentum must be in {interval} for integrator={integrator!r}, got {momentum!r}")
    if integrator == "baoab":
        step_size = math.sqrt(2.0 * learning_rate * m / (num_data * (1.0 + momentum)))
        return {"step_size": step_size, "friction": -m * math.log(momentum) / step_size}
    step_size = math.sqrt(learning_rate * m / num_data)
    return {"step_size": step_size, "friction": (1.0 - momentum) * m / step_size}


def norm_adjusting_arguments(
    boost: float, adjust: float, momentum_scale: float, mass: BySite | str, friction: float
) -> dict[str, Any]:
    """Mass, friction and resample_scale of the norm-adjusting notes: alpha M, gamma C and beta / alpha."""
    for name, value in (("boost", boost), ("adjust", adjust)):
        check_values(name, value, (), positive=True)
    check_values("momentum_scale", momentum_scale, (), positive=False)
    if isinstance(mass, str):
        raise ValueError(f"mass must be a number or a dict by site name here, for boost multiplies it, got {mass!r}")
    _check_by_site("mass", mass, positive=True)
    check_values("friction", friction, (), positive=True)
    boosted = {site: boost * m for site, m in mass.items()} if isinstance(mass, Mapping) else boost * mass
    return {"mass": boosted, "friction": adjust * friction, "resample_scale": momentum_scale / boost}
