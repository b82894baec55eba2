"""What the examples on images share: options, the model, sampling and prediction, with either backend."""

import argparse
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from data import Images, load_images

import bnn_ppl
from bnn_ppl.diagnostics import classification_scores

BATCH_SIZE = 128
# Learning rate and prior scale, chosen on --validation; the VGG has those of LeNet-5.
SETTINGS = {"mlp": (0.1, 6.0), "lenet5": (0.05, 1.5), "vgg": (0.05, 1.5)}


def make_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Options of all examples on images."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, help="folder with the files of the data sets; without it from OpenML")
    parser.add_argument("--dataset", choices=("digits", "mnist", "fashion-mnist", "cifar10"), default="mnist")
    parser.add_argument("--model", choices=tuple(SETTINGS), default="mlp")
    parser.add_argument("--backend", choices=("numpyro", "pyro"), default="numpyro")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data of each chain")
    parser.add_argument("--chains", type=int, default=5, help="number of chains, and of networks in an ensemble")
    parser.add_argument("--learning-rate", type=float, help="as of SGD on the mean loss; 0.1, convolutions 0.05")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--prior-scale", type=float, help="weights are N(0, scale^2 / fan-in); 6, convolutions 1.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU where there is one")
    parser.add_argument("--validation", action="store_true", help="score a sixth of the training data instead")
    parser.add_argument("--smoke", action="store_true", help="a short run on the digits, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for plots and reports")
    parser.set_defaults(**defaults)
    return parser


def set_device(options: argparse.Namespace) -> str:
    """Compute on `options.device`, by default on the GPU where there is one."""
    if options.backend == "numpyro":
        import jax

        if options.device:
            jax.config.update("jax_platforms", options.device)
        return jax.default_backend()
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(options.device)
    return options.device


def prepare(options: argparse.Namespace) -> Images:
    """Load the data, and set up the device."""
    if options.smoke:
        options.dataset, options.epochs, options.chains = "digits", 4, 2
    learning_rate, prior_scale = SETTINGS[options.model]
    options.learning_rate = options.learning_rate or learning_rate
    options.prior_scale = options.prior_scale or prior_scale
    device = set_device(options)
    images = load_images(options.data, options.dataset)
    if options.validation:
        x, y = images.x_train, images.y_train
        kept = len(x) * 5 // 6
        images = Images(x[:kept], y[:kept], x[kept:], y[kept:])
    print(
        f"{options.model} with {options.backend} on {device}: {len(images.x_train)} images of {options.dataset}, "
        f"{options.chains} chains of {options.epochs} epochs"
    )
    return images


def make_model(options: argparse.Namespace, images: Images) -> Any:
    """The network with its prior, from ``bnn_ppl.models``."""
    models = import_module(f"bnn_ppl.models.{options.backend}")
    if options.model == "mlp":
        return models.mlp_classification((100,), prior_scale=options.prior_scale)
    priors = import_module(f"bnn_ppl.{options.backend}").priors
    _, size, _, channels = images.x_train.shape
    make = {"lenet5": models.lenet5, "vgg": models.vgg}[options.model]
    return make(channels=channels, image_size=size, prior=priors.fan_in_normal(options.prior_scale))


def as_inputs(options: argparse.Namespace, x: np.ndarray) -> Any:
    """Images as the network takes them: rows of pixels for the MLP, channels first for torch's convolutions."""
    if options.model == "mlp":
        x = x.reshape(len(x), -1)
    elif options.backend == "pyro":
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    return to_backend(options, x)


def to_backend(options: argparse.Namespace, array: np.ndarray) -> Any:
    """A tensor on the device for Pyro; NumPyro takes NumPy's arrays."""
    if options.backend == "numpyro":
        return array
    import torch

    return torch.as_tensor(array, device=options.device)


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Numbers by row and column, in Markdown; - where a row lacks a column."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print("| " + " | ".join(["", *columns]) + " |")
    print("| " + " | ".join(["---"] * (len(columns) + 1)) + " |")
    for label, row in rows.items():
        cells = [f"{row[name]:.4g}" if name in row else "-" for name in columns]
        print("| " + " | ".join([str(label), *cells]) + " |")


