"""What boost, adjust and scale of the norm-adjusting notes do to the draws, on targets whose density is known.

    python examples/targets.py
    python examples/targets.py --backend pyro

SGHMC of mass alpha M and friction gamma C, whose momentum is redrawn from N(0, beta M), samples the target at
temperature T only where beta = alpha T. Elsewhere it is at a temperature between T and beta / alpha, which for a
Gaussian is known: the table has it beside the measured one, and out/targets_*.png the draws beside the densities.
The last figure takes the scale from beta = 5 to 1, or 0, on a cosine again and again.
"""

import argparse
import math
import warnings
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.linalg import expm

import bnn_ppl
from bnn_ppl.diagnostics import hidden_temperature
from bnn_ppl.models import densities
from bnn_ppl.schedules import CosineRestarts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
parser.add_argument("--copies", type=int, default=1000, help="independent copies of each target in the one chain")
parser.add_argument("--draws", type=int, default=128, help="draws that count, each just before a momentum refresh")
parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that it runs")
parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figures")
options = parser.parse_args()
if options.smoke:
    options.copies, options.draws = 100, 16

TARGETS = {
    "gaussian": densities.gaussian(),
    "double_well": densities.double_well(height=2.0),
    "banana": densities.banana(curvature=0.5),
}
STEPS = 20  # from one refresh to the next at alpha = 1, a time of 1
CYCLE = 16  # refreshes of a cycle of the last question
RANGES = {
    "boost": [0.001, 0.1, 0.5, 1.0, 2.0, 5.0],  # alpha
    "adjust": [0.001, 0.1, 0.5, 1.0],  # gamma
    "momentum_scale": [0.001, 0.1, 1.0, 2.0],  # beta
}
PLAIN = {"boost": 1.0, "adjust": 1.0, "momentum_scale": 1.0, "schedule": None}
SCHEDULES = {
    "beta = 1": None,
    "beta from 5 to 1": CosineRestarts(5.0, CYCLE * STEPS, floor=1.0),
    "beta from 5 to 0": CosineRestarts(5.0, CYCLE * STEPS),
}


def energy(z):
    return sum(target.energy(z[name]).sum() for name, target in TARGETS.items())


def numpyro_run(start, draws, **settings):
    import jax.numpy as jnp
    from jax import random
    from numpyro.infer import MCMC

    from bnn_ppl.numpyro import SGHMC

    mcmc = MCMC(SGHMC(potential_fn=energy, **settings), num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(random.key(0), init_params={name: jnp.asarray(x) for name, x in start.items()})
    return mcmc


def pyro_run(start, draws, **settings):
    import pyro
    import torch
    from pyro.infer import MCMC

    from bnn_ppl.pyro import SGHMC

    pyro.set_rng_seed(0)
    start = {name: torch.tensor(x) for name, x in start.items()}
    kernel = SGHMC(potential_fn=energy, **settings)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws, initial_params=start, disable_progbar=True)
    mcmc.run()
    return mcmc


@cache
def sample(boost, adjust, momentum_scale, schedule):
    """Draws of all targets, shapes (draws, copies, dim), and the law's variance of the Gaussian at each draw."""
    step_size = math.sqrt(boost) / STEPS  # the same share of a period for each mass
    every = round(1 / step_size)
    scale = momentum_scale / boost if schedule is None else schedule
    rng = np.random.default_rng(0)
    start = {n: rng.choice([-1.0, 1.0], (options.copies, t.dim)).astype("float32") for n, t in TARGETS.items()}
    run = {"numpyro": numpyro_run, "pyro": pyro_run}[options.backend]
    physics = {"mass": boost, "friction": adjust, "resample_every": every, "resample_scale": scale}
    tree = bnn_ppl.to_arviz(run(start, options.draws, step_size=step_size, steps_per_draw=every, **physics))
    draws = {name: tree["posterior"][name].values[0] for name in TARGETS}

    # Each refresh takes the variance towards the hidden temperature of its scale; the starting values have 1.
    motion = every * step_size * np.array([[0, 1 / boost], [-1, -adjust / boost]])
    kept, variance, law = expm(motion)[0, 0] ** 2, 1.0, []
    for refresh in range(2 * options.draws):  # warm-up included
        hidden = hidden_temperature(
            curvature=1.0,
            interval=every * step_size,
            friction=adjust,
            mass=boost,
            resample_scale=scale(refresh * every) if callable(scale) else scale,
        )
        variance = kept * variance + (1 - kept) * hidden
        law.append(variance)
    return draws, np.array(law[options.draws :])


