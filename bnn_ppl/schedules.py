"""Hyperparameters that may change over the gradient steps.

A hyperparameter is a number, or a callable of the gradient step (counted from the start of warm-up) that
returns one. NumPyro kernels call it with a traced integer, so it must be written with ``jax.numpy`` there
(every optax schedule is); Pyro kernels call it with a Python integer. Those of this file serve both. With step k::

    Cyclical, CosineRestarts    floor + (peak - floor) / 2 (cos(pi (k mod L) / L) + 1)     [1]_ [2]_
    PolynomialDecay             a (b + k)^-gamma                                           [3]_
    LinearRamp                  start + (end - start) min(max((k - begin) / length, 0), 1) [4]_
    Triangular                  peak + (floor - peak) min(2 x, 2 - 2 x),  x = ((k - begin) mod L) / L [5]_

References
----------
.. [1] Zhang, Li, Zhang, Chen & Wilson (2020), Cyclical stochastic gradient MCMC for Bayesian deep learning.
.. [2] Loshchilov & Hutter (2017), SGDR: stochastic gradient descent with warm restarts.
.. [3] Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics.
.. [4] Wenzel et al. (2020), How good is the Bayes posterior in deep neural networks really?
.. [5] Garipov, Izmailov, Podoprikhin, Vetrov & Wilson (2018), Loss surfaces, mode connectivity, and fast ensembling of
   DNNs.
"""

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnn_ppl.namespaces import namespace

Schedule = Callable[[Any], Any]


def value_at(schedule: float | Schedule, step: Any) -> Any:
    """Value of a number or callable at a gradient step."""
    return schedule(step) if callable(schedule) else schedule


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_values(name: str, schedule: float | Schedule, steps: Iterable[int], *, positive: bool) -> None:
    """Check a hyperparameter on some gradient steps.

    Parameters
    ----------
    name
        The argument's name, for the message.
    schedule
        A number, or a callable of the step.
    steps
        Where a callable is tried.
    positive
        Whether a number must be above 0 rather than at least 0. A callable may touch 0, as a cosine does.

    Raises
    ------
    ValueError
        Where a value is not finite or too small; the message names the argument, the value and the step.
    """
    if not callable(schedule):
        try:
            if isinstance(schedule, str | bool):
                raise TypeError
            value = float(schedule)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a number or a callable of the step, got {schedule!r}") from None
        if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
            bound = "greater than 0" if positive else "at least 0"
            raise ValueError(f"{name} must be finite and {bound}, got {schedule!r}")
        return
    for step in steps:
        value = float(schedule(step))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{name} must return finite values that are at least 0, got {value!r} at gradient step {step}: "
                "change the schedule, or bound it there"
            )


