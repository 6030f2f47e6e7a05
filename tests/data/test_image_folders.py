"""Folders of images: what is a split, what is a class, what is left out and said."""

import os

import pytest

from apart_hf import ApartError
from tests.support.helpers import load
from tests.support.images import write_classes, write_images


def rows(split, root):
    """{path within the split: class index} as loaded."""
    files = split.data.with_format("arrow")[:]["image"].to_pylist()
    return {os.path.relpath(cell["path"], root): label for cell, label in zip(files, split.labels().tolist())}


def found(root, **more):
    """{path: class name} of the training and of the evaluation split."""
    data = load(data_dir=str(root), **more)
    return [{path: data.class_names[i] for path, i in rows(split, root).items()} for split in (data.train, data.val)]


def expected(*paths, place=-2):
    return {path: path.split("/")[place] for path in paths}


@pytest.mark.parametrize(
    "name", ["train", "test", "val", "train_station", "bullet train", "dev-board", "valid", "eval"]
)
def test_a_class_may_be_called_like_a_split(name, tmp_path):
    write_classes(tmp_path, "train", "val", classes=("bus", name))
    train, val = found(tmp_path)
    for split, got in (("train", train), ("val", val)):
        assert got == expected(*(f"{split}/{one}/{i}.png" for one in ("bus", name) for i in range(2)))


@pytest.mark.parametrize("parent", ["test", "val/train", "my validation set", "a[b]*?{c}", "__x__", ".hidden"])
def test_the_names_above_the_folder_do_not_matter(parent, tmp_path):
    root = tmp_path / parent
    write_classes(root, "train", "val")
    train, val = found(root)
    assert train == expected("train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png")
    assert val == expected("val/a/0.png", "val/a/1.png", "val/b/0.png", "val/b/1.png")


@pytest.mark.parametrize(
    "train, val",
    [
        ("Training", "Testing"),
        ("Train", "Val"),
        ("TRAIN", "TEST"),
        ("training", "eval"),
        ("images/train", "images/Validation"),
        ("train", "dev"),
    ],
)
def test_names_of_splits(train, val, tmp_path):
    write_classes(tmp_path, train, val)
    data = load(data_dir=str(tmp_path))
    assert (data.train.name, data.val.name) == (train.split("/")[-1], val.split("/")[-1])
    assert set(rows(data.train, tmp_path)) == {f"{train}/{c}/{i}.png" for c in "ab" for i in range(2)}
    assert set(rows(data.val, tmp_path)) == {f"{val}/{c}/{i}.png" for c in "ab" for i in range(2)}


def test_the_order_in_which_splits_to_evaluate_on_are_taken(tmp_path):
    names = ["testing", "dev", "eval", "val"]  # from the last that is looked for to the first
    write_classes(tmp_path, "train")
    for name in names:
        write_classes(tmp_path, name)
        assert load(data_dir=str(tmp_path)).val.name == name
    beside = [note for note in load(data_dir=str(tmp_path)).notes if "passed over" in note]
    assert beside == ["3 others (dev/, eval/, testing/) beside train/, val/: passed over"]
    assert load(data_dir=str(tmp_path), val_split="dev").val.name == "dev"
    assert load(data_dir=str(tmp_path), val_split="DEV").val.name == "dev"


BESIDE_ONE = {
    ("val", ("train",)): [],
    ("val", ("Training", "unlabelled")): ["1 other (unlabelled/) beside val/: passed over"],
    ("val", ("train", "test")): ["1 other (test/) beside val/: passed over"],
    ("train", ("val", "test")): [],
    ("train", ("unlabelled",)): ["1 other (unlabelled/) beside train/: passed over"],
}


@pytest.mark.parametrize("only, others", BESIDE_ONE)
def test_where_one_split_is_wanted_those_for_the_other_are_not_noted(only, others, tmp_path):
    """To measure a model, `train/` has no part; what might have been measured in its place is named."""
    write_classes(tmp_path, only, *others)
    data = load(data_dir=str(tmp_path), only=only)
    assert data.train.name == only and list(data.notes) == BESIDE_ONE[only, others]


