"""Opening a folder costs one look at each folder, and nothing for each file."""

import os
import sys

import pytest

from apart_hf.data.image_folder import ImageFolder
from apart_hf.data.tree import Folder
from tests.support.images import write_images

CLASSES, FILES = 20, 1000


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    write_images(root, "one.png")
    for number in range(CLASSES):
        (root / f"train/{number}").mkdir(parents=True)
        (root / f"val/{number}").mkdir(parents=True)
        os.link(root / "one.png", root / f"val/{number}/0.png")
        for index in range(FILES):
            os.link(root / "one.png", root / f"train/{number}/{index}.png")
    (root / "one.png").unlink()
    return str(root)


@pytest.fixture
def counted(monkeypatch):
    """Calls that ask the file system, by name."""
    calls = {}

    def counting(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **kwargs)

        return call

    for name in ("scandir", "listdir", "stat", "lstat", "readlink", "open"):
        monkeypatch.setattr(os, name, counting(name))
    return calls


def test_20_000_files_are_listed_by_one_look_at_each_folder(large, counted):
    found = ImageFolder(Folder(large)).load(["train", "val"])
    assert len(found["train"]) == CLASSES * FILES and len(found["val"]) == CLASSES
    folders = 1 + 2 * (1 + CLASSES)
    assert counted.pop("scandir") == folders
    assert sum(counted.values()) <= 4 * folders, counted  # whether it is a run, and where links lead


def test_rows_are_read_without_an_object_for_each(large):
    """Loader processes that count references to Python objects would copy what they were forked with."""
    split = ImageFolder(Folder(large)).load(["train"])["train"]
    assert sum(chunk.nbytes for chunk in split.data.column("image").chunks) > 20_000 * len(large)
    objects = sum(sys.getsizeof(value) for value in vars(split).values())
    assert objects < 10_000
    assert split[19_999]["image"]["path"].startswith(large)
