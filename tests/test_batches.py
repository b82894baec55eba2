"""Batches of an iterable: cut to one length, each row once an epoch, and what cannot be batches is named."""

import itertools

import numpy as np
import pytest

from bnn_ppl.batches import BatchStream, check_iterable, check_plates
from bnn_ppl.layout import Plate
from bnn_ppl.settings import SGLDSettings

# Batches


def as_array(value):
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError
    return array


def cut(lengths, columns=2):
    """Batches of the rows 0, 1, ..., whose first array has the row's number in all columns."""
    ends = np.cumsum([0, *lengths])
    rows = np.arange(ends[-1])
    x = np.repeat(rows[:, None], columns, 1).astype(float)
    return [(x[a:b], rows[a:b]) for a, b in itertools.pairwise(ends)]


def stream(minibatches):
    return BatchStream(minibatches, as_array)


def taken(batches, count):
    """Row numbers of the next batches, shape (count, B); both arrays of a batch have the same rows."""
    rows = []
    for _ in range(count):
        x, y = batches.next()
        np.testing.assert_array_equal(x, np.repeat(y[:, None], x.shape[1], 1))
        rows.append(y)
    return np.stack(rows)


@pytest.mark.parametrize(
    "lengths",
    [[4, 4, 4], [4, 4, 2], [4, 1], [5], [3, 7, 1, 2, 11], [5, 1, 1, 1], [1, 6]],
    ids=str,
)
def test_each_row_comes_once_an_epoch_in_the_order_of_the_iterable(lengths):
    batches = stream(cut(lengths))
    size = lengths[0]
    assert batches.rows == size
    rows = taken(batches, 5 * sum(lengths))
    assert rows.shape == (5 * sum(lengths), size)
    np.testing.assert_array_equal(rows.ravel(), np.arange(rows.size) % sum(lengths))


class Shuffled:
    """Another order each time, as a loader has it."""

    def __init__(self, size, batch):
        self.size, self.batch, self.epochs = size, batch, 0

    def __iter__(self):
        self.epochs += 1
        order = np.random.default_rng(self.epochs).permutation(self.size)
        for i in range(0, self.size, self.batch):
            yield np.repeat(order[i : i + self.batch, None], 2, 1).astype(float), order[i : i + self.batch]


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (12, 4), (7, 6), (3, 3), (5, 1)])
def test_each_row_comes_once_an_epoch_in_any_order(size, batch):
    loader = Shuffled(size, batch)
    rows = taken(stream(loader), 6 * size).ravel()
    epochs = rows[: len(rows) // size * size].reshape(-1, size)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(size), (len(epochs), 1)))
    assert len(np.unique(epochs, axis=0)) > 1 or size == batch
    assert loader.epochs == 6 * batch  # no epoch was begun before it was needed


def test_peek_loses_nothing():
    one, other = stream(cut([4, 4, 2])), stream(cut([4, 4, 2]))
    for _ in range(9):
        seen = [one.peek(), one.peek()]
        batch = other.next()
        for arrays in (*seen, one.next()):
            for array, expected in zip(arrays, batch, strict=True):
                np.testing.assert_array_equal(array, expected)


def test_an_epoch_begins_when_it_is_needed():
    loader = Shuffled(8, 4)
    batches = stream(loader)
    assert loader.epochs == 1
    for expected in (1, 1, 2, 2, 3):
        batches.next()
        assert loader.epochs == expected


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        ((np.zeros((3, 2)), np.ones(3)), 2, []),
        ([np.zeros((3, 2)), np.ones(3)], 2, []),
        (np.zeros((3, 2)), 1, []),
        ({"y": np.ones(3), "x": np.zeros((3, 2))}, 0, ["y", "x"]),
    ],
    ids=["tuple", "list", "array", "dict"],
)
def test_a_batch_becomes_arguments(batch, args, kwargs):
    batches = stream([batch])
    positional, named = batches.arguments(batches.next(), ("more",), {"also": 1})
    assert len(positional) == args + 1
    assert positional[-1] == "more"
    assert list(named) == ["also", *kwargs]
    for name in kwargs:
        np.testing.assert_array_equal(named[name], batch[name])
    if isinstance(batch, tuple | list):
        for array, expected in zip(positional, batch, strict=False):
            np.testing.assert_array_equal(array, expected)


