"""Folders of parquet files and tar shards: splits by their names, columns and labels as people have them."""

import io
import tarfile
import tracemalloc

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from apart_hf import ApartError
from apart_hf.data.labels import check_labels
from apart_hf.data.split_names import split_of_file
from apart_hf.data.splits import Split
from tests.support.helpers import load
from tests.support.images import images, png, write_classes, write_images

PLACES = {
    "data/train-00000-of-00001.parquet": "train",
    "validation-00003-of-00008-a1b2c3.parquet": "validation",
    "Train.parquet": "Train",
    "my test set/val/0.parquet": "val",
    "train_0.parquet": "train",
    "0001-test.parquet": "test",
    "bullet train/x.parquet": None,
    "trainstation.parquet": None,
    "train-test.parquet": None,
    "test/train.parquet": "train",
}


@pytest.mark.parametrize("place", PLACES)
def test_the_split_of_a_file(place):
    assert split_of_file(place) == PLACES[place]


def rows(labels, names=("a", "b"), **columns):
    kind = ClassLabel(names=list(names)) if names else Value("int64")
    features = Features({"image": Image(), "label": kind, **{key: kind for key, (kind, _) in columns.items()}})
    values = {key: values for key, (_, values) in columns.items()}
    return Dataset.from_dict({"image": images(len(labels)), "label": labels, **values}, features=features)


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in splits.items():
        data.to_parquet(str(folder / f"{name}.parquet"))
    return str(folder)


@pytest.mark.parametrize("folder", ["plain", "my [test] set*", "val/train", "__x__"])
def test_parquet_below_any_folder(folder, tmp_path):
    data = load(data_dir=write(tmp_path / folder, train=rows([0, 1, 1]), Test=rows([1, 0])))
    assert data.train.labels().tolist() == [0, 1, 1] and data.val.labels().tolist() == [1, 0]
    assert data.val.name == "Test"


def test_files_of_no_split(tmp_path):
    data = load(data_dir=write(tmp_path, part1=rows([0, 1]), part2=rows([1, 0])), val_fraction=0.5)
    assert len(data.train) + len(data.val) == 4
    write(tmp_path, train=rows([0, 1]), test=rows([1, 0]))
    data = load(data_dir=str(tmp_path))
    assert len(data.train) == 2 and data.notes == ("2 files (part1.parquet, part2.parquet) of no split: left out",)


@pytest.mark.parametrize("layout", ["splits", "classes"])
def test_images_beside_a_stray_parquet_are_images(layout, tmp_path):
    if layout == "splits":
        write_classes(tmp_path, "train", "val")
        rows([0, 1]).to_parquet(str(tmp_path / "train.parquet"))
    else:
        write_images(tmp_path, "a/", "b/")
        rows([0, 1]).to_parquet(str(tmp_path / "features.parquet"))
    data = load(data_dir=str(tmp_path), val_fraction=0.5)
    assert data.labels_from == "class folders"


def test_a_picture_beside_parquet_does_not_hide_it(tmp_path):
    write_images(tmp_path, "assets/logo.png", "preview.png")
    data = load(data_dir=write(tmp_path, train=rows([0, 1, 1]), test=rows([1, 0])))
    assert data.labels_from is None and len(data.train) == 3


