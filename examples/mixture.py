"""How many of 25 modes do samplers find, and how wide are the modes in their draws? SGLD, and three that explore.

    python examples/mixture.py
    python examples/mixture.py --backend pyro

The mixture, the gradient noise N(0, I), SGLD's steps and cSGLD's cycles are those of Zhang et al. (2020). Their rule
keeps all draws but the first 50 of each cycle, those at large steps too, which are too wide; the draws at the end of
each cycle, where the step is small, are kept apart. A mode counts as found with more than 100 kept draws within 0.25.

The 24 chains are copies of the target within one chain, each with noise of its own. The noise comes from the data: a
plate of rows whose gradients sum to 0, of which a minibatch holds one.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from bnn_ppl.models.densities import gaussian_grid
from bnn_ppl.schedules import CosineRestarts, Cyclical, where

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
parser.add_argument("--cycles", type=int, default=30)
parser.add_argument("--cycle-length", type=int, default=1667)
parser.add_argument("--chains", type=int, default=24)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that it runs")
parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figure")
options = parser.parse_args()
if options.smoke:
    options.cycles, options.cycle_length, options.chains = 2, 200, 4

GRID = gaussian_grid(variance=0.03)
LENGTH = options.cycle_length
EXPLORES = 50  # steps of a cycle that the published rule leaves out
ROWS = 10_000
ENOUGH, NEAR = (1, 1.0) if options.smoke else (100, 0.25)


def decaying(step):
    """SGLD's step size: 0.043, and after 500 steps 0.043 (k - 500)^-0.55."""
    return 0.043 * where(step > 500, step - 500, 1) ** -0.55


def cyclical(peak):
    """Every draw of a cycle but the first 50, at temperature 1 throughout."""
    return Cyclical(peak, LENGTH, EXPLORES / LENGTH, draws_per_cycle=LENGTH - EXPLORES, explore_temperature=1.0)


SAMPLERS = {
    "SGLD": ("SGLD", {"step_size": decaying}),
    "cSGLD": ("SGLD", {"step_size": cyclical(0.07)}),
    "cSGHMC": ("SGHMC", {"step_size": cyclical(0.36), "friction": 3.0}),
    "SGHMC, cyclic scale": (
        "SGHMC",
        {
            "step_size": 0.05,
            "friction": 1.0,
            "resample_every": 20,
            "resample_jitter": True,
            "resample_scale": CosineRestarts(20.0, LENGTH, floor=1.0),
        },
    ),
}


def numpyro_draws(kernel, settings, rows, start, num_draws):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax import random
    from numpyro.infer import MCMC

    import bnn_ppl.numpyro

    def model(rows):
        x = numpyro.sample("x", dist.Normal(0.0, 100.0).expand(start.shape).to_event(2))  # flat as far as matters
        numpyro.factor("grid", -GRID.energy(x).sum())
        with numpyro.plate("rows", len(rows), subsample_size=1) as i:
            numpyro.factor("noise", (rows[i] * x).sum((-1, -2)))

    mcmc = MCMC(
        getattr(bnn_ppl.numpyro, kernel)(model, **settings), num_warmup=0, num_samples=num_draws, progress_bar=False
    )
    mcmc.run(random.key(options.seed), jnp.asarray(rows), init_params={"x": jnp.asarray(start)})
    return np.asarray(mcmc.get_samples()["x"])


def pyro_draws(kernel, settings, rows, start, num_draws):
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import MCMC

    import bnn_ppl.pyro

    def model(rows):
        x = pyro.sample("x", dist.Normal(0.0, 100.0).expand(start.shape).to_event(2))  # flat as far as matters
        pyro.factor("grid", -GRID.energy(x).sum())
        with pyro.plate("rows", len(rows), subsample_size=1) as i:
            pyro.factor("noise", (rows[i] * x).sum((-1, -2)))

    pyro.set_rng_seed(options.seed)
    kernel = getattr(bnn_ppl.pyro, kernel)(model, **settings, jit_compile=not options.smoke)
    begin = {"x": torch.tensor(start)}
    mcmc = MCMC(kernel, num_samples=num_draws, warmup_steps=0, initial_params=begin, disable_progbar=True)
    mcmc.run(torch.tensor(rows))
    return mcmc.get_samples()["x"].numpy()


