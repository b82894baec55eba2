"""Images and labels for the examples: from files in a folder, from OpenML, or scikit-learn's own digits."""

import gzip
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split

NAMES = ("digits", "mnist", "fashion-mnist", "kmnist", "notmnist", "cifar10")
OPENML = {"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST", "kmnist": "Kuzushiji-MNIST", "cifar10": "CIFAR_10"}


class Images(NamedTuple):
    """Images (N, H, W, C) from 0 to 1 as float32, and labels (N,); sets without training images have none there."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_images(folder: Path | None, name: str) -> Images:
    """A set of images from `folder`/`name`/, or without a folder from OpenML.

    Grey sets are the four files of MNIST, train-images-idx3-ubyte.gz and so on; cifar10 is the folder
    cifar-10-batches-py of the python version. "digits" needs neither a folder nor a network.
    """
    if name == "digits":
        return _digits()
    if folder is None:
        return _openml(name)
    if name == "cifar10":
        return _cifar(folder / name / "cifar-10-batches-py")
    test = _idx(folder / name / "t10k-images-idx3-ubyte.gz"), _idx(folder / name / "t10k-labels-idx1-ubyte.gz")
    if name in ("kmnist", "notmnist"):  # only ever looked at by networks that were trained on something else
        train = test[0][:0], test[1][:0]
    else:
        train = _idx(folder / name / "train-images-idx3-ubyte.gz"), _idx(folder / name / "train-labels-idx1-ubyte.gz")
    return _scaled(*train, *test)


def _scaled(x_train, y_train, x_test, y_test, largest=255):
    x_train, x_test = (
        x.astype(np.float32).reshape(*x.shape[:3], *x.shape[3:] or (1,)) / largest for x in (x_train, x_test)
    )
    return Images(x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64))


def _digits():
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8).repeat(2, axis=1).repeat(2, axis=2)  # LeNet-5 needs 16 x 16 pixels
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0)
    return _scaled(x_train, y_train, x_test, y_test, largest=16)


def _opened(path, remedy):
    if not path.exists():
        raise SystemExit(f"{path} is missing: {remedy}, or leave out --data to download the set from openml.org")
    return path


def _idx(path):
    remedy = f"put the gzipped idx files of {path.parent.name} into {path.parent}"
    with gzip.open(_opened(path, remedy)) as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no idx file of bytes: it must begin with 00 00 08")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _cifar(folder):
    def read(name):
        remedy = f"unpack the python version of CIFAR-10 (cifar-10-python.tar.gz) into {folder.parent}"
        with _opened(folder / name, remedy).open("rb") as file:
            batch = pickle.load(file, encoding="bytes")
        return batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(batch[b"labels"])

    x, y = zip(*(read(f"data_batch_{i}") for i in range(1, 6)), strict=True)
    return _scaled(np.concatenate(x), np.concatenate(y), *read("test_batch"))


def _openml(name):
    if name not in OPENML:
        raise SystemExit(f"{name} is not on OpenML: pass --data FOLDER, with its files in FOLDER/{name}/")
    try:
        x, y = fetch_openml(OPENML[name], version=1, return_X_y=True, as_frame=False, parser="liac-arff")
    except OSError as error:
        raise SystemExit(
            f"could not download {name} from openml.org ({error}): pass --data FOLDER, with its files in "
            f"FOLDER/{name}/, or try --dataset digits, which needs no files"
        ) from None
    side, channels = (32, 3) if name == "cifar10" else (28, 1)
    x = x.reshape(-1, channels, side, side).transpose(0, 2, 3, 1)
    y = y.astype(int)
    return _scaled(x[:-10000], y[:-10000], x[-10000:], y[-10000:])
