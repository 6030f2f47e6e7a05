"""Columns and labels: which are taken, what they may be called, and what no training can use."""

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from apart_hf import ApartError
from tests.support.helpers import load
from tests.support.images import images, labelled


def test_a_name_beside_a_folder_lends_its_settings(parquet):
    part = labelled(column="img", label="fine_label")
    data = load("cifar100", parquet(train=part, test=part))
    assert data.spec.mean == (0.4914, 0.4822, 0.4465) and data.class_names == ["cat", "dog"]


def test_parquet_folder_with_other_names(parquet):
    folder = parquet(train=labelled(column="img", label="fine_label"), test=labelled(column="img", label="fine_label"))
    data = load(data_dir=folder)
    assert (data.spec.input_key, data.spec.target_key, data.spec.val_split) == ("img", "fine_label", "test")
    assert data.class_names == ["cat", "dog"] and data.image_size == (20, 16)


def test_integer_labels_without_names(parquet):
    parts = {"train": labelled(names=(), labels=[0, 2, 1, 1, 0, 2]), "test": labelled(names=(), labels=[1] * 6)}
    data = load(data_dir=parquet(**parts))
    assert data.class_names == ["0", "1", "2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"train_split": "trian"}, r"no split 'trian': the splits are train, test; name one with --train-split"),
        ({"val_split": "dev"}, r"no split 'dev': the splits are train, test; name one with --val-split"),
        (
            {"input_key": "picture"},
            r"'picture' is no image column: the columns are image \(Image\), label \(ClassLabel\)",
        ),
        ({"target_key": "image"}, r"'image' is no class label column: .*--target-key"),
        ({"num_classes": 3}, r"--num-classes 3, but .* has 2 classes"),
    ],
)
def test_names_that_do_not_exist(parquet, arguments, message):
    folder = parquet(train=labelled(), test=labelled())
    with pytest.raises(ApartError, match=message):
        load(data_dir=folder, **arguments)


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": labelled()}, "no split called validation or .*: the splits are train;.*--val-split"),
        (
            {"train": labelled(), "test": labelled(names=("cat", "cow", "dog"))},
            r"'test': 2 labels .* first at index 2 \(2\)",
        ),
        (
            {"train": labelled(labels=[0, 1, -1, 0, 1, 0]), "test": labelled()},
            r"'train': 1 labels .*0\.\.1, .* index 2 \(-1\)",
        ),
        (
            {"train": labelled(names=(), labels=[0, 1, None] * 2), "test": labelled()},
            "'train': 2 labels are missing, .* at 2",
        ),
        (
            {"train": labelled(names=(), labels=[0, 1] * 3), "test": labelled(names=(), labels=[5] * 6)},
            r"'test': 6 labels",
        ),
        ({"train": labelled().remove_columns("label"), "test": labelled()}, "cannot load|no class label column"),
    ],
)
def test_data_that_cannot_be_trained_on(parquet, splits, message):
    with pytest.raises(ApartError, match=message) as error:
        load(data_dir=parquet(**splits))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, message",
    [
        (Value("string"), r"no class label column: .*label \(string\); make one .*class_encode_column"),
        (Value("bool"), "class_encode_column"),
        (Value("binary"), r"no image column: .*image \(binary\).*; make one .*cast_column"),
    ],
)
def test_columns_of_another_type_are_told_how_to_become_one(kind, message, parquet):
    values = {"string": "cat", "bool": True, "binary": b"no image"}
    column = "image" if kind.dtype == "binary" else "label"
    rows = labelled().remove_columns(column).add_column(column, [values[kind.dtype]] * 6, feature=kind)
    with pytest.raises(ApartError, match=message) as error:
        load(data_dir=parquet(train=rows, test=rows))
    assert "--target-key" not in str(error.value) and "--input-key" not in str(error.value)


def test_an_integer_column_of_another_name_is_taken_where_it_is_named(parquet):
    rows = labelled(names=(), labels=[0, 1] * 3, label="y")
    folder = parquet(train=rows, test=rows)
    with pytest.raises(ApartError, match=r"y \(int64\); name one with --target-key"):
        load(data_dir=folder)
    assert load(data_dir=folder, target_key="y").train.labels().tolist() == list(rows["y"])


def test_classes_that_differ_between_the_splits(tmp_path):
    DatasetDict(train=labelled(), test=labelled(names=("dog", "cat"))).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ApartError, match="another order"):
        load(data_dir=str(tmp_path / "saved"))


def test_labels_of_any_integer_type(tmp_path):
    for kind in ("uint8", "int32"):
        rows = Dataset.from_dict(
            {"image": images(6), "label": [0, 1, 2, 0, 1, 2]},
            features=Features({"image": Image(), "label": Value(kind)}),
        )
        folder = tmp_path / kind
        folder.mkdir()
        for split in ("train", "test"):
            rows.to_parquet(str(folder / f"{split}.parquet"))
        assert load(data_dir=str(folder)).class_names == ["0", "1", "2"]


def test_a_label_beyond_the_number_of_images(tmp_path):
    rows = Dataset.from_dict(
        {"image": images(4), "label": [0, 1, 255, 1]}, features=Features({"image": Image(), "label": Value("int64")})
    )
    for split in ("train", "test"):
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    message = r"label 255 at index 2 \(row 2, column 'label'\) would make 256 classes of 4 images; .*--num-classes"
    with pytest.raises(ApartError, match=message):
        load(data_dir=str(tmp_path))
    assert len(load(data_dir=str(tmp_path), num_classes=256).class_names) == 256
