"""The size that the images of a split have: of most of them, else the median; never that of one odd file."""

import io
from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags
from PIL import Image as PIL

from apart_hf import ApartError
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import Split
from apart_hf.data.image_sizes import ImageSizes
from apart_hf.data.loading import load_image_data
from apart_hf.data.settings import DataSettings
from apart_hf.runs.report import describe_data
from tests.support.helpers import load


def file(size, orientation=None):
    content, block = io.BytesIO(), PIL.Exif()
    if orientation is not None:
        block[ExifTags.Base.Orientation] = orientation
    PIL.new("L", size).save(content, "JPEG", exif=block.tobytes())
    return content.getvalue()


def split_of(contents, streamed=False):
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    rows = {"image": [{"bytes": one, "path": None} for one in contents], "label": [0] * len(contents)}
    data = Dataset.from_dict(rows, features=features)
    return Split.of(data.to_iterable_dataset() if streamed else data, "train", "image", "label", size=len(contents))


def reference(sizes):
    """The rule in plain words."""
    (most, count), *_ = Counter(sizes).most_common()
    if count >= 0.9 * len(sizes):
        return most
    edge = int(np.median([min(size) for size in sizes]))
    return edge, edge


@given(st.lists(st.sampled_from([(32, 32), (40, 30), (1, 1), (500, 375), (375, 500), (20_000, 1)]), min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_sizes(sizes):
    found = ImageSizes.of(sizes)
    assert found.decided == reference(sizes)
    assert (found.note is None) == (len(set(sizes)) == 1)
    if found.note is not None:
        usual = Counter(sizes).most_common(1)[0][1] >= 0.9 * len(sizes)
        assert found.note.endswith("(their size)" if usual else "(a square of the median of the shorter edges)")


@pytest.mark.parametrize("odd", [(40, 30), (1, 1), (3000, 2000), (20_000, 1)])
@pytest.mark.parametrize("streamed", [False, True])
def test_one_odd_file_does_not_decide(odd, streamed):
    """The first one, which alone decided once."""
    photos = [file(odd), *(file((500 + i, 400)) for i in range(20))]
    assert split_of(photos, streamed).image_size(skip_bad=False) == (400, 400)
    small = [file(odd), *(file((32, 32)) for _ in range(20))]
    assert split_of(small, streamed).image_size(skip_bad=False) == (32, 32)


def test_a_turned_photo_has_its_upright_size():
    turned = [file((40, 30), orientation) for orientation in (6, 8, 5, 7)]
    assert split_of([*turned, file((30, 40))]).image_size(skip_bad=False) == (30, 40)


def test_256_images_are_looked_at_and_their_headers_alone(monkeypatch):
    looked = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    content = [file((20 + i % 2, 30))[:-4] for i in range(5)]  # damaged, but for the header

    def count(cell):
        looked.append(cell["bytes"])
        return 20, 30

    assert split_of(content).image_size(skip_bad=False) == (20, 20)  # two in five are wider
    monkeypatch.setattr("apart_hf.data.splits.upright_size", count)
    content = [bytes(f"{i}", "ascii") for i in range(1000)]
    assert split_of(content).image_size(skip_bad=False) == (20, 30)
    drawn = [int(one) for one in looked]
    assert len(drawn) == len(set(drawn)) == 256 and drawn == sorted(drawn) and 450 < np.mean(drawn) < 550
    looked.clear()
    split_of(content).image_size(skip_bad=False)
    assert [int(one) for one in looked] == drawn  # by the seed
    looked.clear()
    split_of(content, streamed=True).image_size(skip_bad=False)
    assert [int(one) for one in looked] == list(range(256))
    looked.clear()
    split_of(content[:100]).image_size(skip_bad=False)
    assert len(looked) == 100


@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_read(streamed):
    split = split_of([b"no image", file((32, 32)), file((32, 32))], streamed)
    with pytest.raises(ApartError, match=r"image 0 of split 'train' \(row 0, column 'image'\) cannot be decoded"):
        split.image_size(skip_bad=False)
    assert split.image_size(skip_bad=True) == (32, 32)
    with pytest.raises(ApartError, match="no image of split 'train' can be decoded"):
        split_of([b"no image"] * 3, streamed).image_size(skip_bad=True)


def test_the_run_says_where_sizes_differ(tmp_path):
    sizes = [(32, 32)] * 19 + [(40, 30)]
    for part in ("train", "test"):
        for number, size in enumerate(sizes):
            folder = tmp_path / part / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            PIL.new("L", size).save(folder / f"{number}.png")
    config = TrainConfig(data_dir=str(tmp_path))
    data = load_image_data(DataSettings(data_dir=str(tmp_path)))
    lines = [line for line in describe_data(config, data, (3, 32, 32), "workers") if "several sizes" in line]
    assert lines == [
        "data: images have several sizes: of 20 looked at 19 have 32x32 pixels, and shorter edges are 30 to 32; they "
        "are taken for images of 32x32 (their size)."
    ]
    assert not [line for line in describe_data(TrainConfig(), load(), (3, 28, 28), "memory") if "several sizes" in line]
