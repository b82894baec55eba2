"""One step of each dynamics against `tests.laws`, and what the settings and schedules refuse."""

import math
from types import MappingProxyType

import numpy as np
import pytest

from bnn_ppl import updates
from bnn_ppl.layout import Plate, check_target, resolve_batch_size
from bnn_ppl.schedules import check_values, trial_steps, value_at
from bnn_ppl.settings import (
    INTEGRATORS,
    SGHMCSettings,
    SGLDSettings,
    learning_rate_arguments,
    norm_adjusting_arguments,
)
from tests.laws import UNDERDAMPED, sgld

RNG = np.random.default_rng(0)
POINTS = [dict(zip("hkMCTV", values, strict=True)) for values in RNG.uniform(0.1, 0.9, (10, 6))]


def covariance(scale_of_noise):
    return np.outer(scale_of_noise, scale_of_noise)


@pytest.mark.parametrize("point", POINTS)
def test_sgld_step(point):
    h, k, T, V = (point[name] for name in "hkTV")
    variance = updates.sgld_noise_variance(h, T, V * T)
    numbers = {"step_size": h, "noise_scale": math.sqrt(variance)}
    law = sgld(h, k, T=T, V=V * T)
    assert updates.sgld(1.0, k, 0.0, **numbers) == pytest.approx(law.A[0, 0], rel=1e-14)
    assert updates.sgld(0.0, 1.0, 0.0, **numbers) == pytest.approx(law.b[0, 0], rel=1e-14)
    assert updates.sgld(0.0, 0.0, 1.0, **numbers) ** 2 == pytest.approx(law.Q[0, 0], rel=1e-13)


@pytest.mark.parametrize("kick", [1.0, 0.5])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_underdamped_step(integrator, point, kick):
    """The step is affine: what it does to unit vectors is its law."""
    h, k, M, C, T, V = (point[name] for name in "hkMCTV")
    V = V * C * T / h  # so that the compensation asks for less noise than there is
    move, coefficients, noise_variance = INTEGRATORS[integrator]
    numbers = coefficients(h, C, M, T, V, kick)
    columns = [move(*x, k * x[0], 0.0, numbers) for x in ((1.0, 0.0), (0.0, 1.0))]
    law = UNDERDAMPED[integrator](h, k, M=M, C=C, T=T, V=V, kick=kick)
    np.testing.assert_allclose(np.transpose(columns), law.A, rtol=1e-13)
    np.testing.assert_allclose(move(0.0, 0.0, 1.0, 0.0, numbers), law.b[:, 0], rtol=1e-13)
    np.testing.assert_allclose(covariance(move(0.0, 0.0, 0.0, 1.0, numbers)), law.Q, rtol=1e-12)
    if kick == 1:
        assert numbers.noise_scale**2 == pytest.approx(noise_variance(h, C, M, T, V), rel=1e-14)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_coefficients_by_coordinate(integrator):
    coefficients = INTEGRATORS[integrator][1]
    mass, noise = np.array([0.5, 1.0, 3.0]), np.array([0.0, 0.1, 0.2])
    together = coefficients(0.2, 0.7, mass, 0.5, noise, 0.5)
    for i in range(3):
        one = coefficients(0.2, 0.7, mass[i], 0.5, noise[i], 0.5)
        for a, b in zip(together, one, strict=True):
            assert np.broadcast_to(a, 3)[i] == pytest.approx(b, rel=1e-14)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_small_friction_keeps_its_digits(integrator):
    """1 - c^2 must not come from a difference of numbers near 1."""
    variance = INTEGRATORS[integrator][2](1e-6, 1e-6, 1.0, 1.0, 0.0)
    assert variance == pytest.approx(2e-12, rel=1e-9)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize(("learning_rate", "momentum", "mass"), [(0.1, 0.9, 1.0), (0.02, 0.5, 3.0), (0.3, 0.98, 0.2)])
def test_zero_temperature_is_momentum_sgd(integrator, learning_rate, momentum, mass):
    num_data = 40
    gradient = lambda x: num_data * (np.sin(x) + x**3)  # noqa: E731
    converted = learning_rate_arguments(learning_rate, momentum, num_data, mass, integrator)
    move, coefficients, _ = INTEGRATORS[integrator]
    numbers = coefficients(converted["step_size"], converted["friction"], mass, 0.0, 0.0)
    assert numbers.noise_scale == 0
    x = sgd = RNG.uniform(-0.5, 0.5, 7)
    r = velocity = np.zeros(7)
    for _ in range(20):
        x, r = move(x, r, gradient(x), RNG.standard_normal(7), numbers)
        velocity = momentum * velocity - learning_rate * gradient(sgd) / num_data
        sgd = sgd + velocity
        np.testing.assert_allclose(x, sgd, rtol=1e-10)


