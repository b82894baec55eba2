"""The examples' reader of image files, on small files in the formats of the data sets."""

import gzip
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("example_data", Path(__file__).parents[1] / "examples" / "data.py")
data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(data)


def write_idx(path, array):
    path.parent.mkdir(exist_ok=True)
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_grey_images(tmp_path, name):
    """KMNIST has test images only."""
    pixels = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    for part in ("train", "t10k"):
        write_idx(tmp_path / name / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / name / f"{part}-labels-idx1-ubyte.gz", np.array([3, 1, 2]))
    images = data.load_images(tmp_path, name)
    rows = 3 if name == "mnist" else 0
    assert images.x_train.shape == (rows, 28, 28, 1)
    assert images.y_train.shape == (rows,)
    np.testing.assert_allclose(images.x_test[..., 0], pixels / 255, rtol=1e-6)
    np.testing.assert_array_equal(images.y_test, [3, 1, 2])


def test_colour_images(tmp_path):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = np.arange(2 * 3072).reshape(2, 3072) % 256
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({b"data": rows.astype(np.uint8), b"labels": [4, 7]}))
    images = data.load_images(tmp_path, "cifar10")
    assert images.x_train.shape == (10, 32, 32, 3)
    assert images.x_test[1, 0, 1, 2] == pytest.approx(rows[1, 2 * 1024 + 1] / 255)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"t10k-images-idx3-ubyte.gz is missing: put the gzipped idx files of mnist"):
        data.load_images(tmp_path, "mnist")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(SystemExit, match="is no idx file of bytes"):
        data.load_images(tmp_path, "mnist")
