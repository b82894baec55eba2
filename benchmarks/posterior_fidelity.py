"""How near stochastic-gradient kernels come to the posterior: predictions beside those of a long NUTS run.

    python benchmarks/posterior_fidelity.py --data FOLDER [--dataset bostonHousing]

The task is a network of 50 units with learned noise on the first split of a UCI set. On each test row the network's
output has a mean and a standard deviation over the draws; the table has the distance of the means in standard
deviations of NUTS, and the ratio of the standard deviations, as medians over the rows. Gradients are counted in passes
over the data, leapfrog steps for NUTS. The draws of NUTS on the test rows are kept in out/, and read there next time.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpyro
from jax import random
from numpyro.infer import MCMC, NUTS

from bnn_ppl.diagnostics import function_diagnostics
from bnn_ppl.models.numpyro import mlp_regression
from bnn_ppl.numpyro import SGHMC, SGLD, predict

numpyro.set_host_device_count(2)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="folder with uci/")
parser.add_argument("--dataset", default="bostonHousing")
parser.add_argument("--activation", default="tanh")
parser.add_argument("--nuts-warmup", type=int, default=1000)
parser.add_argument("--nuts-draws", type=int, default=2000)
parser.add_argument("--passes", type=float, default=1e5, help="passes over the data of each chain, after the warm-up")
parser.add_argument("--chains", type=int, default=4)
parser.add_argument("--only", nargs="*", help="rows of the table, by the beginnings of their names")
DRAWS = 1000


def task(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardised training inputs and targets, and test inputs."""
    table = np.loadtxt(folder / "data.txt")
    columns, target = (np.loadtxt(folder / f"index_{what}.txt").astype(int) for what in ("features", "target"))
    train, test = (np.loadtxt(folder / f"index_{part}_0.txt").astype(int) for part in ("train", "test"))
    x, y = table[:, columns], table[:, target]
    scale = np.where(x[train].std(0) > 0, x[train].std(0), 1)
    inputs = ((x - x[train].mean(0)) / scale).astype("float32")
    return inputs[train], ((y[train] - y[train].mean()) / y[train].std()).astype("float32"), inputs[test]


def run(kernel: Any, method: str, warmup: int, draws: int, seed: int) -> tuple[np.ndarray, MCMC, float]:
    """Network outputs on the test rows, shape (chains, draws, rows), with the finished MCMC and its seconds."""
    start = time.perf_counter()
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=options.chains,
        chain_method=method,
        progress_bar=False,
    )
    mcmc.run(random.key(seed), x, y, extra_fields=("num_steps",) if isinstance(kernel, NUTS) else ())
    samples = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    seconds = time.perf_counter() - start
    return predict(samples, x_test, model=model, functions=True)["functions"].values, mcmc, seconds


def nuts() -> dict[str, np.ndarray]:
    """The reference, from its file where there is one."""
    path = Path("out") / f"nuts_{options.dataset}_{options.activation}_{options.nuts_draws}.npz"
    if not path.exists():
        kernel = NUTS(model, max_tree_depth=10)
        functions, mcmc, seconds = run(kernel, "parallel", options.nuts_warmup, options.nuts_draws, 0)
        passes = np.asarray(mcmc.get_extra_fields()["num_steps"]).mean() * options.nuts_draws
        path.parent.mkdir(exist_ok=True)
        np.savez(path, functions=functions, seconds=seconds, passes=passes)
    return dict(np.load(path))


def contestants() -> dict[str, tuple[Any, int]]:
    """Kernels by name, and the rows of their minibatches."""
    rows = len(x)
    found: dict[str, tuple[Any, int]] = {}
    for batch in (rows, 128):
        for step_size, friction in ((3e-3, 10.0), (1e-3, 10.0), (1e-3, 100.0), (3e-4, 100.0)):
            steps = max(int(options.passes * rows / batch / DRAWS), 1)
            kernel = SGHMC(model, step_size=step_size, friction=friction, batch_size=batch, steps_per_draw=steps)
            found[f"SGHMC, B = {batch}, h = {step_size:g}, C = {friction:g}"] = kernel, batch
    for batch in (rows, 128):
        steps = max(int(options.passes * rows / batch / DRAWS), 1)
        found[f"SGLD, B = {batch}"] = SGLD(model, step_size=1e-5, batch_size=batch, steps_per_draw=steps), batch
    return found


def row(name: str, functions: np.ndarray, passes: float, seconds: float, temperature: str) -> None:
    """Print one row of the table."""
    mean, sd = functions.mean((0, 1)), functions.std((0, 1))
    distance, ratio = np.median(np.abs(mean - truth[0]) / truth[1]), np.median(sd / truth[1])
    spread = np.median(np.abs(sd / truth[1] - 1))
    r_hat = float(function_diagnostics(functions)["r_hat"].quantile(0.95))
    numbers = (
        f"{distance:.3f} | {ratio:.3f} | {spread:.3f} | {temperature} | {r_hat:.3f} | {passes:.3g} | {seconds:.0f}"
    )
    print(f"| {name} | {numbers} |", flush=True)


options = parser.parse_args()
x, y, x_test = task(options.data / "uci" / options.dataset)
model = mlp_regression((50,), activation=options.activation)
reference = nuts()
truth = reference["functions"].mean((0, 1)), reference["functions"].std((0, 1))
COLUMNS = (
    "kernel",
    "mean, in sd",
    "sd, ratio",
    "sd, off by",
    "T kin., conf.",
    "R-hat, 95%",
    "passes a chain",
    "seconds",
)
print("| " + " | ".join(COLUMNS) + " |")
print("| --- " * len(COLUMNS) + "|")
row("NUTS", reference["functions"], float(reference["passes"]), float(reference["seconds"]), "-")
for half in (0, 1):
    part = np.array_split(reference["functions"], 2, axis=0)[half]
    row(f"NUTS, half of the chains ({half + 1})", part, float(reference["passes"]), float(reference["seconds"]), "-")
for name, (kernel, batch) in contestants().items():
    if options.only and not name.startswith(tuple(options.only)):
        continue
    functions, mcmc, seconds = run(kernel, "vectorized", DRAWS // 5, DRAWS, 1)
    statistics = {
        n: float(np.mean(v)) for n, v in mcmc.get_extra_fields().items() if n.endswith("temperature") and v.ndim == 1
    }
    temperature = ", ".join(
        f"{statistics.get(f'{kind}_temperature', np.nan):.3f}" for kind in ("kinetic", "configurational")
    )
    row(name, functions, kernel.settings.steps_per_draw * DRAWS * batch / len(x), seconds, temperature)