@pytest.mark.parametrize("named", [True, False])
def test_tar_shards(named, tmp_path):
    for split, count in (("train", 6), ("validation", 4)):
        for shard in range(2):
            with tarfile.open(tmp_path / f"set-{split}-{shard:04}.tar", "w") as file:
                for i in range(count // 2):
                    for ending, content in (("png", png(i)), ("cls", str((shard + i) % 2).encode())):
                        info = tarfile.TarInfo(f"{shard}{i}.{ending}")
                        info.size = len(content)
                        file.addfile(info, io.BytesIO(content))
    more = {"val_split": "validation"} if named else {}
    data = load(data_dir=str(tmp_path), **more)
    assert data.train.labels().tolist() == [0, 1, 0, 1, 0, 1] and len(data.val) == 4
    assert (data.spec.input_key, data.spec.target_key) == ("png", "cls")


INT, TEXT, FLAG = Value("int64"), Value("string"), Value("bool")


@pytest.mark.parametrize(
    "columns, wanted",
    [
        ({"label_quality": INT, "label": INT}, "label"),
        ({"source": ClassLabel(names=["web", "own"]), "label": INT}, "label"),
        ({"num_labels": INT, "class_id": INT}, "class_id"),
        ({"cls": INT, "target": INT, "labels": INT}, "labels"),
        ({"coarse_label": ClassLabel(names=["x", "y"]), "fine_label": ClassLabel(names=["a", "b"])}, "fine_label"),
        ({"kind": ClassLabel(names=["x", "y"]), "age": INT}, "kind"),
        ({"label": TEXT, "class_id": INT}, "class_id"),
    ],
)
def test_which_column_is_taken(columns, wanted, tmp_path):
    values = {"int64": [0, 1, 0, 1], "string": list("abab")}
    data = {key: values.get(getattr(kind, "dtype", "int64"), values["int64"]) for key, kind in columns.items()}
    part = Dataset.from_dict({"image": images(4), **data}, features=Features({"image": Image(), **columns}))
    loaded = load(data_dir=write(tmp_path, train=part, test=part))
    assert loaded.spec.target_key == wanted and loaded.train.labels().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"kind": ClassLabel(names=["x", "y"]), "source": ClassLabel(names=["x", "y"])},
            "2 class label columns, kind, s",
        ),
        (
            {"label": TEXT, "source": ClassLabel(names=["x", "y"])},
            r"no class label column: .*label \(string\).*name one",
        ),
        ({"label_quality": INT}, r"no class label column: .*name one with --target-key"),
    ],
)
def test_columns_that_cannot_be_told(columns, message, tmp_path):
    values = {"int64": [0, 1, 0, 1], "string": list("abab")}
    data = {key: values.get(getattr(kind, "dtype", "int64"), values["int64"]) for key, kind in columns.items()}
    part = Dataset.from_dict({"image": images(4), **data}, features=Features({"image": Image(), **columns}))
    with pytest.raises(ApartError, match=message):
        load(data_dir=write(tmp_path, train=part, test=part))


def test_two_image_columns(tmp_path):
    def part(*names):
        columns = {name: images(4) for name in names} | {"label": [0, 1, 0, 1]}
        return Dataset.from_dict(columns, features=Features({**dict.fromkeys(names, Image()), "label": INT}))

    folder = write(tmp_path / "one", train=part("mask", "image"), test=part("mask", "image"))
    assert load(data_dir=folder).spec.input_key == "image"
    folder = write(tmp_path / "two", train=part("mask", "scan"), test=part("mask", "scan"))
    with pytest.raises(ApartError, match="2 image columns, mask, scan; name the one to take by --input-key"):
        load(data_dir=folder)
    assert load(data_dir=folder, input_key="scan").spec.input_key == "scan"


def test_labels_from_1_to_k(tmp_path):
    folder = write(tmp_path, train=rows([1, 2, 3, 3], names=None), test=rows([3, 1], names=None))
    data = load(data_dir=folder)
    assert data.class_names == ["1", "2", "3"]
    assert data.train.labels().tolist() == [0, 1, 2, 2] and data.val.labels().tolist() == [2, 0]
    assert load(data_dir=folder, num_classes=3).train.labels().tolist() == [0, 1, 2, 2]
    asked = load(data_dir=folder, num_classes=4)
    assert asked.class_names == ["0", "1", "2", "3"] and asked.train.labels().tolist() == [1, 2, 3, 3]
    # as a model of these classes measures them
    again = load(data_dir=folder, only="val", num_classes=3, class_names=("1", "2", "3"))
    assert again.val.labels().tolist() == [2, 0]
    named = load(data_dir=folder, only="val", num_classes=3, class_names=("x", "y", "z"))
    assert named.val.labels().tolist() == [2, 0]


def test_labels_with_a_0_in_one_split_are_as_they_are(tmp_path):
    data = load(data_dir=write(tmp_path, train=rows([1, 2, 2], names=None), test=rows([0, 1], names=None)))
    assert data.class_names == ["0", "1", "2"] and data.val.labels().tolist() == [0, 1]


def test_some_classes_of_a_model_can_be_measured(tmp_path):
    folder = write(tmp_path, train=rows([0, 1]), test=rows([1, 0, 1]))
    data = load(data_dir=folder, only="val", num_classes=3, class_names=("b", "c", "a"))
    assert data.val.labels().tolist() == [0, 2, 0] and data.val.name == "test"
    with pytest.raises(ApartError, match=r"the model: 1 class names are not in both .* the first is 'b'"):
        load(data_dir=folder, only="val", num_classes=2, class_names=("a", "c"))


def test_a_million_labels_are_arrays():
    """Labels never become Python objects: 8 MB a look, whatever their number."""
    count = 1_000_000
    features = Features({"image": Image(), "label": INT})
    part = Dataset.from_dict({"image": [None] * count, "label": np.arange(count) % 1000}, features=features)
    split = Split.of(part, "train", "image", "label")
    tracemalloc.start()
    check_labels(split, 1000)
    with pytest.raises(ApartError, match=r"1000 labels are outside 0\.\.998, the first at index 999"):
        check_labels(split, 999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
