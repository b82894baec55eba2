"""Averages along the path of SVI beside SVI itself and beside samplers, on images.

    python examples/weight_averaging.py --data FOLDER --epochs 20 --chains 5
    python examples/weight_averaging.py --data FOLDER --dataset cifar10 --model vgg --backend pyro --device cuda
    make demo    # a short run on the digits

Per repeat (--chains) one path of SVI with AutoNormal, whose learning rate falls to its floor in each cycle; from half
of the epochs on HWA averages the guides at these floors, with the covariance of the mixture and with a low-rank one.
SGLD and cyclical SGHMC pass the data as many times. Draws accuracy and negative ELBO over the epochs to --out, and
prints scores of the end, with the entropy on images of other kinds (for MNIST).
"""

import warnings
from importlib import import_module

import matplotlib.pyplot as plt
import numpy as np
from data import load_images
from training import BATCH_SIZE, as_inputs, make_model, make_parser, prepare, print_table, sample, to_backend

from bnn_ppl.diagnostics import classification_scores, predictive_entropy
from bnn_ppl.schedules import CosineRestarts, Cyclical

DRAWS = 20  # networks that a guide is predicted with
KINDS = {"mixture": "HWA, mixture", "low_rank": "HWA, low rank"}

parser = make_parser(__doc__.partition("\n")[0], chains=5)
parser.add_argument("--cycle", type=int, default=1, help="epochs of a cycle of the learning rate")
parser.add_argument("--svi-rate", type=float, default=3e-3, help="Adam's learning rate, at the start of each cycle")
parser.add_argument("--constant", action="store_true", help="keep that rate, and average where cycles end")
parser.add_argument("--temperature", type=float, default=1.0, help="of the samplers; 1 is the posterior")
parser.add_argument("--no-samplers", action="store_true", help="only the variational methods")
options = parser.parse_args()
images = prepare(options)
if options.smoke:
    options.epochs, options.chains, options.no_samplers = 2, 1, True
ours = import_module(f"bnn_ppl.{options.backend}")
model = make_model(options, images)
if options.epochs % options.cycle:
    parser.error(f"--epochs {options.epochs} must be a multiple of --cycle {options.cycle}")
cycles = options.epochs // options.cycle
steps = max(len(images.x_train) * options.cycle // BATCH_SIZE, 1)
start = max(cycles // 2, 1) * steps
floor = options.svi_rate if options.constant else options.svi_rate / 10
rate = CosineRestarts(options.svi_rate, steps, floor=floor)
data = as_inputs(options, images.x_train), to_backend(options, images.y_train)
snapshots = {"start": start, "cycle_length": steps, "learning_rate": rate}


class Path:
    """One path of SVI, cycle by cycle, with either backend; `guides` has the last guide and the averaged one."""

    def __init__(self, covariance: str, seed: int):
        host = import_module(f"{options.backend}.infer")
        guide = import_module(f"{options.backend}.infer.autoguide").AutoNormal(
            model, init_loc_fn=ours.init_to_prior_center, init_scale=0.01
        )
        self.elbo, self.guide, self.seed = host.TraceMeanField_ELBO(), guide, seed
        self.pair = ours.local_reparameterization(model, guide)
        arguments = (*self.pair, self.optimiser(), self.elbo)
        self.svi = ours.HWASVI(*arguments, covariance=covariance, rank=cycles, **snapshots)


class NumPyroPath(Path):
    def optimiser(self):
        import optax

        return optax.adam(rate)

    def cycle(self):
        import jax

        if not hasattr(self, "state"):
            self.state = self.svi.init(jax.random.key(self.seed), *data, subsample_size=BATCH_SIZE)

            def several(state, x, y):
                one = lambda state, _: self.svi.update(state, x, y, subsample_size=BATCH_SIZE)  # noqa: E731
                return jax.lax.scan(one, state, None, length=steps)

            self.several = jax.jit(several, donate_argnums=0)
        self.state, _ = self.several(self.state, *data)

    def guides(self):
        found = {"SVI": (self.guide, self.svi.get_params(self.state))}
        if int(self.state.num_snapshots) > 1:
            found["HWA"] = (self.svi.averaged_guide(self.state), {})
        return found

    def loss(self, guide, params):
        import jax

        def one(key):
            return self.elbo.loss(key, params, model, guide, *data, subsample_size=BATCH_SIZE)

        keys = jax.random.split(jax.random.key(1), 20)
        return float(jax.jit(lambda keys: jax.lax.map(one, keys).mean())(keys))


class PyroPath(Path):
    def optimiser(self):
        import pyro
        import torch

        pyro.clear_param_store()
        pyro.set_rng_seed(self.seed)
        arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1.0}, "lr_lambda": rate}
        self.schedule = pyro.optim.LambdaLR(arguments)
        return self.schedule

    def cycle(self):
        for _ in range(steps):
            self.svi.step(*data, subsample_size=BATCH_SIZE)
            self.schedule.step()

    def guides(self):
        found = {"SVI": (self.guide, None)}
        if len(self.svi.snapshot_steps()) > 1:
            found["HWA"] = (self.svi.averaged_guide(), None)
        return found

    def loss(self, guide, params):
        return np.mean([self.elbo.loss(model, guide, *data, subsample_size=BATCH_SIZE) for _ in range(20)])