def test_a_training_split_that_is_not_trained_on_is_noted(tmp_path):
    write_classes(tmp_path, "train", "new", "val")
    data = load(data_dir=str(tmp_path), train_split="new")
    assert list(data.notes) == ["1 other (train/) beside new/, val/: passed over"]


def test_a_part_is_kept_of_the_training_split_and_the_test_split_is_not_trained_on(tmp_path):
    write_classes(tmp_path, "Training", "Testing", count=4)
    data = load(data_dir=str(tmp_path), val_fraction=0.5)
    assert {path.split("/")[0] for path in (*rows(data.train, tmp_path), *rows(data.val, tmp_path))} == {"Training"}
    assert set(rows(data.test, tmp_path)) == {f"Testing/{c}/{i}.png" for c in "ab" for i in range(4)}


@pytest.mark.parametrize(
    "splits, message",
    [
        (["Train", "training", "val"], "Train and training are splits of one meaning; name the one .* --train-split"),
        (["train", "val", "valid"], "valid and val are splits of one meaning; name the one .* --val-split"),
        (["train", "test", "Testing"], "test and Testing are splits of one meaning"),
        (["learn", "check"], "has 2 folders .check, learn., of which none is called so: .*--val-split.*--val-fraction"),
        (["x/train", "x/val", "y/train", "y/val"], "splits lie in 2 folders .x/, y/.; name .*--data-dir"),
        (["train"], "no split called validation .*: the splits are train; name one with --val-split"),
    ],
)
def test_splits_that_cannot_be_told(splits, message, tmp_path):
    write_classes(tmp_path, *splits)
    with pytest.raises(ApartError, match=message) as error:
        load(data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_splits_of_other_names_are_taken_where_they_are_named(tmp_path):
    write_classes(tmp_path, "learn", "check")
    train, val = found(tmp_path, train_split="learn", val_split="check")
    assert set(train) == {f"learn/{c}/{i}.png" for c in "ab" for i in range(2)} and len(val) == 4


def test_class_folders_alone_are_one_split(tmp_path):
    write_images(tmp_path, "bus/", "train/", "val/")
    train, val = found(tmp_path, val_fraction=0.5)
    assert {**train, **val} == expected(*(f"{c}/{i}.png" for c in ("bus", "train", "val") for i in range(2)))
    assert not set(train) & set(val)


def test_links_are_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_classes(elsewhere, "some", "other")
    root = tmp_path / "root"
    write_classes(root, "val")
    (root / "val" / "a" / "linked.png").symlink_to(elsewhere / "some" / "a" / "0.png")
    (root / "train").mkdir()
    (root / "train" / "b").symlink_to(elsewhere / "some" / "b")
    (root / "train" / "a").symlink_to(elsewhere / "other" / "a")
    train, val = found(root)
    assert train == expected("train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png")
    assert "val/a/linked.png" in val and len(val) == 5
    whole = tmp_path / "whole"
    whole.mkdir()
    for split in ("train", "val"):
        (whole / split).symlink_to(root / split)
    assert len(found(whole)[0]) == 4
    images = load(data_dir=str(whole)).train.cells([0, 3])
    assert all(os.path.isfile(cell["path"]) for cell, _ in images)


@pytest.mark.parametrize("target", [".", "train", "train/a"])
def test_a_loop_of_links_is_refused(target, tmp_path):
    write_classes(tmp_path, "train", "val")
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / target)
    with pytest.raises(ApartError, match=r"train/a/again is a link to a folder that it lies in.*remove the link"):
        load(data_dir=str(tmp_path))


def test_two_links_that_lead_to_each_other_are_refused(tmp_path):
    write_classes(tmp_path, "train", "val")
    (tmp_path / "train" / "a" / "b").symlink_to(tmp_path / "train" / "b")
    (tmp_path / "train" / "b" / "a").symlink_to(tmp_path / "train" / "a")
    with pytest.raises(ApartError, match="has no end"):
        load(data_dir=str(tmp_path))


