"""Variational dropout, variance networks and sparse networks on images.

    python examples/variational_dropout.py --data FOLDER --study sparsity --epochs 40
    python examples/variational_dropout.py --data FOLDER --study variance --backend pyro
    python examples/variational_dropout.py --data FOLDER --study parameterizations --network lenet5
    python examples/variational_dropout.py --data FOLDER --study sparsity --network vgg --dataset cifar10 --full

The studies are those of Neklyudov et al. 2018 (LeNet-5) and Molchanov et al. 2017 (LeNet-300-100). --full has the
200 epochs of the former, with a learning rate of 0.001 for all parameters; the short runs have fewer epochs, and a
larger rate for the noise parameters, which have to come from -5 to where they belong. --batch-norm evaluates by the
statistics of batches of test images, as the reference code does.
"""

import argparse
import time
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from data import load_images
from training import print_table, set_device, to_backend
from variational import backend, dense_network, normalize_by_batch, train

from bnn_ppl.diagnostics import accuracy, prune, sparsity
from bnn_ppl.plots import plot_log_alpha

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, help="folder with mnist/ and others; without it from OpenML")
parser.add_argument("--dataset", choices=("digits", "mnist", "fashion-mnist", "cifar10"), default="mnist")
parser.add_argument("--study", choices=("sparsity", "variance", "parameterizations"), default="sparsity")
parser.add_argument("--backend", choices=("numpyro", "pyro"), default="numpyro")
parser.add_argument("--network", choices=("dense", "lenet5", "vgg"), default="dense", help="dense: LeNet-300-100")
parser.add_argument("--batch-norm", action="store_true", help="normalise each layer by its batch")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=200)
parser.add_argument("--noise-rate", type=float, default=0.02, help="learning rate of the noise parameters")
parser.add_argument("--hidden", action="store_true", help="noise in the hidden dense layer alone (parameterizations)")
parser.add_argument("--init-log-alpha", type=float, default=-5.0, help="where log alpha starts (parameterizations)")
parser.add_argument("--draws", type=int, default=20, help="draws of the ensemble scheme")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU where there is one")
parser.add_argument("--full", action="store_true", help="200 epochs and a learning rate of 0.001 for all")
parser.add_argument("--smoke", action="store_true", help="a few steps on the digits, to see that it runs")
parser.add_argument("--out", type=Path, default=Path("out"))
options = parser.parse_args()
if options.smoke:
    options.dataset, options.epochs, options.draws = "digits", 1, 2
if options.full:
    options.epochs, options.noise_rate = 200, 1e-3
flat = options.network == "dense"
if options.batch_norm and options.network == "vgg":
    parser.error("--batch-norm is for --network dense and lenet5")
if options.study != "parameterizations" and (options.hidden or options.init_log_alpha != -5.0):
    parser.error("--hidden and --init-log-alpha are for --study parameterizations")