def probabilities(guide, params, x):
    """Class probabilities of images."""
    found = ours.predict(guide, as_inputs(options, x), model=model, params=params, num_draws=DRAWS)
    return found["probabilities"].values


def scores(p, foreign):
    """A row of the table."""
    found = classification_scores(p, images.y_test)
    row = {"accuracy %": 100 * found["accuracy"], "NLL": found["nll"], "ECE %": 100 * found["ece"]}
    row |= {"entropy": predictive_entropy(p).mean()}
    return row | {f"on {name}": predictive_entropy(q).mean() for name, q in zip(names, foreign, strict=True)}


def sgld(model, *, step_size, friction, **arguments):
    """SGLD at the same learning rate."""
    return ours.SGLD(model, step_size=options.learning_rate / len(images.x_train), **arguments)


def cyclical(model, *, step_size, temperature, steps_per_draw, **arguments):
    """SGHMC with a cosine step size in two cycles, the draws of the second of which are kept."""
    cycle = Cyclical(2 * step_size, options.epochs * steps_per_draw, exploration=0.5, draws_per_cycle=options.epochs)
    return ours.SGHMC(model, step_size=cycle, temperature=options.temperature, **arguments)


warnings.filterwarnings("ignore", "rank=")  # which averages begin with
mnist = images.x_train.shape[1:] == (28, 28, 1) and options.data is not None
names = ("kmnist", "notmnist") if mnist else ()
others = [load_images(options.data, name).x_test for name in names]
rows: dict[str, list] = {}
curves: dict[str, list] = {}
losses: dict[str, list] = {}
for seed in range(options.chains):
    for covariance, label in KINDS.items():
        path = (NumPyroPath if options.backend == "numpyro" else PyroPath)(covariance, seed)
        accuracy: dict[str, list] = {}
        loss: dict[str, list] = {}
        for cycle in range(1, cycles + 1):
            path.cycle()
            for name, (guide, params) in path.guides().items():
                if name == "SVI" and covariance == "low_rank":  # the path of the other one
                    continue
                key = label if name == "HWA" else name
                p = probabilities(guide, params, images.x_test)
                accuracy.setdefault(key, []).append(100 * (p.argmax(1) == images.y_test).mean())
                loss.setdefault(key, []).append(path.loss(guide, params) / len(images.x_train))
                if cycle == cycles:
                    row = scores(p, [probabilities(guide, params, x) for x in others])
                    rows.setdefault(key, []).append(row | {"negative ELBO / N": loss[key][-1]})
        for key in accuracy:
            curves.setdefault(key, []).append(accuracy[key])
            losses.setdefault(key, []).append(loss[key])

for label, make in {} if options.no_samplers else {"SGLD": sgld, "cSGHMC": cyclical}.items():
    run = sample(options, images, options.temperature, make)
    every = run.predict(images.x_test, functions=True)["functions"].values
    foreign = [run.predict(x, functions=True)["functions"].values.mean(1) for x in others]
    running = every.cumsum(1) / np.arange(1, every.shape[1] + 1)[:, None, None]
    for chain in range(options.chains):
        rows.setdefault(label, []).append(scores(running[chain, -1], [p[chain] for p in foreign]))
        curves.setdefault(label, []).append(100 * (running[chain].argmax(-1) == images.y_test).mean(-1))

figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, layout="constrained")
for axes, found in ((top, curves), (bottom, losses)):
    for label, values in found.items():
        lines = np.array(values)
        # Averages begin later, and samplers have two draws an epoch in the second half.
        between = 0.5 if label in ("SGLD", "cSGHMC") else options.cycle
        epochs = options.epochs - between * np.arange(lines.shape[1])[::-1]
        (line,) = axes.plot(epochs, lines.mean(0), marker=".", label=label)
        axes.fill_between(epochs, lines.min(0), lines.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
top.set_ylabel("test accuracy (%)")
bottom.set_ylabel("negative ELBO per training image (nats)")
bottom.set_xlabel("epochs")
bottom.set_yscale("log")
top.legend(loc="lower right")
runs = "1 run" if options.chains == 1 else f"mean and range of {options.chains} runs"
figure.suptitle(f"{options.model} on {options.dataset}, {runs}")
options.out.mkdir(exist_ok=True)
figure.savefig(options.out / f"weight_averaging_{options.dataset}_{options.model}_{options.backend}.png", dpi=100)
print_table({label: {k: np.mean([r[k] for r in found]) for k in found[0]} for label, found in rows.items()})