def test_keys_may_come_in_any_order():
    def epoch():
        yield {"x": np.zeros((2, 3)), "y": np.arange(2)}
        yield {"y": np.arange(2, 3), "x": np.zeros((1, 3))}

    class Loader:
        def __iter__(self):
            return epoch()

    batches = stream(Loader())
    for expected in ([0, 1], [2, 0], [1, 2], [0, 1]):
        _, named = batches.arguments(batches.next(), (), {})
        np.testing.assert_array_equal(named["y"], expected)
        assert named["x"].shape == (2, 3)


def test_an_iterator_that_ends():
    batches = stream(iter(cut([4, 4])))
    taken(batches, 2)
    with pytest.raises(ValueError, match=r"minibatches=<list_iterator .* ended, and it cannot be started again: pass"):
        batches.next()


def test_an_endless_generator():
    rows = taken(stream(itertools.cycle(cut([4, 3]))), 14)
    np.testing.assert_array_equal(rows.ravel(), np.arange(56) % 7)


def test_a_loader_that_is_its_own_iterator():
    class Loader:
        def __iter__(self):
            self.left = iter(cut([4, 3]))
            return self

        def __next__(self):
            return next(self.left)

    np.testing.assert_array_equal(taken(stream(Loader()), 14).ravel(), np.arange(56) % 7)


@pytest.mark.parametrize("nothing", [[], iter([]), ()])
def test_an_empty_iterable(nothing):
    with pytest.raises(ValueError, match=r"minibatches=.* is empty: pass a DataLoader"):
        stream(nothing)


# Bad batches


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        ((np.zeros((3, 2)), np.zeros(4)), r"\[\(3, 2\), \(4,\)\]"),
        ((np.zeros((3, 2)), 1.0), r"\[\(3, 2\), \(\)\]"),
        (np.float64(1.0), r"\[\(\)\]"),
        ((np.zeros((0, 2)), np.zeros(0)), r"\[\(0, 2\), \(0,\)\]"),
        ((), r"\[\]"),
    ],
    ids=["ragged", "0-d in a tuple", "0-d", "no rows", "no arrays"],
)
def test_arrays_need_the_same_rows(batch, shapes):
    with pytest.raises(ValueError, match=rf"the same number of rows, one or more, got the shapes {shapes}"):
        stream([batch])


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ("text", r"got str with \['str'\]"),
        ((np.zeros(3), "text"), r"got tuple with \['ndarray', 'str'\]"),
        ({"x": np.zeros(3), "y": None}, r"got dict with \['ndarray', 'NoneType'\]"),
        ([np.array(["a", "b"])], r"got list with \['ndarray'\]"),
        (None, r"got NoneType with \['NoneType'\]"),
        (([1.0, [2.0]],), r"got tuple with \['list'\]"),
        (object(), "got object with"),
    ],
    ids=["string", "string in a tuple", "None in a dict", "strings", "None", "ragged list", "object"],
)
def test_what_is_no_array_is_named(batch, what):
    with pytest.raises(ValueError, match=rf"a batch of minibatches must be an array, or a tuple, .*{what}"):
        stream([batch])


def test_none_between_batches_does_not_end_an_epoch():
    batches = stream([*cut([4]), None, *cut([4])])
    batches.next()
    with pytest.raises(ValueError, match="got NoneType"):
        batches.next()


@pytest.mark.parametrize(
    ("second", "match"),
    [
        ((np.zeros((4, 3)), np.arange(4)), r"\(\(2,\), dtype\('float64'\)\).*got \[\(\(3,\), dtype"),
        ((np.zeros((4, 2), "float32"), np.arange(4)), "got .*float32"),
        ((np.zeros((4, 2)),), "the first batch, .* got "),
        ({"x": np.zeros((4, 2)), "z": np.arange(4)}, r"the keys \['x', 'z'\], and the first had \['x', 'y'\]"),
    ],
    ids=["shape", "type", "number", "keys"],
)
def test_a_later_batch_of_another_form(second, match):
    first = cut([4])[0]
    if isinstance(second, dict):
        first = dict(zip("xy", first, strict=True))
    batches = stream([first, second])
    batches.next()
    with pytest.raises(ValueError, match=match):
        batches.next()