def sample(kernel, settings):
    """Draws after the first 50 steps of each cycle, shape (cycle, draw, chain, 2)."""
    rng = np.random.default_rng(options.seed)
    rows = rng.normal(size=(ROWS, options.chains, 2))
    rows = ((rows - rows.mean(0)) / rows.std(0) / ROWS).astype("float32")  # the minibatch gradient is N times a row's
    start = rng.uniform(-10, 10, size=(options.chains, 2)).astype("float32")
    settings = settings | {"gradient_noise_variance": 1.0, "subsampling": "with_replacement"}
    cyclic = isinstance(settings["step_size"], Cyclical)
    each = LENGTH - EXPLORES if cyclic else LENGTH
    run = {"numpyro": numpyro_draws, "pyro": pyro_draws}[options.backend]
    draws = run(kernel, settings, rows, start, options.cycles * each)
    return draws.reshape(options.cycles, each, options.chains, 2)[:, each - (LENGTH - EXPLORES) :]


def offsets(x):
    """Number of the nearest mode of each point (..., 2), and the offset from it."""
    nearest = np.clip(np.round(x / 2), -2, 2)
    return (5 * (nearest[..., 0] + 2) + nearest[..., 1] + 2).astype(int), x - 2 * nearest


def found_modes(x):
    """Modes with more than 100 points of (points, 2) within 0.25."""
    mode, offset = offsets(x)
    close = mode[(offset**2).sum(-1) < NEAR**2]
    return int((np.bincount(close, minlength=25) > ENOUGH).sum())


def print_row(name, kept, x, seconds):
    """Scores of draws (draw, chain, 2)."""
    by_chain = [found_modes(x[:, chain]) for chain in range(options.chains)]
    pooled = [found_modes(x[:, i : i + 4].reshape(-1, 2)) for i in range(0, options.chains, 4)]
    error = np.std(by_chain, ddof=1) / len(by_chain) ** 0.5
    variance = (offsets(x)[1] ** 2).mean()
    print(
        f"| {name} | {kept} | {np.mean(by_chain):.1f} ± {error:.1f} | {np.mean(pooled):.1f} | {variance:.4f} | "
        f"{seconds:.0f} |",
        flush=True,
    )


print(
    f"{options.chains} chains of {options.cycles * LENGTH} steps with {options.backend}; modes have the variance 0.03\n"
)
print("| sampler | kept | modes of 25, one chain | four chains | variance about the nearest mode | seconds |")
print("| --- | --- | --- | --- | --- | --- |")
figure, axes = plt.subplots(2, len(SAMPLERS), figsize=(14, 7.4), sharex=True, sharey=True, layout="constrained")
for column, (name, (kernel, settings)) in zip(axes.T, SAMPLERS.items(), strict=True):
    begin = time.perf_counter()
    draws = sample(kernel, settings)
    seconds = time.perf_counter() - begin
    end = draws[:, -LENGTH // 5 :]
    if name == "SGLD":  # which has no cycles: the last fifth of the run
        end = draws[-max(options.cycles // 5, 1) :]
    for panel, kept, x in ((column[0], "all but the first 50 of a cycle", draws), (column[1], "the last fifth", end)):
        x = x.reshape(-1, options.chains, 2)
        print_row(name, kept, x, seconds)
        shown = x[:: max(len(x) // 3000, 1), :4].reshape(-1, 2)
        panel.plot(*GRID.modes.T, "o", ms=13, mfc="none", mec="0.6", label="modes")
        panel.plot(*shown.T, ".", ms=2, color="C0", label="draws of 4 chains")
        panel.set(title=f"{name}\n{kept}", xlim=(-6, 6), ylim=(-6, 6), aspect="equal", xlabel="x1", ylabel="x2")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
options.out.mkdir(exist_ok=True)
path = options.out / f"mixture_{options.backend}.png"
figure.savefig(path, dpi=110)
print(f"wrote {path}")