def test_momentum_zero_is_plain_sgd():
    converted = learning_rate_arguments(0.1, 0.0, 40, 2.0, "symplectic_euler")
    numbers = updates.symplectic_euler_coefficients(converted["step_size"], converted["friction"], 2.0, 0.0, 0.0)
    x, _ = updates.symplectic_euler(1.0, 5.0, 3.0, 1.0, numbers)
    assert x == pytest.approx(1 - 0.1 / 40 * 3, rel=1e-14)


@pytest.mark.parametrize("change", [{"learning_rate": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"num_data": 0}])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_learning_rate_arguments_are_checked(integrator, change):
    good = {"learning_rate": 0.1, "momentum": 0.9, "num_data": 10, "mass": 1.0}
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be .*{next(iter(change.values()))}"):
        learning_rate_arguments(**(good | change), integrator=integrator)


def test_no_momentum_and_baoab_is_refused():
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\) for integrator='baoab', got 0"):
        learning_rate_arguments(0.1, 0.0, 10, 1.0, "baoab")


def test_norm_adjusting_arguments():
    assert norm_adjusting_arguments(3.0, 0.5, 0.6, 2.0, 4.0) == pytest.approx(
        {"mass": 6.0, "friction": 2.0, "resample_scale": 0.2}
    )
    by_site = norm_adjusting_arguments(3.0, 0.5, 0.6, {"a": 1.0, "b": 2.0}, 4.0)
    assert by_site["mass"] == {"a": 3.0, "b": 6.0}


@pytest.mark.parametrize("name", ["boost", "adjust", "momentum_scale"])
def test_norm_adjusting_arguments_are_checked(name):
    good = {"boost": 3.0, "adjust": 0.5, "momentum_scale": 0.6}
    with pytest.raises(ValueError, match=f"{name} must be finite .*got -1"):
        norm_adjusting_arguments(**(good | {name: -1.0}), mass=1.0, friction=1.0)


def test_norm_adjusting_at_its_own_temperature_does_not_warn():
    """0.3 / 3 is not 0.1 in binary, but the same temperature."""
    arguments = norm_adjusting_arguments(3.0, 1.0, 0.3, 1.0, 1.0)
    settings = SGHMCSettings(step_size=0.1, temperature=0.1, resample_every=5, **arguments)
    assert not settings.changes_target()


BAD = {  # argument, value, what the message says besides
    "step_size zero": ({"step_size": 0.0}, "step_size must be finite and greater than 0, got 0.0"),
    "step_size negative": ({"step_size": -0.1}, "step_size must be finite and greater than 0, got -0.1"),
    "step_size nan": ({"step_size": math.nan}, "step_size must be finite and greater than 0, got nan"),
    "step_size infinite": ({"step_size": math.inf}, "step_size must be finite and greater than 0, got inf"),
    "step_size none": ({"step_size": None}, "step_size must be a number or a callable of the step, got None"),
    "step_size text": ({"step_size": "a"}, "step_size must be a number or a callable of the step, got 'a'"),
    "temperature negative": ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
    "temperature nan": ({"temperature": math.nan}, "temperature must be finite and at least 0, got nan"),
    "V negative": ({"gradient_noise_variance": -1.0}, "gradient_noise_variance must be finite and at least 0, got"),
    "V text": ({"gradient_noise_variance": "a"}, "gradient_noise_variance must be a number, got 'a'"),
    "V of a site": (
        {"gradient_noise_variance": {"w": -1.0}},
        r"gradient_noise_variance\['w'\] must be finite and at least 0, got -1.0",
    ),
    "V too large": (
        {"gradient_noise_variance": 1e6},
        "gradient_noise_variance=1000000.0 asks to subtract .*at most .*: use a smaller step_size, a larger batch",
    ),
    "V too large at a site": (
        {"gradient_noise_variance": {"w": 1e6}},
        "gradient_noise_variance=1000000.0 at site 'w' asks to subtract",
    ),
    "V without heat": ({"gradient_noise_variance": 1.0, "temperature": 0.0}, "asks to subtract .* at most 0"),
    "steps_per_draw zero": ({"steps_per_draw": 0}, "steps_per_draw must be an integer of at least 1, got 0"),
    "steps_per_draw float": ({"steps_per_draw": 2.0}, "steps_per_draw must be an integer of at least 1, got 2.0"),
    "steps_per_draw bool": ({"steps_per_draw": True}, "steps_per_draw must be an integer of at least 1, got True"),
    "subsampling": ({"subsampling": "x"}, "subsampling must be one of 'epoch', 'without_replacement', 'with_rep.*'x'"),
    "batch_size zero": ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    "batch_size of a plate": ({"batch_size": {"p": -3}}, r"batch_size\['p'\] must be an integer .* got -3"),
}
BAD_SGHMC = {
    "integrator": ({"integrator": "euler"}, "integrator must be one of 'baoab', 'symplectic_euler', got 'euler'"),
    "friction zero": ({"friction": 0.0}, "friction must be finite and greater than 0, got 0.0"),
    "friction none": ({"friction": None}, "friction must be a number, got None"),
    "friction by site": ({"friction": {"w": 1.0}}, "friction must be a number, got {'w': 1.0}"),
    "mass zero": ({"mass": 0.0}, "mass must be finite and greater than 0, got 0.0"),
    "mass of a site": ({"mass": {"w": -2.0}}, r"mass\['w'\] must be finite and greater than 0, got -2.0"),
    "mass callable": ({"mass": lambda step: 1.0}, "mass must be a number, got"),
    "resample_every zero": ({"resample_every": 0}, "resample_every must be an integer of at least 1, got 0"),
    "resample_scale alone": (
        {"resample_scale": 1.0},
        "resample_scale=1.0 has no effect without resample_every: set resample_every",
    ),
    "resample_scale negative": (
        {"resample_scale": -1.0, "resample_every": 3},
        "resample_scale must be finite and at least 0, got -1.0",
    ),
    "unstable friction": (
        {"integrator": "symplectic_euler", "friction": 20.0},
        r"a = step_size \* friction / mass in \(0, 2\), got 2 .*lower step_size or friction, or use integrator='baoab'",
    ),
    "unstable friction at a site": (
        {"integrator": "symplectic_euler", "friction": 20.0, "mass": {"v": 9.0, "w": 0.1}},
        "got 20 at site 'w' at gradient step 0",
    ),
}


