"""Does the network know what it does not know? AUROC of telling foreign images from test images by uncertainty.

    python examples/out_of_distribution.py --data FOLDER
    python examples/out_of_distribution.py --dataset digits

Trained on MNIST, looked at on KMNIST and notMNIST: without a folder on those that OpenML has. The digits are told from
noise: their own pixels, shuffled.
"""

import numpy as np
from data import load_images
from training import make_parser, prepare, print_table, sample, train_sgd

from bnn_ppl.diagnostics import mutual_information, out_of_distribution_auroc, predictive_entropy

parser = make_parser(__doc__.partition("\n")[0])
parser.add_argument("--temperature", type=float, default=1.0, help="1 is the posterior, less is colder")
options = parser.parse_args()
images = prepare(options)
if images.x_train.shape[1:] == (28, 28, 1):
    names = ("kmnist", "notmnist") if options.data else ("kmnist",)
    foreign = {name: load_images(options.data, name).x_test for name in names}
else:
    pixels = images.x_test.reshape(len(images.x_test), -1)
    foreign = {"noise": np.random.default_rng(0).permuted(pixels, axis=1).reshape(images.x_test.shape)}


def uncertainties(run, x, chains):
    """Three measures, each larger where the network is less certain."""
    found = run.predict(x, chains=chains)
    p = found["probabilities"].values
    measures = {"1 - max p": 1 - p.max(axis=1), "entropy": predictive_entropy(p)}
    if run is not runs["SGD"] or chains > 1:  # one network does not disagree with itself
        measures["mutual information"] = mutual_information(p, found["mean_entropy"].values)
    return measures


runs = {"SGD": train_sgd(options, images), "SGHMC": sample(options, images, options.temperature)}
rows = {}
for method, run in runs.items():
    for chains in (1, options.chains):
        inside = uncertainties(run, images.x_test, chains)
        for name, x in foreign.items():
            outside = uncertainties(run, x, chains)
            row = {measure: out_of_distribution_auroc(inside[measure], outside[measure]) for measure in inside}
            rows[f"{method} x {chains}, {name}"] = row
print(f"AUROC of {options.dataset} against other images")
print_table(rows)
