"""Datasets from every kind of source, and the errors a user meets."""

import io

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from apart_hf import ApartError
from apart_hf.data import DATASETS, data_config
from apart_hf.data.dataset_map import TransformedImages
from apart_hf.data.decoding import rgb
from apart_hf.data.transforms import eval_transform, train_transform
from tests.support.helpers import demo_rows, load


def images(count, size=(20, 16), mode="RGB"):
    rng = np.random.default_rng(0)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return [PILImage.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode) for _ in range(count)]


def split(count=6, names=("cat", "dog"), label="label", labels=None, column="image"):
    values = labels if labels is not None else [i % len(names) for i in range(count)]
    kind = ClassLabel(names=list(names)) if names else Value("int64")
    return Dataset.from_dict({column: images(count), label: values}, features=Features({column: Image(), label: kind}))


@pytest.fixture
def parquet(tmp_path):
    def write(**splits):
        for name, data in splits.items():
            data.to_parquet(str(tmp_path / f"{name}-00000-of-00001.parquet"))
        return str(tmp_path)

    return write


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


def test_grey_images_become_rgb_tensors():
    data = load("demo")
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), data.image_size, mean=(0.286,) * 3)
    image, label = TransformedImages(data.val, eval_transform(config))[0]
    assert image.shape == (3, 28, 28) and isinstance(label, int)
    ((cell, _),) = data.val.cells([0])
    assert PILImage.open(io.BytesIO(cell["bytes"])).mode == "L"


def test_the_evaluation_transform_leaves_small_images_alone():
    data = load("demo")
    config = data_config({"input_size": (3, 224, 224)}, data.image_size, mean=(0.25,) * 3, std=(0.5,) * 3)
    image = rgb(data.val.cells([0])[0][0])
    tensor = eval_transform(config)(image)
    pixels = torch.from_numpy(np.array(image)[..., 0])
    assert torch.allclose(tensor[0], (pixels / 255 - 0.25) / 0.5)


def test_the_training_transform_is_pad_4_crop_flip():
    """Every drawn image is one of the 9 x 9 crops of the padded original, flipped or not; all of them occur."""
    config = data_config({"input_size": (3, 224, 224)}, (8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    original = images(1, (8, 8))[0]
    padded = torch.nn.functional.pad(torch.from_numpy(np.array(original)).permute(2, 0, 1) / 255, (4, 4, 4, 4))
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[:, y : y + 8, x : x + 8]
            crops[crop.numpy().tobytes()], crops[crop.flip(-1).numpy().tobytes()] = (y, x, False), (y, x, True)
    torch.manual_seed(0)
    transform = train_transform(config, (8, 8))
    drawn = [crops[transform(original).numpy().tobytes()] for _ in range(600)]
    assert len({(y, x) for y, x, _ in drawn}) > 78
    assert 250 < sum(flipped for *_, flipped in drawn) < 350  # four standard deviations


def test_large_images_take_timms_transform():
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (500, 400))
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] < 1
    assert "RandomResizedCrop" in str(train_transform(config, (500, 400)))
    assert train_transform(config, (500, 400))(images(1, (500, 400))[0]).shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(28, 40), (40, 28)])
def test_small_images_that_are_not_square(size):
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), size)
    for transform in (train_transform(config, size), eval_transform(config)):
        assert transform(images(1, size)[0]).shape == (3, 28, 28)


def test_images_of_mixed_sizes():
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (32, 32))
    for transform in (train_transform(config, (32, 32)), eval_transform(config)):
        for size in ((32, 32), (20, 24), (300, 200)):
            assert transform(images(1, size)[0]).shape == (3, 32, 32)


@pytest.mark.parametrize("position", [0, 3])
def test_a_corrupt_image_is_named(tmp_path, position):
    for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / part).mkdir(parents=True)
        for i, image in enumerate(images(5)):
            image.save(tmp_path / part / f"{i}.png")
    (tmp_path / "train" / "cat" / f"{position}.png").write_bytes(b"no image")
    with pytest.raises(ApartError, match=f"image {position} of split 'train' cannot be decoded"):
        data = load(data_dir=str(tmp_path))
        TransformedImages(data.train, lambda image: image).__getitems__([1, 2, 3])


def test_a_name_beside_a_folder_lends_its_settings(parquet):
    part = split(column="img", label="fine_label")
    data = load("cifar100", parquet(train=part, test=part))
    assert data.spec.mean == (0.4914, 0.4822, 0.4465) and data.class_names == ["cat", "dog"]