@pytest.mark.parametrize(("settings", "required"), [(SGLDSettings, {}), (SGHMCSettings, {"friction": 1.0})])
@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case, settings, required):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        settings(**({"step_size": 0.1} | required | change))


@pytest.mark.parametrize("case", BAD_SGHMC)
def test_bad_sghmc_settings(case):
    change, message = BAD_SGHMC[case]
    with pytest.raises(ValueError, match=message):
        SGHMCSettings(**({"step_size": 0.1, "friction": 1.0} | change))


@pytest.mark.parametrize("settings", [SGLDSettings, SGHMCSettings])
def test_good_settings(settings):
    numbers = [0.1, np.float32(0.1), np.float64(0.1)]
    for number in numbers:
        settings(step_size=number, temperature=number, gradient_noise_variance=np.float64(0.01))
    settings(step_size=0.1, temperature=0.0, steps_per_draw=np.int64(3), batch_size={"p": np.int32(4)})
    settings(step_size=lambda step: 0.1, temperature=lambda step: 0.0)


def test_the_largest_compensation_is_accepted():
    """Up to the limit that the message names, and no further."""
    most = {
        SGLDSettings: 2 * 0.5 / 0.1,
        "symplectic_euler": 2 * 0.7 * 0.5 / 0.1,
        "baoab": 1.3 * 0.5 * (1 - math.exp(-0.14 / 1.3)) / (1 + math.exp(-0.07 / 1.3)) ** 2 * 4 / 0.01,
    }
    for which, limit in most.items():
        sghmc = {} if which is SGLDSettings else {"integrator": which, "friction": 0.7, "mass": 1.3}
        make = SGHMCSettings if sghmc else SGLDSettings
        make(step_size=0.1, temperature=0.5, **sghmc, gradient_noise_variance=0.999 * limit)
        with pytest.raises(ValueError, match=f"at most {limit:.4g}"):
            make(step_size=0.1, temperature=0.5, **sghmc, gradient_noise_variance=1.001 * limit)


@pytest.mark.parametrize("name", ["gradient_noise_variance", "mass"])
def test_dicts_by_site_must_name_the_sites(name):
    settings = SGHMCSettings(step_size=0.1, **{name: MappingProxyType({"a": 0.1, "b": 0.2})})
    settings.check_sites(["b", "a"])
    with pytest.raises(ValueError, match=rf"{name} lacks the sites \['c'\]; the latent sites are \['a', 'b', 'c'\]"):
        settings.check_sites(["a", "b", "c"])
    with pytest.raises(ValueError, match=rf"{name} names \['b'\], no latent sites"):
        settings.check_sites(["a"])
    with pytest.raises(ValueError, match=f"{name}=.* goes by site name, but .*: give one number"):
        settings.check_sites(None)