def test_runs_in_the_data_folder_are_no_data(tmp_path):
    write_images(tmp_path, "a/", "b/", "output/run/plots/training.png", "b/run-2/plots/training.png")
    for run in ("output/run", "b/run-2"):
        (tmp_path / run / "config.yaml").write_text("model: x\n")
    train, val = found(tmp_path, val_fraction=0.5)
    assert {**train, **val} == expected("a/0.png", "a/1.png", "b/0.png", "b/1.png")
    assert load(data_dir=str(tmp_path), val_fraction=0.5).notes == ()


STRAYS = {
    "train/x.png": "1 image (x.png) directly in train/ in no class folder: left out",
    "test/1.png": "1 other (test/) beside train/, val/: passed over",
    "cover.png": "1 other (cover.png) beside train/, val/: passed over",
    "train/a/@eaDir/0.png/SYNOPHOTO_THUMB_M.png": "1 folder (train/a/@eaDir/) of thumbnails or of the system: left out",
    "train/thumbnails/1.png": "1 folder (train/thumbnails/) of thumbnails or of the system: left out",
    "val/b/Thumbs/1.png": "1 folder (val/b/Thumbs/) of thumbnails or of the system: left out",
    "train/empty/.DS_Store": "1 folder (empty) in train/ without images: no class",
    "train/notes/read.txt": "1 folder (notes) in train/ without images: no class",
    "train/metadata.csv": "train/metadata.csv is not read: the class folders tell the labels",
    "train/a/photo.HEIC": "1 HEIC file (train/a/photo.HEIC): left out, since Pillow cannot read them; pip install "
    "pillow-heif, or convert them",
    "train/.DS_Store": None,
    "train/Thumbs.db": None,
    "train/.thumbs/x.png": None,
    "__MACOSX/train/a/._0.png": None,
    "train/a/._0.png": None,
    "train/a/notes.txt": None,
    "stray.parquet": None,
    "train/a/features.parquet": None,
}


@pytest.mark.parametrize("stray", STRAYS)
def test_one_stray_file_drops_no_label(stray, tmp_path):
    write_classes(tmp_path, "train", "val")
    if stray.endswith(".png"):
        write_images(tmp_path, stray)
    else:
        (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stray).write_text("file_name,text\na/0.png,a bus\n")
    train, val = found(tmp_path)
    assert train == expected(*(f"train/{c}/{i}.png" for c in "ab" for i in range(2)))
    assert val == expected(*(f"val/{c}/{i}.png" for c in "ab" for i in range(2)))
    assert list(load(data_dir=str(tmp_path)).notes) == ([STRAYS[stray]] if STRAYS[stray] else [])


def test_the_class_is_the_folder_directly_below_the_split(tmp_path):
    write_images(tmp_path, "train/a/cam1/", "train/a/cam2/deep/", "train/__x__/cam1/", "val/a/", "val/__x__/cam1/")
    data = load(data_dir=str(tmp_path))
    assert data.class_names == ["__x__", "a"] and [len(data.train), len(data.val)] == [6, 4]
    train, _ = found(tmp_path)
    assert train == expected(*train, place=1)
    assert "it sees 2 that are none here, like 'cam1'" in data.timm


def test_one_class_in_two_unicode_forms(tmp_path):
    composed, parts = "caf\u00e9", "cafe\u0301"
    write_images(tmp_path, f"train/{composed}/", "train/b/", f"val/{parts}/", "val/b/", f"train/{parts}/x.png")
    data = load(data_dir=str(tmp_path))
    assert data.class_names == ["b", composed]
    assert sorted(data.train.labels().tolist()) == [0, 0, 1, 1, 1] and sorted(data.val.labels()) == [0, 0, 1, 1]
    assert "another Unicode form" in data.timm


