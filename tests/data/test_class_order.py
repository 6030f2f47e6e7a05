"""Classes come in the order in which timm's own reader of image folders has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key as timm_key

from apart_hf import ApartError
from apart_hf.data.class_order import in_order, natural_key
from tests.support.helpers import load
from tests.support.images import write_classes, write_images

NAMES = ("1", "2", "10", "20", "Zebra", "ant", "Bee", "a b", "\u00e9t\u00e9", "x1y", "x12y", "x2y", "__z__")


def test_the_order_is_that_of_timm_s_reader(tmp_path):
    write_classes(tmp_path, "train", "val", classes=NAMES)
    data = load(data_dir=str(tmp_path))
    for split in (data.train, data.val):
        theirs = ReaderImageFolder(str(tmp_path / split.name))
        assert list(theirs.class_to_idx) == data.class_names
        cells = split.cells(list(range(len(split))))
        assert {cell["path"]: label for cell, label in cells} == dict(theirs.samples)
    assert data.timm is None and data.class_names.index("2") < data.class_names.index("10")


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), max_size=8, unique=True))
def test_any_names_are_sorted_by_timm_s_key(names):
    ours = in_order(names)
    assert sorted(ours) == sorted(names)
    try:
        keys = [timm_key(name) for name in ours]
    except ValueError:  # timm fails for digits that are no decimals
        return
    assert keys == sorted(keys)


def test_digits_that_are_no_decimals_can_be_sorted():
    assert in_order(["\u00b2", "x10", "x9", "\u2460"]) == ["x9", "x10", "\u00b2", "\u2460"]
    with pytest.raises(ValueError, match="invalid literal"):
        timm_key("\u00b2")
    assert natural_key("a") != natural_key("A")  # a tie of timm's, which it breaks at random


@pytest.mark.parametrize(
    "extra, said",
    [
        ("train/a/cam/1.png", "it sees 1 that are none here, like 'cam'"),
        ("train/.cache/1.png", "it sees 1 that are none here, like '.cache'"),
        ("train/c/1.webp", "it sees 1 fewer, like 'c' (--class-map class_map.txt mends it)"),
        ("val/0/1.png", "it sees 1 fewer, like '0' (--class-map class_map.txt mends it)"),
    ],
)
def test_where_timm_s_reader_sees_other_classes(extra, said, tmp_path):
    write_classes(tmp_path, "train", "val")
    write_images(tmp_path, extra)
    data = load(data_dir=str(tmp_path))
    assert data.timm.endswith(said)
    split = data.timm.split(" in ")[1].split("/")[0]
    assert list(ReaderImageFolder(str(tmp_path / split)).class_to_idx) != data.class_names


@pytest.mark.parametrize(
    "text", ["a\nb\n", "\ufeffa\nb\n", "0 a\n1 b\n", "1\tb\n0\ta\n", "0: a\n1: b", "\ufeff0,a\r\n1,b\r\n"]
)
def test_a_class_map(text, tmp_path):
    write_classes(tmp_path, "train", "val")
    (tmp_path / "map.txt").write_text(text, encoding="utf-8", newline="")
    data = load(data_dir=str(tmp_path), class_map=str(tmp_path / "map.txt"))
    assert data.class_names == ["a", "b"] and data.train.labels().tolist() == [0, 0, 1, 1]
    if not text.startswith(("\ufeff", "0", "1")):
        assert load_class_map(str(tmp_path / "map.txt")) == {"a": 0, "b": 1}


def test_a_class_map_of_names_that_begin_with_numbers(tmp_path):
    names = ["3 series", "5 series"]
    write_classes(tmp_path, "train", "val", classes=names)
    for order in (names, names[::-1]):
        (tmp_path / "map.txt").write_text("\n".join(order))
        assert load(data_dir=str(tmp_path), class_map=str(tmp_path / "map.txt")).class_names == order
    write_classes(tmp_path / "zero", "train", "val", classes=("0 a", "1 b"))
    (tmp_path / "map.txt").write_text("1 b\n0 a\n")
    assert load(data_dir=str(tmp_path / "zero"), class_map=str(tmp_path / "map.txt")).class_names == ["1 b", "0 a"]


def test_a_class_map_that_lacks_a_class(tmp_path):
    write_classes(tmp_path, "train", "val")
    (tmp_path / "map.txt").write_text("0 a\n1 c\n")
    with pytest.raises(ApartError, match="2 class names are not in both it and the data, the first is 'b'"):
        load(data_dir=str(tmp_path), class_map=str(tmp_path / "map.txt"))