def test_another_refresh_scale_is_told():
    with pytest.warns(UserWarning, match="resample_scale=0.5 differs from temperature=1.0: .*effective temperature"):
        SGHMCSettings(step_size=0.1, resample_every=2, resample_scale=0.5)
    SGHMCSettings(step_size=0.1, resample_every=2, resample_scale=0.5, temperature=0.5)


@pytest.mark.parametrize("name", ["step_size", "temperature", "resample_scale"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_schedules_are_tried_over_the_run(name, bad):
    arguments = {"step_size": 0.1, "resample_every": 3, "steps_per_draw": 5}
    settings = SGHMCSettings(**(arguments | {name: lambda step: bad if step >= 450 else 0.1}))
    settings.check_schedules(80)
    with pytest.raises(ValueError, match=f"{name} must return finite values that are at least 0, got {bad} at"):
        settings.check_schedules(100)


def test_schedules_and_compensation_together():
    """The heat falls below what the compensation takes away."""
    for make in (SGLDSettings, SGHMCSettings):
        settings = make(step_size=0.1, temperature=lambda step: 1 / (1 + step), gradient_noise_variance=0.5)
        settings.check_schedules(2)
        with pytest.raises(ValueError, match=r"asks to subtract .* at gradient step \d+"):
            settings.check_schedules(100)


def test_schedules_and_friction_together():
    settings = SGHMCSettings(
        step_size=lambda step: 0.1 * (1 + step), friction=1.0, integrator="symplectic_euler", steps_per_draw=10
    )
    settings.check_schedules(1)
    with pytest.raises(ValueError, match=r"integrator='symplectic_euler' needs .* at gradient step [12]\d"):
        settings.check_schedules(2)


def test_value_at():
    assert value_at(0.5, 7) == 0.5
    assert value_at(lambda step: 2 * step, 7) == 14


def test_check_values_lets_a_schedule_touch_zero():
    check_values("step_size", lambda step: 0.0, [0, 1], positive=True)
    with pytest.raises(ValueError, match="step_size must be finite and greater than 0, got 0"):
        check_values("step_size", 0.0, [0, 1], positive=True)


@pytest.mark.parametrize("total", [0, 1, 5, 63, 64, 1000, 123_457])
def test_trial_steps(total):
    steps = trial_steps(total)
    assert len(steps) <= 140
    assert steps[0] == 0
    assert steps[-1] == total
    assert max(np.diff(steps), default=0) <= max(total // 64, 1)


@pytest.mark.parametrize(
    ("model", "potential_fn", "message"),
    [
        (None, None, "exactly one of model and potential_fn, got neither"),
        (len, len, "exactly one of model and potential_fn, got both"),
        (3, None, "model must be callable, got 3"),
        (None, 3, "potential_fn must be callable, got 3"),
    ],
)
def test_check_target(model, potential_fn, message):
    with pytest.raises(ValueError, match=message):
        check_target(model, potential_fn, None)


PLATES = {
    "data": Plate("data", 10, 10, observes=True),
    "cut": Plate("cut", 10, 4, observes=True),
    "latents": Plate("latents", 5, 5, observes=True, holds_latents=True),
}


def test_resolve_batch_size():
    assert resolve_batch_size(PLATES, None) == {}
    assert resolve_batch_size(PLATES, 3) == {"data": 3}
    assert resolve_batch_size(PLATES, {"latents": 2, "data": 10}) == {"latents": 2, "data": 10}


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        ({"x": 3}, r"batch_size names 'x', but the model's plates are \['cut', 'data', 'latents'\]"),
        ({"cut": 3}, "batch_size=3 for plate 'cut', which has subsample_size=4 already: give one of the two"),
        ({"data": 11}, "batch_size=11 is larger than plate 'data' of 10 rows"),
        (11, "batch_size=11 is larger than plate 'data' of 10 rows"),
    ],
)
def test_bad_batch_sizes(batch_size, message):
    with pytest.raises(ValueError, match=message):
        resolve_batch_size(PLATES, batch_size)


def test_an_ambiguous_batch_size():
    two = PLATES | {"more": Plate("more", 7, 7, observes=True)}
    with pytest.raises(ValueError, match=r"batch_size=3 needs exactly one .* candidates \['data', 'more'\]: .*a dict"):
        resolve_batch_size(two, 3)
    with pytest.raises(ValueError, match=r"batch_size=3 needs exactly one .* found none: put the observations in"):
        resolve_batch_size({}, 3)