def plot(question, columns):
    """A row of panels for each target, a column for each value."""
    figure, axes = plt.subplots(
        len(TARGETS), len(columns), figsize=(2.6 * len(columns), 7), sharex="row", sharey="row", layout="constrained"
    )
    line = np.linspace(-3.2, 3.2, 321)
    x1, x2 = np.meshgrid(line, np.linspace(-2, 7, 300))
    for column, (title, draws) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize="medium")
        for panel, (name, target) in zip(column, TARGETS.items(), strict=True):
            x = draws[name].reshape(-1, target.dim)
            if target.dim == 1:
                panel.hist(x[:, 0], bins=line[::4], density=True, color="C0", alpha=0.6)
                panel.plot(line, np.exp(target.log_density(line[:, None])), "k", lw=1)
                panel.set(ylim=(0, 1.6), xlabel="x")
            else:
                shown = x[:: max(len(x) // 3000, 1)]
                panel.plot(shown[:, 0], shown[:, 1], ".", ms=1.5, alpha=0.3)
                density = np.exp(target.log_density(np.stack([x1, x2], axis=-1)))
                panel.contour(
                    x1, x2, density, levels=density.max() * np.array([0.02, 0.2, 0.6]), colors="k", linewidths=1
                )
                panel.set(xlim=(-3.2, 3.2), ylim=(-2, 7), xlabel="x1")
    for panel, name in zip(axes[:, 0], TARGETS, strict=True):
        panel.set_ylabel(f"{name.replace('_', ' ')}: {'density' if TARGETS[name].dim == 1 else 'x2'}")
    figure.suptitle(f"{question}: draws (blue) and the target at T = 1 (black)")
    path = options.out / f"targets_{question}_{options.backend}.png"
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    return path


warnings.filterwarnings("ignore", message="resample_scale=")
options.out.mkdir(exist_ok=True)
print("variances, and the law's for the Gaussian; at the temperature they are those of the first row\n")
print("| varied | value | Gaussian | its law | double well | banana x1 | banana x2 |")
print("| --- | --- | --- | --- | --- | --- | --- |")


def print_row(varied, value, variances, law):
    numbers = [variances[0], law, *variances[1:]]
    print(f"| {varied} | {value} | " + " | ".join(f"{x:.4g}" for x in numbers) + " |", flush=True)


def variances_of(draws):
    return [x for name, target in TARGETS.items() for x in draws[name].reshape(-1, target.dim).var(axis=0)]


print_row("exact", "T = 1", [x for target in TARGETS.values() for x in target.variance], 1.0)
figures = []
for question, values in RANGES.items():
    columns = {}
    for value in values[:: 3 if options.smoke else 1]:
        draws, law = sample(**PLAIN | {question: value})
        print_row(question, value, variances_of(draws), law.mean())
        columns[f"{question} = {value:g}"] = draws
    figures.append(plot(question, columns))
columns = {}
for label, schedule in SCHEDULES.items():
    draws, law = sample(**PLAIN | {"schedule": schedule})
    print_row("schedule", label, variances_of(draws), law.mean())
    columns[label] = draws
    if schedule is not None:  # draws after a refresh at the temperature, nearly
        scale = np.array([schedule(refresh * STEPS) for refresh in range(options.draws, 2 * options.draws)])
        near = abs(scale - 1) < 0.25
        last = {name: x[near] for name, x in draws.items()}
        columns[f"{label},\nonly at {scale[near].min():.2f} to {scale[near].max():.2f}"] = last
        print_row("schedule", f"{label}, only near 1", variances_of(last), law[near].mean())
figures.append(plot("schedule", columns))
print(f"wrote {', '.join(map(str, figures))}")
