"""SGHMC on images beside SGD of the same budget and a deep ensemble.

    python examples/mnist.py --data FOLDER
    python examples/mnist.py --data FOLDER --dataset fashion-mnist --model lenet5 --backend pyro --epochs 4

SGD is the same kernel at temperature 0, from the same learning rate, which falls to 0. Each SGD run and each chain
passes the data as many times: compare one chain with SGD, and all of them with the ensemble.
"""

from training import make_parser, prepare, print_table, sample, train_sgd

import bnn_ppl

parser = make_parser(__doc__.partition("\n")[0])
parser.add_argument("--temperature", type=float, default=1.0, help="1 is the posterior, less is colder")
options = parser.parse_args()
images = prepare(options)

sgd = train_sgd(options, images)
chains = sample(options, images, options.temperature)

options.out.mkdir(exist_ok=True)
predictions = chains.predict(images.x_test, images.y_test, functions=True)
page = options.out / f"{options.dataset}_{options.model}_{options.backend}.png"
bnn_ppl.report(bnn_ppl.to_arviz(chains.mcmc, constant_data=False), predictions, path=page)

rows = {
    "SGD": sgd.scores(images, chains=1),
    "SGHMC, 1 chain": chains.scores(images, chains=1),
    f"SGD, ensemble of {options.chains}": sgd.scores(images),
    f"SGHMC, {options.chains} chains": chains.scores(images, predictions=predictions),
}
print_table(rows)