warnings.filterwarnings("ignore", "the layers of batch normalisation")  # which --batch-norm says
warnings.filterwarnings("ignore", "Failed to verify mean field")  # which an AutoGuideList is, in its own order
device = set_device(options)
b = backend(options.backend)
images = load_images(options.data, options.dataset)
steps = options.epochs * max(len(images.x_train) // options.batch_size, 1)
print(f"{options.study} with {b.name} on {device}: {len(images.x_train)} images of {options.dataset}, {steps} steps")


def as_arrays(x, y):
    """Inputs of the network and labels, as the backend takes them."""
    if flat:
        x = x.reshape(len(x), -1)
    elif b.name == "pyro":
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    return to_backend(options, x), to_backend(options, y)


def make_model():
    """The network with log-uniform noisy weights; all else is normal."""

    def prior(name, shape):
        return b.ours.ImproperLogUniform() if is_noisy(name, shape) else b.dist.Normal(0.0, 1.0)

    if flat:
        return dense_network(
            b, [images.x_train[0].size, 300, 100, 10], prior, lambda h: h * (h > 0), options.batch_norm
        )
    models = import_module(f"bnn_ppl.models.{b.name}")
    _, size, _, channels = images.x_train.shape
    make = {"lenet5": models.lenet5, "vgg": models.vgg}[options.network]
    model = make(channels=channels, image_size=size, prior=prior)
    if options.batch_norm:
        normalize_by_batch(b, model.module)
    return model


def is_weight(name, shape):
    """Whether a site is a weight, and no bias."""
    return len(shape) > 1


def is_hidden(name, shape):
    """Whether a site is the weight of the hidden dense layer before the last."""
    return is_weight(name, shape) and ("hidden." in name or name == "w1")


def is_noisy(name, shape):
    """Whether a site has noise in the study."""
    return (is_hidden if options.hidden else is_weight)(name, shape)


def guide_of(model, parts):
    """The parts, guides by the predicate of their sites, and for all other sites a point."""
    block = import_module("numpyro.handlers" if b.name == "numpyro" else "pyro.poutine").block
    whole = b.guides.AutoGuideList(model)

    def hidden(msg):
        latent = msg["type"] == "sample" and not msg["is_observed"] and hasattr(msg["fn"], "shape")
        return latent and any(chosen(msg["name"], tuple(msg["fn"].shape())) for _, chosen in parts)

    for make, chosen in parts:
        whole.append(make(model, sites=chosen))
    whole.append(b.guides.AutoDelta(block(model, hide_fn=hidden)))
    return whole


def rates(name):
    """Learning rate of a parameter."""
    return options.noise_rate if "log_alpha" in name or "log_sigma" in name else 1e-3


def fit(model, guide):
    """Train, and tell how long it took."""
    start = time.perf_counter()
    trained = train(
        b,
        model,
        guide,
        as_arrays(images.x_train, images.y_train),
        steps=steps,
        rates=rates,
        batch_size=min(options.batch_size, len(images.x_train)),
        seed=options.seed,
    )
    return trained, time.perf_counter() - start


def percent(model, source, scheme, **arguments):
    """Accuracy on the test images."""
    x, y = as_arrays(images.x_test, images.y_test)
    found = b.ours.predict(source, x, y, model=model, scheme=scheme, row_batch_size=options.batch_size, **arguments)
    return 100 * accuracy(found["probabilities"], found["observed"])


def schemes(model, trained):
    """Accuracy under each scheme."""
    given = {} if trained.params is None else {"params": trained.params}
    return {
        "stochastic %": percent(model, trained.guide, "stochastic", **given),
        "deterministic %": percent(model, trained.guide, "deterministic", **given),
        "ensemble %": percent(model, trained.guide, "ensemble", num_draws=options.draws, **given),
    }


def study_of_parameterizations():
    """A network with all weights under each form of variational dropout."""
    rows = {}
    for name in ("layer", "neuron", "weight", "additive"):
        model = make_model()
        make = partial(b.ours.AutoVariationalDropout, parameterization=name, init_log_alpha=options.init_log_alpha)
        guide = guide_of(model, [(make, is_noisy)])
        trained, seconds = fit(model, guide)
        alphas = guide[0].log_alpha(*trained.arguments())
        median = np.median(np.concatenate([np.ravel(np.asarray(value)) for value in alphas.values()]))
        rows[name] = {"ELBO": -trained.final_loss} | schemes(model, trained)
        rows[name] |= {"median log alpha": median, "seconds": seconds}
        print_table({name: rows[name]})
    return rows


def study_of_variance_layers():
    """A network whose hidden dense layer has dropout with an alpha for each weight, or means of zero."""
    rows = {}
    rest = partial(b.ours.AutoVariationalDropout, parameterization="additive")
    for name, make in {"dropout": rest, "variance": b.ours.AutoVarianceNetwork}.items():
        model = make_model()
        others = (rest, lambda name, shape: is_weight(name, shape) and not is_hidden(name, shape))
        trained, seconds = fit(model, guide_of(model, [(make, is_hidden), others]))
        rows[name] = {"ELBO": -trained.final_loss} | schemes(model, trained) | {"seconds": seconds}
        print_table({name: rows[name]})
    return rows


def study_of_sparsity():
    """A network with an additive sigma for each weight, pruned at log alpha 3."""
    model = make_model()
    guide = guide_of(model, [(partial(b.ours.AutoVariationalDropout, parameterization="additive"), is_weight)])
    trained, seconds = fit(model, guide)
    log_alpha = guide[0].log_alpha(*trained.arguments())
    table = sparsity(log_alpha)
    print(table.round(4))
    plot_log_alpha(log_alpha)
    options.out.mkdir(exist_ok=True)
    path = options.out / f"log_alpha_{options.dataset}_{b.name}.png"
    plt.savefig(path, dpi=110)
    print(f"wrote {path}")
    medians = guide.median(*trained.arguments())
    given = {} if trained.params is None else {"params": trained.params}
    return {
        "all weights": {"error %": 100 - percent(model, guide, "deterministic", **given), "compression": 1},
        "pruned": {
            "error %": 100 - percent(model, prune(medians, log_alpha), "deterministic"),
            "compression": table.loc["all", "compression"],
            "seconds": seconds,
        },
    }


studies = {
    "parameterizations": study_of_parameterizations,
    "variance": study_of_variance_layers,
    "sparsity": study_of_sparsity,
}
print_table(studies[options.study]())