def test_img_size_resizes():
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (28, 28), img_size=40)
    for transform in (train_transform(config, (28, 28)), eval_transform(config)):
        assert transform(images(1, (28, 28))[0]).shape == (3, 40, 40)


def test_parquet_folder_with_other_names(parquet):
    folder = parquet(train=split(column="img", label="fine_label"), test=split(column="img", label="fine_label"))
    data = load(data_dir=folder)
    assert (data.spec.input_key, data.spec.target_key, data.spec.val_split) == ("img", "fine_label", "test")
    assert data.class_names == ["cat", "dog"] and data.image_size == (20, 16)


def test_integer_labels_without_names(parquet):
    parts = {"train": split(names=(), labels=[0, 2, 1, 1, 0, 2]), "test": split(names=(), labels=[1] * 6)}
    data = load(data_dir=parquet(**parts))
    assert data.class_names == ["0", "1", "2"]


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
    DatasetDict(train=split(), validation=split(4)).save_to_disk(str(tmp_path / "saved"))
    data = load(data_dir=str(tmp_path / "saved"))
    assert (len(data.train), len(data.val), data.spec.val_split) == (6, 4, "validation")


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
    folder = parquet(train=split(), test=split())
    with pytest.raises(ApartError, match=message):
        load(data_dir=folder, **arguments)


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": split()}, "no split called validation or .*: the splits are train;.*--val-split"),
        ({"train": split(), "test": split(names=("cat", "cow", "dog"))}, r"'test': 2 labels .* first at index 2 \(2\)"),
        (
            {"train": split(labels=[0, 1, -1, 0, 1, 0]), "test": split()},
            r"'train': 1 labels .*0\.\.1, .* index 2 \(-1\)",
        ),
        (
            {"train": split(names=(), labels=[0, 1, None] * 2), "test": split()},
            "'train': 2 labels are missing, .* at 2",
        ),
        ({"train": split(names=(), labels=[0, 1] * 3), "test": split(names=(), labels=[5] * 6)}, r"'test': 6 labels"),
        ({"train": split().remove_columns("label"), "test": split()}, "cannot load|no class label column"),
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
    rows = split().remove_columns(column).add_column(column, [values[kind.dtype]] * 6, feature=kind)
    with pytest.raises(ApartError, match=message) as error:
        load(data_dir=parquet(train=rows, test=rows))
    assert "--target-key" not in str(error.value) and "--input-key" not in str(error.value)


def test_an_integer_column_of_another_name_is_taken_where_it_is_named(parquet):
    rows = split(names=(), labels=[0, 1] * 3, label="y")
    folder = parquet(train=rows, test=rows)
    with pytest.raises(ApartError, match=r"y \(int64\); name one with --target-key"):
        load(data_dir=folder)
    assert load(data_dir=folder, target_key="y").train.labels().tolist() == list(rows["y"])


def test_classes_that_differ_between_the_splits(tmp_path):
    DatasetDict(train=split(), test=split(names=("dog", "cat"))).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ApartError, match="another order"):
        load(data_dir=str(tmp_path / "saved"))


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
    with pytest.raises(ApartError, match=r"label 255 at index 2 would make 256 classes of 4 images; .*--num-classes"):
        load(data_dir=str(tmp_path))
    assert len(load(data_dir=str(tmp_path), num_classes=256).class_names) == 256


def test_one_split_saved_by_itself(tmp_path):
    demo_rows("train").select(range(200)).save_to_disk(str(tmp_path / "saved"))
    data = load(data_dir=str(tmp_path / "saved"), val_fraction=0.2)
    assert (len(data.train), len(data.val), data.test) == (160, 40, None)


def test_grey_of_16_bits():
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    PILImage.fromarray(ramp).save(file, "PNG")
    assert (np.asarray(rgb({"bytes": file.getvalue(), "path": None})) == (ramp >> 8)[..., None]).all()


def test_small_images_are_resized_alike_in_training_and_evaluation():
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (28, 28), img_size=40, interpolation="nearest")
    original = images(1, (28, 28))[0]
    torch.manual_seed(0)
    want = eval_transform(config)(original)
    drawn = [train_transform(config, (28, 28), padding=0)(original) for _ in range(8)]
    assert all(any(torch.equal(one, other) for other in (want, want.flip(-1))) for one in drawn)
