"""What loader processes share with the main process stays shared: no object of Python stands for an image.

A forked process copies a page of memory as soon as it counts references to an object there. Of 300,000 rows of paths a
loader process took 0.7 MB more at the end of an epoch than at its start, by a stream 0.5 MB; with a list of samples, as
torchvision's ImageFolder has one, 52 MB at once and 65 MB at the end.
"""

import gc
import types

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from apart_hf.data import Split
from apart_hf.data.dataset_map import TransformedImages
from apart_hf.data.dataset_stream import StreamedImages


def table(count):
    paths = pa.array([f"/data/train/class{number % 10}/{number}.jpg" for number in range(count)])
    images = pa.StructArray.from_arrays([pa.nulls(count, pa.binary()), paths], ["bytes", "path"])
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=10)})
    rows = pa.table({"image": images, "label": pa.array(np.arange(count) % 10)})
    return Dataset(rows.cast(features.arrow_schema))


def objects(root):
    """How many objects of Python it holds, itself and by way of others, but for code."""
    seen, left = set(), [root]
    code = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
    while left:
        one = left.pop()
        if id(one) not in seen and not isinstance(one, code):
            seen.add(id(one))
            left += gc.get_referents(one)
    return len(seen)


def plain(split):
    return TransformedImages(split, torch.tensor, training=True, workers=2)


def part(split):
    return TransformedImages(split.part(np.arange(0, len(split), 2)), torch.tensor, training=True, workers=2)


def stream(split):
    return StreamedImages(split, torch.tensor, classes=10, batches=2, batch_size=8, workers=2)


@pytest.mark.parametrize("make", [plain, part, stream])
def test_no_object_stands_for_an_image(make):
    counts = [
        objects(make(Split.of(table(count), "train", "image", "label", streamed=make is stream)))
        for count in (100, 20_000)
    ]
    assert abs(counts[1] - counts[0]) < 100, counts


def test_a_list_would_be_seen():
    assert objects([str(number) for number in range(5000)]) > 5000