# Arguments of a kernel


SETTINGS = SGLDSettings(
    step_size=1e-3,
    temperature=1.0,
    steps_per_draw=1,
    noise="normal",
    subsampling="epoch",
    batch_size=None,
    gradient_noise_variance=0.0,
)


@pytest.mark.parametrize(
    ("given", "changes", "match"),
    [
        ("data.csv", {}, "must be an iterable of batches, .* got 'data.csv'"),
        ({"x": np.zeros(3)}, {}, "must be an iterable of batches"),
        (3, {}, "must be an iterable of batches, .* got 3"),
        (np.zeros((5, 2)), {}, r"minibatches is one array of shape \(5, 2\): pass it to MCMC.run"),
        ([1], {"batch_size": 5}, "minibatches and batch_size=5 exclude each other"),
        ([1], {"potential_fn": abs}, "minibatches and potential_fn=.* exclude each other"),
        ([1], {"subsampling": "with_replacement"}, "subsampling='with_replacement' has no effect with minibatches"),
    ],
    ids=["string", "dict", "number", "array", "batch_size", "potential_fn", "subsampling"],
)
def test_arguments_that_do_not_go_together(given, changes, match):
    changes = dict(changes)
    potential_fn = changes.pop("potential_fn", None)
    settings = SGLDSettings(**vars(SETTINGS) | changes)
    with pytest.raises(ValueError, match=match):
        check_iterable(given, potential_fn, settings)
    check_iterable(None, potential_fn, settings)


@pytest.mark.parametrize("given", [[1], iter([1]), (i for i in range(3)), Shuffled(4, 2)])
def test_iterables_are_taken_without_looking_at_them(given):
    check_iterable(given, None, SETTINGS)
    assert next(iter(given)) is not None


# Plates

B = 4


def plates(*sizes, observes=True, batch_size=B):
    return {f"p{i}": Plate(f"p{i}", size, batch_size, observes=observes) for i, size in enumerate(sizes)}


class WithoutLength:
    def __iter__(self):
        return iter([])

    def __len__(self):
        raise TypeError("an IterableDataset has no length")


@pytest.mark.parametrize(
    ("count", "size"),
    [(3, 12), (3, 9), (3, 15), (1, 4), (1, 7), (2, 5)],
    ids=["full", "short last batch", "rows dropped", "one batch", "one of two dropped", "1 row in the last"],
)
def test_plates_that_fit(count, size):
    check_plates([None] * count, B, plates(size))
    check_plates(WithoutLength(), B, plates(10 * size))
    check_plates(iter([]), B, plates(10 * size))


def test_other_plates_may_have_as_many_rows_as_a_batch():
    check_plates([None] * 3, B, plates(12, B))
    check_plates([None] * 3, B, plates(B, 12))


@pytest.mark.parametrize(
    ("found", "count", "match"),
    [
        ({}, 3, "no plate around the observed sites has the 4 rows of a batch .* subsample_size=4"),
        (plates(12, observes=False), 3, "no plate around the observed sites has the 4 rows"),
        (plates(12, batch_size=3), 3, "no plate around the observed sites has the 4 rows"),
        (plates(B), 3, "plate 'p0' has only the 4 rows of a batch, .* would count 3 times: write plate"),
        (plates(B), None, "plate 'p0' has only the 4 rows of a batch, .* would count N / B times"),
        (plates(8), 3, "plate 'p0' has 8 rows, but minibatches has 3 batches of 4"),
        (plates(16), 3, "plate 'p0' has 16 rows, but minibatches has 3 batches of 4"),
    ],
    ids=["none", "around latents", "other rows", "a batch", "a batch, no length", "too few", "too many"],
)
def test_plates_that_do_not_fit(found, count, match):
    with pytest.raises(ValueError, match=match):
        check_plates(WithoutLength() if count is None else [None] * count, B, found)
