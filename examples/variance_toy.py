"""A network that tells classes apart by the variance of a layer alone (Neklyudov et al. 2018, their toy).

    python examples/variance_toy.py

Four normal clouds at (3|10, 3|10), four layers of 100 leaky ReLUs, a layer of 2 units whose weights have mean zero,
another 100, and 4 classes. The picture shows the activations of the layer of 2 units for four draws of its weights, and
what the classes are by one draw, by the mean of the weights, and by the average over 101 draws.
"""

import argparse
import warnings
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from training import print_table
from variational import backend, dense_network, train

from bnn_ppl.diagnostics import accuracy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=("numpyro", "pyro"), default="numpyro")
parser.add_argument("--steps", type=int, default=21_000)
parser.add_argument("--draws", type=int, default=101)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
parser.add_argument("--out", type=Path, default=Path("out"))
options = parser.parse_args()
if options.smoke:
    options.steps, options.draws = 20, 5

WIDTHS = [2, 100, 100, 100, 100, 2, 100, 4]
LAYER = "w4"  # the weights of the 2 units

warnings.filterwarnings("ignore", "Failed to verify mean field")  # which an AutoGuideList is, in its own order
b = backend(options.backend)
block = import_module("numpyro.handlers" if b.name == "numpyro" else "pyro.poutine").block
rng = np.random.default_rng(options.seed)


def clouds(count):
    """Points of the four classes, and their numbers."""
    labels = rng.integers(0, 4, count)
    centres = np.array([[3.0, 3.0], [3.0, 10.0], [10.0, 3.0], [10.0, 10.0]])
    points = (centres[labels] + rng.normal(size=(count, 2))).astype(np.float32)
    if b.name == "numpyro":
        return points, labels
    import torch

    return torch.as_tensor(points), torch.as_tensor(labels)


def leaky(h):
    """Leaky ReLU of slope 0.01."""
    return h * ((h > 0) + 0.01 * (h <= 0))


model = dense_network(b, WIDTHS, lambda name, shape: b.dist.Normal(0.0, 1.0), leaky)
guide = b.guides.AutoGuideList(model)
guide.append(b.ours.AutoVarianceNetwork(model, sites=[LAYER]))
guide.append(b.guides.AutoDelta(block(model, hide=[LAYER]), init_loc_fn=b.ours.init_to_prior_center))
x, y = clouds(4000)
x_test, y_test = clouds(2000)
trained = train(b, model, guide, (x, y), steps=options.steps, rates=lambda name: 1e-4, batch_size=200)

given = {"model": model} | ({} if trained.params is None else {"params": trained.params})
side = np.linspace(-1, 14, 80, dtype=np.float32)
grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
if b.name == "pyro":
    import torch

    grid = torch.as_tensor(grid)
schemes = {"stochastic": {"seed": 1}, "deterministic": {}, "ensemble": {"num_draws": options.draws}}
rows = {}
figure, axes = plt.subplots(2, 4, figsize=(15, 7.2), layout="constrained")
for axis, (scheme, more) in zip(axes[1], schemes.items(), strict=False):
    found = b.ours.predict(guide, x_test, y_test, scheme=scheme, **given, **more)
    percent = 100 * accuracy(found["probabilities"], found["observed"])
    rows[scheme] = {"test points right %": percent}
    classes = b.ours.predict(guide, grid, scheme=scheme, **given, **more)["probabilities"].values.argmax(-1)
    axis.imshow(
        classes.reshape(80, 80), origin="lower", extent=(-1, 14, -1, 14), cmap="tab10", vmin=0, vmax=9, alpha=0.4
    )
    axis.scatter(*np.asarray(x_test[:300]).T, c=np.asarray(y_test[:300]), cmap="tab10", vmin=0, vmax=9, s=5)
    axis.set(title=f"{scheme}: {percent:.1f}% right", xlabel="first input", ylabel="second input")

print_table(rows)

axis = axes[1, 3]
axis.plot(np.arange(len(trained.losses)) + 1, trained.losses, lw=0.3)
axis.set(xscale="log", yscale="log", xlabel="step", ylabel="negative ELBO")


def activations(number):
    """Those of the layer of 2 units, of the points of the test, under one draw of its weights."""
    if b.name == "numpyro":
        import jax

        weights = guide.sample_posterior(jax.random.key(number), trained.params)
    else:
        import torch

        torch.manual_seed(number)
        weights = {n: v.numpy() for n, v in {**guide.median(), **guide[0].sample_posterior()}.items()}
    h = np.asarray(x_test)
    for i in range(4):
        h = leaky(h @ np.asarray(weights[f"w{i}"]) + np.asarray(weights[f"b{i}"]))
    return h @ np.asarray(weights["w4"]) + np.asarray(weights["b4"])


for number, axis in enumerate(axes[0]):
    axis.scatter(*activations(number).T, c=np.asarray(y_test), cmap="tab10", vmin=0, vmax=9, s=4)
    axis.set(title=f"draw {number + 1}", xlabel="first unit", ylabel="second unit", xscale="symlog", yscale="symlog")
options.out.mkdir(exist_ok=True)
path = options.out / f"variance_toy_{b.name}.png"
figure.savefig(path, dpi=80)
print(f"wrote {path}")