def trial_steps(total: int) -> list[int]:
    """Up to about 70 steps of a run of `total` steps, the first few and evenly spread ones, to try a callable on."""
    stride = max(total // 64, 1)
    return sorted({*range(min(8, total + 1)), *range(0, total + 1, stride), total})


def scrambled(step: Any) -> Any:
    """A pseudo-random number below 2^32 for each gradient step, the same in both backends (Wellons' lowbias32)."""
    array = np.asarray([step], np.uint32) if isinstance(step, int) else step.astype(np.uint32)
    array = (array ^ (array >> 16)) * np.uint32(0x7FEB352D)
    array = (array ^ (array >> 15)) * np.uint32(0x846CA68B)
    array = array ^ (array >> 16)
    return int(array[0]) if isinstance(step, int) else array


def where(condition: Any, if_true: Any, if_false: Any) -> Any:
    """One of two numbers, by a Python bool or by an array's values."""
    if isinstance(condition, bool):
        return if_true if condition else if_false
    return namespace(condition).where(condition, if_true, if_false)


def _cosine(peak: float, floor: float, length: int, step: Any) -> Any:
    phase = math.pi * (step % length) / length
    return floor + 0.5 * (peak - floor) * (namespace(phase).cos(phase) + 1.0)


@dataclass(frozen=True)
class Cyclical:
    """Cosine step size in cycles that explore and then sample, as ``step_size=`` of SGLD and SGHMC.

    In the first part of each cycle the temperature is `explore_temperature`; in the rest it is the kernel's own, and
    there the draws fall: each draw of the host's MCMC is one from a sampling phase, the last of them at the end of the
    cycle. Draws of the host's warm-up count too: ``num_warmup=2 * draws_per_cycle`` leaves out two cycles.

    Parameters
    ----------
    peak
        Step size at the start of a cycle, above 0; at the end of the cycle it is nearly 0.
    cycle_length
        Gradient steps of a cycle.
    exploration
        Share of a cycle before the sampling phase, in [0, 1).
    draws_per_cycle
        Draws, evenly spread over the sampling phase; at most its gradient steps.
    explore_temperature
        Temperature before the sampling phase, at least 0; 0 is SGD.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    For SGLD this is cSGLD of [1]_ with ``peak = learning_rate / N``. For SGHMC the step h is cycled at fixed friction,
    so that the learning rate N h^2 / M falls faster, and the momentum's decay per step, exp(-h C / M), comes nearer
    to 1.
    What a phase of T = 0 has cooled takes steps to warm up: 1 / (h curvature) of them, or M / (h C) for momenta.

    Examples
    --------
    >>> kernel = SGLD(model, step_size=Cyclical(peak=1e-5, cycle_length=1000, draws_per_cycle=3))
    >>> mcmc = MCMC(kernel, num_warmup=3, num_samples=30)  # drops the first cycle, draws from ten
    """

    peak: float
    cycle_length: int
    exploration: float = 0.8
    draws_per_cycle: int = 1
    explore_temperature: float = 0.0

    def __post_init__(self) -> None:
        _check_fixed("peak", self.peak, positive=True)
        check_count("cycle_length", self.cycle_length)
        check_count("draws_per_cycle", self.draws_per_cycle)
        _check_fixed("explore_temperature", self.explore_temperature, positive=False)
        share = self.exploration
        if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 <= share < 1:
            raise ValueError(f"exploration must be a number in [0, 1), the share of a cycle, got {share!r}")
        if self.cycle_length < self.draws_per_cycle:
            raise ValueError(
                f"cycle_length={self.cycle_length} is shorter than its draws_per_cycle={self.draws_per_cycle}, which "
                "take a gradient step each at least: lengthen the cycle"
            )
        sampling = self.cycle_length - self.explores_until
        if self.draws_per_cycle > sampling:
            raise ValueError(
                f"draws_per_cycle={self.draws_per_cycle} is more than the sampling phase has gradient steps, "
                f"{sampling} with cycle_length={self.cycle_length} and exploration={self.exploration}: lengthen the "
                "cycle, or lower exploration or draws_per_cycle"
            )

    def __call__(self, step: Any) -> Any:
        """Step size at a gradient step."""
        return _cosine(self.peak, 0.0, self.cycle_length, step)

    @property
    def explores_until(self) -> int:
        """First gradient step of the sampling phase, counted in the cycle."""
        return min(math.ceil(self.exploration * self.cycle_length - 1e-9), self.cycle_length - 1)

    @property
    def draw_ends(self) -> tuple[int, ...]:
        """Gradient steps after which draws fall, counted in the cycle."""
        start, draws = self.explores_until, self.draws_per_cycle
        return tuple(start + (self.cycle_length - start) * (i + 1) // draws for i in range(draws))

    def steps_to_draw(self, step: Any) -> Any:
        """Gradient steps from `step`, the number taken so far, to the next draw."""
        now = step % self.cycle_length
        end = self.draw_ends[-1]
        for earlier in reversed(self.draw_ends[:-1]):
            end = where(now < earlier, earlier, end)
        return end - now

    def temperature(self, step: Any, sampling: Any) -> Any:
        """Temperature at a gradient step, where that of the sampling phase is `sampling`."""
        return where(step % self.cycle_length < self.explores_until, self.explore_temperature, sampling)


@dataclass(frozen=True)
class CosineRestarts:
    """Cosine from `peak` to `floor` over and over, for any hyperparameter.

    As ``resample_scale=`` of SGHMC: large scales explore, and small ones sample, at a temperature that they lower.

    Parameters
    ----------
    peak, floor
        Values at the start and towards the end of a cycle, at least 0.
    cycle_length
        Gradient steps of a cycle.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    peak: float
    cycle_length: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_fixed("peak", self.peak, positive=False)
        _check_fixed("floor", self.floor, positive=False)
        check_count("cycle_length", self.cycle_length)

    def __call__(self, step: Any) -> Any:
        """Value at a gradient step."""
        return _cosine(self.peak, self.floor, self.cycle_length, step)


@dataclass(frozen=True)
class PolynomialDecay:
    """Step sizes a (b + k)^-gamma; with gamma in (1/2, 1] they sum to infinity, and their squares do not.

    Parameters
    ----------
    a, b, gamma
        All above 0. The first value is a b^-gamma.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    a: float
    b: float
    gamma: float = 0.55

    def __post_init__(self) -> None:
        for name in ("a", "b", "gamma"):
            _check_fixed(name, getattr(self, name), positive=True)

    def __call__(self, step: Any) -> Any:
        """Value at a gradient step."""
        return self.a * (self.b + step) ** -self.gamma


@dataclass(frozen=True)
class LinearRamp:
    """Straight line from `start` to `end` over `length` gradient steps from `begin` on, and constant outside.

    As ``temperature=`` it warms a chain up slowly, from SGD to a sampler.

    Parameters
    ----------
    start, end
        Values before and after, at least 0.
    length
        Gradient steps of the ramp.
    begin
        Gradient step at which it begins.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    start: float
    end: float
    length: int
    begin: int = 0

    def __post_init__(self) -> None:
        _check_fixed("start", self.start, positive=False)
        _check_fixed("end", self.end, positive=False)
        check_count("length", self.length)
        _check_begin(self.begin)

    def __call__(self, step: Any) -> Any:
        """Value at a gradient step."""
        share = (step - self.begin) / self.length
        share = where(share < 0, 0.0, where(share > 1, 1.0, share))
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Triangular:
    """Straight lines from `peak` down to `floor` in the middle of a cycle, and up again, over and over.

    As the learning rate of `FGE`, with snapshots after the steps at `floor`: ``start = begin + cycle_length // 2 + 1``.

    Parameters
    ----------
    peak, floor
        Values at the ends and in the middle of a cycle, at least 0.
    cycle_length
        Gradient steps of a cycle, an even number.
    begin
        Gradient step at which the first cycle begins; before it the value is `peak`.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    peak: float
    floor: float
    cycle_length: int
    begin: int = 0

    def __post_init__(self) -> None:
        _check_fixed("peak", self.peak, positive=False)
        _check_fixed("floor", self.floor, positive=False)
        check_count("cycle_length", self.cycle_length)
        if self.cycle_length % 2:
            raise ValueError(f"cycle_length must be even, so that a cycle has a middle, got {self.cycle_length!r}")
        _check_begin(self.begin)

    def __call__(self, step: Any) -> Any:
        """Value at a gradient step."""
        share = ((step - self.begin) % self.cycle_length) / self.cycle_length
        share = where(step < self.begin, 0.0, where(share < 0.5, 2.0 * share, 2.0 - 2.0 * share))
        return self.peak + (self.floor - self.peak) * share


def _check_begin(begin: Any) -> None:
    if isinstance(begin, bool) or not isinstance(begin, numbers.Integral) or begin < 0:
        raise ValueError(f"begin must be an integer of at least 0, got {begin!r}")


def _check_fixed(name: str, value: Any, *, positive: bool) -> None:
    if callable(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    check_values(name, value, (), positive=positive)
