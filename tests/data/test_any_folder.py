"""Any folder of images gives what a plain walk over it finds."""

import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.helpers import load
from tests.support.images import write_images

CLASSES = (
    "train",
    "test",
    "val",
    "Validation set",
    "bullet train",
    "10",
    "2",
    "B",
    "a",
    "caf\u00e9",
    "cafe\u0301",
    "[x]*",
    "__y__",
    "x y",
    "\u00e5ngstr\u00f6m",
    "x\u00b2",
)
FILES = ("0.png", "1.PNG", "train.jpg", "cam 1/2.png", "test/3.webp", "val/[1]/4.bmp")
STRAYS = (
    "{}/notes.txt",
    "{}/x.png",
    "{}/a/.hidden.png",
    "{}/.cache/1.png",
    "{}/a/@eaDir/1.png",
    "x.png",
    "other/1.png",
)
ENDINGS = (".png", ".jpg", ".webp", ".bmp")

trees = st.dictionaries(
    st.sampled_from(CLASSES), st.sets(st.sampled_from(FILES), min_size=1), min_size=2, max_size=5
).filter(lambda tree: len({unicodedata.normalize("NFC", name) for name in tree}) > 1)


def walked(split):
    """{path: class name} by a plain walk."""
    found = {}
    for folder, below, files in os.walk(split, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".") and name != "@eaDir"]
        inside = os.path.relpath(folder, split).split(os.sep)
        for name in files:
            if inside != ["."] and not name.startswith(".") and name.lower().endswith(ENDINGS):
                found[os.path.join(folder, name)] = unicodedata.normalize("NFC", inside[0])
    return found


@settings(max_examples=40, deadline=None)
@given(
    trees,
    st.sampled_from(["train", "Train", "TRAINING"]),
    st.sampled_from(["val", "Valid", "test", "Eval"]),
    st.sampled_from(["", "images", "my train set"]),
    st.sets(st.sampled_from(STRAYS), max_size=3),
    st.sets(st.sampled_from(CLASSES), max_size=1),
)
def test_a_folder_is_read_as_a_plain_walk_reads_it(tree, train, val, base, strays, linked):
    root = Path(tempfile.mkdtemp())
    try:
        place = root / base
        files = [
            f"{split}/{name}/{file}" for split in (train, val) for name, several in tree.items() for file in several
        ]
        write_images(place, *files, *(stray.format(train) for stray in sorted(strays) if stray.endswith(".png")))
        (place / train / "notes.txt").write_text("x")
        for name in (name for name in linked if not (place / train / name).exists()):
            (place / train / name).symlink_to(place / val / next(iter(tree)))
        data = load(data_dir=str(root))
        for split, folder in ((data.train, train), (data.val, val)):
            cells = split.cells(list(range(len(split))))
            want = walked(place / folder)
            assert {cell["path"]: data.class_names[label] for cell, label in cells} == want
            assert len(cells) == len(want)
    finally:
        shutil.rmtree(root)