@dataclass
class Run:
    """Finished chains: draws by site, shapes (chains, draws, ...), their statistics, and the time they took."""

    options: argparse.Namespace
    model: Any
    mcmc: Any
    draws: dict[str, Any]
    statistics: xr.Dataset
    seconds: float

    def predict(self, x: np.ndarray, y: np.ndarray | None = None, *, chains: int | None = None, **arguments: Any):
        """Predictions of the first few chains, by default of all, for images."""
        predict = import_module(f"bnn_ppl.{self.options.backend}").predict
        draws = {name: values[:chains] for name, values in self.draws.items()}
        y = None if y is None else to_backend(self.options, y)
        return predict(draws, as_inputs(self.options, x), y, model=self.model, **arguments)

    def scores(self, images: Images, *, chains: int | None = None, predictions: Any = None) -> dict[str, float]:
        """A row of a table: scores on the test images, and the mean temperatures over the draws."""
        found = self.predict(images.x_test, chains=chains) if predictions is None else predictions
        scores = classification_scores(found["probabilities"].values, images.y_test)
        statistics = self.statistics.isel(chain=slice(chains))
        return {
            "error %": 100 * (1 - scores["accuracy"]),
            "NLL": scores["nll"],
            "ECE %": 100 * scores["ece"],
            "T kinetic": float(statistics["kinetic_temperature"].mean()),
            "T config.": float(statistics["configurational_temperature"].mean()),
            "seconds": self.seconds * (chains or self.options.chains) / self.options.chains,
        }


def train_sgd(options: argparse.Namespace, images: Images) -> Run:
    """SGD with momentum: SGHMC at temperature 0, with a step size that falls to 0; the last step is all it keeps."""
    sghmc = import_module(f"bnn_ppl.{options.backend}").SGHMC
    model = make_model(options, images)
    constant = sghmc.from_learning_rate(model, **_rates(options, images)).settings
    steps = len(images.x_train) // BATCH_SIZE
    kernel = sghmc(
        model,
        step_size=lambda step: constant.step_size * (1.0 - step / (options.epochs * steps + 1)),
        friction=constant.friction,
        temperature=0.0,
        steps_per_draw=steps,
        **_common(options),
    )
    return _run(options, images, kernel, warmup=options.epochs - 1, draws=1)


def sample(options: argparse.Namespace, images: Images, temperature: float, make: Any = None) -> Run:
    """SGHMC from a cold start: a quarter of the epochs at T = 0, a quarter to warm up, and half for draws.

    `make` is called like SGHMC, by default it is SGHMC.
    """
    sghmc = import_module(f"bnn_ppl.{options.backend}").SGHMC
    model = make_model(options, images)
    constant = sghmc.from_learning_rate(model, **_rates(options, images)).settings
    steps = max(len(images.x_train) // BATCH_SIZE // 2, 1)  # two draws per epoch
    cold = options.epochs // 4 * 2 * steps
    kernel = (make or sghmc)(
        model,
        step_size=constant.step_size,
        friction=constant.friction,
        temperature=lambda step: temperature * (step >= cold),
        steps_per_draw=steps,
        **_common(options),
    )
    return _run(options, images, kernel, warmup=options.epochs, draws=options.epochs)


def _rates(options, images):
    return {
        "learning_rate": options.learning_rate,
        "momentum": options.momentum,
        "num_data": len(images.x_train),
    }


def _common(options):
    if options.backend == "numpyro":
        return {"batch_size": BATCH_SIZE, "noise": "fast"}
    return {"batch_size": BATCH_SIZE, "jit_compile": True}


def _run(options, images, kernel, warmup, draws):
    start = time.perf_counter()
    data = as_inputs(options, images.x_train), to_backend(options, images.y_train)
    if options.backend == "numpyro":
        import jax
        from numpyro.infer import MCMC

        together = "vectorized" if options.model == "mlp" else "sequential"  # convolutions: one chain after another
        mcmc = MCMC(
            kernel,
            num_warmup=warmup,
            num_samples=draws,
            num_chains=options.chains,
            chain_method=together,
            progress_bar=False,
            jit_model_args=True,
        )
        mcmc.run(jax.random.key(options.seed), *data)
    else:
        import pyro
        from pyro.infer import MCMC

        pyro.set_rng_seed(options.seed)
        mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, num_chains=options.chains, disable_progbar=True)
        mcmc.run(*data)
    samples = mcmc.get_samples(group_by_chain=True)
    seconds = time.perf_counter() - start
    tree = bnn_ppl.to_arviz(mcmc, var_names=[], constant_data=False)
    statistics = tree["sample_stats"]
    statistics = statistics.to_dataset() if isinstance(statistics, xr.DataTree) else statistics
    return Run(options, kernel.model, mcmc, samples, statistics, seconds)
