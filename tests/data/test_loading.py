"""Datasets from every kind of source, and sources that are not there."""

import numpy as np
import pytest
from datasets import DatasetDict

from apart_hf import ApartError
from apart_hf.data import DATASETS
from apart_hf.data.dataset_map import TransformedImages
from apart_hf.data.decoding import rgb
from tests.support.helpers import demo_rows, load
from tests.support.images import images, labelled


def test_the_bundled_data():
    data = load("demo")
    assert (len(data.train), len(data.val)) == (6000, 1000)
    assert data.class_names[0] == "T-shirt/top" and data.image_size == (28, 28)
    for part, per_class in ((data.train, 600), (data.val, 100)):
        assert np.bincount(part.labels()).tolist() == [per_class] * 10


def test_no_image_is_in_both_splits():
    data = load("demo")
    pixels = [{rgb(cell).tobytes() for cell, _ in part.cells(range(len(part)))} for part in (data.train, data.val)]
    assert not pixels[0] & pixels[1]


@pytest.mark.parametrize("position", [0, 3])
def test_a_corrupt_image_is_named(tmp_path, position):
    for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / part).mkdir(parents=True)
        for i, image in enumerate(images(5)):
            image.save(tmp_path / part / f"{i}.png")
    file = tmp_path / "train" / "cat" / f"{position}.png"
    file.write_bytes(b"no image")
    with pytest.raises(ApartError, match=rf"image {position} of split 'train' \({file}\) cannot be decoded"):
        data = load(data_dir=str(tmp_path))
        TransformedImages(data.train, lambda image: image).__getitems__([1, 2, 3])


def test_image_folder(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i, image in enumerate(images(3)):
                image.save(tmp_path / part / name / f"{i}.png")
    data = load(data_dir=str(tmp_path))
    assert data.class_names == ["cat", "dog"] and len(data.train) == len(data.val) == 6
    assert sorted(data.train.labels()) == [0, 0, 0, 1, 1, 1]


def test_saved_to_disk(tmp_path):
    DatasetDict(train=labelled(), validation=labelled(4)).save_to_disk(str(tmp_path / "saved"))
    data = load(data_dir=str(tmp_path / "saved"))
    assert (len(data.train), len(data.val), data.spec.val_split) == (6, 4, "validation")


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(ApartError, match="does not exist"):
        load(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ApartError, match="data/nowhere does not exist"):
        load(data_dir="data/nowhere")  # a folder is never taken for a Hub id
    with pytest.raises(ApartError, match=r"cannot load .*; it needs whole parquet files"):
        load(data_dir=str(tmp_path))
    with pytest.raises(ApartError, match="unknown dataset 'cifar-100': did you mean 'cifar100'"):
        load("cifar-100")
    with pytest.raises(ApartError, match=r"cannot load someone/nothing: .*--data-dir"):
        load("someone/nothing")


def test_a_folder_of_a_registered_dataset_may_name_things_in_its_own_way(tmp_path):
    """tiny-imagenet on the Hub calls its split valid, cifar10 its column img."""
    for split in ("train", "validation"):
        demo_rows("train").select(range(8)).to_parquet(str(tmp_path / f"{split}.parquet"))
    for name in ("tiny-imagenet", "cifar10"):
        found = load(name, str(tmp_path)).spec
        assert (found.train_split, found.val_split) == ("train", "validation")
        assert (found.input_key, found.target_key) == ("image", "label")
    assert found.mean == (0.4914, 0.4822, 0.4465)
    with pytest.raises(ApartError, match="no split 'valid'"):
        load("tiny-imagenet", str(tmp_path), val_split="valid")


def test_the_registry_is_true_of_the_demo_set():
    spec, data = DATASETS["demo"], load()
    assert (spec.num_classes, spec.image_size) == (len(data.class_names), data.image_size[0])
    assert (spec.train_size, spec.val_size) == (len(data.train), len(data.val))


@pytest.mark.parametrize("name", DATASETS)
def test_every_registered_dataset_is_described(name):
    spec = DATASETS[name]
    assert all((spec.train_split, spec.val_split, spec.input_key, spec.target_key))
    assert spec.num_classes and spec.image_size and spec.train_size > spec.val_size
    assert (spec.mean is None) == (spec.image_size > 32)  # the model's own, as timm's users expect


def test_one_split_saved_by_itself(tmp_path):
    demo_rows("train").select(range(200)).save_to_disk(str(tmp_path / "saved"))
    data = load(data_dir=str(tmp_path / "saved"), val_fraction=0.2)
    assert (len(data.train), len(data.val), data.test) == (160, 40, None)
