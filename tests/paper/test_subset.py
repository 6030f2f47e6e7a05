"""A part of a dataset in smaller images."""

import numpy as np
import pytest
from PIL import Image

from apart_hf import ApartError
from apart_hf.data import DataSettings
from apart_hf.data.decoding import rgb
from apart_hf.data.fingerprint import fingerprint
from apart_hf.paper.subset import reduce_data
from tests.support.helpers import load


def test_a_part_in_smaller_images(tmp_path):
    folder = tmp_path / "part"
    reduce_data(DataSettings(), folder, classes=3, images=50, edge=7)
    whole, part = load(), load(data_dir=str(folder))
    assert part.class_names == whole.class_names[:3] and np.bincount(part.train.labels()).tolist() == [50] * 3
    of_classes = sum(int((split.labels() < 3).sum()) for split in (whole.train, whole.val))
    assert len(part.train) + len(part.val) == of_classes

    def pixels(split, edge):
        rows = [i for i, label in enumerate(split.labels()) if label < 3]
        images = [np.asarray(rgb(cell).resize((edge, edge), Image.Resampling.BOX)) for cell, _ in split.cells(rows)]
        return sorted(image.tobytes() for image in images)

    assert sorted(pixels(part.train, 7) + pixels(part.val, 7)) == sorted(pixels(whole.train, 7) + pixels(whole.val, 7))
    ((cell, label),) = part.val.cells([0])  # the first evaluation image of these classes, by plain means of squares
    first = next(i for i, label in enumerate(whole.val.labels()) if label < 3)
    ((original, same),) = whole.val.cells([first])
    means = np.asarray(rgb(original), dtype=float).reshape(7, 4, 7, 4, 3).mean((1, 3))
    assert label == same and np.abs(np.asarray(rgb(cell)) - means).max() <= 1  # rounded twice
    before = fingerprint(part)
    reduce_data(DataSettings(), folder, classes=3, images=60, edge=7)  # it is there already
    assert fingerprint(load(data_dir=str(folder))) == before
    reduce_data(DataSettings(), tmp_path / "other", classes=3, images=50, edge=14)
    assert fingerprint(load(data_dir=str(tmp_path / "other"))) != before
    with pytest.raises(ApartError, match=r"has 10 classes, .* this scale needs 20 with more than 250"):
        reduce_data(DataSettings(), tmp_path / "more", classes=20, images=250, edge=16)
    assert {path.name for path in tmp_path.iterdir()} == {"part", "other"}