def test_classes_of_one_split_alone_are_said(tmp_path):
    write_images(tmp_path, "train/a/", "train/b/", "train/d/", "val/a/", "val/c/", "val/d/")
    data = load(data_dir=str(tmp_path))
    assert data.class_names == ["a", "b", "c", "d"]
    assert data.notes == (
        "1 class (c) with images in split 'val' and none to train on",
        "1 class (b) with training images and none in split 'val'",
    )
    write_images(tmp_path / "tiny", "train/n1/images/", "train/n2/images/", "val/images/")
    with pytest.raises(ApartError, match=r"no image of a class that .*: 1 class .images. against 2 classes .n1, n2."):
        load(data_dir=str(tmp_path / "tiny"))


def test_one_class_is_refused(tmp_path):
    write_classes(tmp_path, "train", "val", classes=("a",))
    with pytest.raises(ApartError, match="has one class, 'a', of which any network is always right"):
        load(data_dir=str(tmp_path))


def test_images_that_are_split_by_name_but_have_no_labels(tmp_path):
    write_images(tmp_path, "train/", "val/")
    with pytest.raises(ApartError, match=r"2 folders .train/, val/., but no class folders.*one folder a class"):
        load(data_dir=str(tmp_path))
    (tmp_path / "train.csv").write_text("id,label\n0,a\n")
    with pytest.raises(ApartError, match=r"images and train\.csv, but no class folders; make it metadata.csv"):
        load(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    "file, message",
    [
        ("images.zip", "no images, but images.zip; unpack it"),
        ("deep/images.tar.gz", "no images, but deep/images.tar.gz; unpack it"),
        ("a/1.heic", "no images that Pillow can read, but 1 HEIC file .a/1.heic.; pip install pillow-heif"),
        ("read.txt", "1 file .read.txt. that are no images; it needs whole parquet files"),
        (None, "it is empty; it needs whole parquet files, one folder of images a class"),
    ],
)
def test_other_things_are_named(file, message, tmp_path):
    if file:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ApartError, match=f"cannot load .*: {message}") as error:
        load(data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_file_whose_name_is_no_text(tmp_path):
    write_classes(tmp_path, "train", "val")
    os.rename(tmp_path / "train/a/0.png", os.fsencode(tmp_path / "train/a") + b"/\xff.png")
    with pytest.raises(ApartError, match="'train/a/' holds a file whose name is no UTF-8; rename it"):
        load(data_dir=str(tmp_path))


@pytest.mark.parametrize("write", ["csv", "jsonl"])
@pytest.mark.parametrize("place", ["", "train/images/"])
def test_labels_in_a_file_of_metadata(write, place, tmp_path):
    for split in ("train", "val"):
        inner = place.removeprefix("train/")
        write_images(tmp_path / split, *(f"{inner}{i}.png" for i in range(4)))
        labels = {f"{inner}{i}.png": ["class 10", "class 2"][i % 2] for i in range(3)}
        if write == "csv":
            lines = ["\ufefffile_name,label", *(f"{name},{label}" for name, label in labels.items())]
        else:
            lines = [f'{{"file_name": "{name}", "label": "{label}"}}' for name, label in labels.items()]
        (tmp_path / split / f"metadata.{write}").write_text("\n".join(lines))
    data = load(data_dir=str(tmp_path))
    assert data.class_names == ["class 2", "class 10"] and data.train.labels().tolist() == [1, 0, 1]
    assert data.labels_from == f"train/metadata.{write} and val/metadata.{write}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("file_name,label\n0.png,a\n9.png,b\n", "metadata.csv: row 2 names 9.png, which is not there"),
        ("file_name,label\n0.png,a\n1.png,\n", "metadata.csv: row 2 has no label"),
    ],
)
def test_metadata_that_is_wrong(text, message, tmp_path):
    write_images(tmp_path, "train/", "val/")
    for split in ("train", "val"):
        (tmp_path / split / "metadata.csv").write_text(text)
    with pytest.raises(ApartError, match=message):
        load(data_dir=str(tmp_path))
