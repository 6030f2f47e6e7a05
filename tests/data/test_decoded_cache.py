"""Decoded images on disk: the same as decoded anew, never those of other images, and never a reason to end."""

import json
import os
import threading
import time

import numpy as np
import PIL
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageFile
from safetensors import SafetensorError

from apart_hf import ApartError
from apart_hf.data import Loaders, LoaderSettings, Split, decoded_cache, splits
from apart_hf.data.dataset_memory import OtherSize, decode
from apart_hf.data.decoded_cache import DecodedCache, cache_folder
from apart_hf.runs.train import train
from tests.support.helpers import load
from tests.support.images import BAD, png, write_bad
from tests.support.processes import assert_equal_runs
from tests.support.settings import CONFIG_16, settings

EDGE = 16


@pytest.fixture
def cache(tmp_path):
    return DecodedCache(tmp_path / "cache" / "decoded")


@pytest.fixture
def decodings(monkeypatch):
    """Counts the images that are decoded."""
    seen, rgb = [], splits.rgb
    monkeypatch.setattr(splits, "rgb", lambda encoded: seen.append(1) or rgb(encoded))
    return seen


def column(cells):
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    rows = {"image": cells, "label": [i % 10 for i in range(len(cells))]}
    return Split.of(Dataset.from_dict(rows, features=features), "train", "image", "label")


def cells(count=12):
    return [{"bytes": png(seed), "path": None} for seed in range(count)]


def same(found, want):
    return all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, want, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_second_time_nothing_is_decoded(channels, cache, decodings):
    split = column(cells())
    plain = decode(split, EDGE, channels=channels)
    first = decode(split, EDGE, channels=channels, cache=cache)
    assert len(decodings) == 24
    again = decode(split, EDGE, channels=channels, cache=DecodedCache(cache.folder))
    assert len(decodings) == 24 and same(first, plain) and same(again, plain)
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]
    again[0].zero_()  # a tensor of one's own: what is kept stays
    assert same(decode(split, EDGE, channels=channels, cache=cache), plain)


def test_the_same_images_read_otherwise_are_the_same_file(cache):
    """Rows of a part, or behind an index, and the labels have no part in it."""
    whole = column(cells())
    order = np.array([5, 2, 9])
    part, copy = whole.part(order), column([cells()[i] for i in order])
    assert cache.key(part, EDGE, 3) == cache.key(copy, EDGE, 3) != cache.key(whole, EDGE, 3)


CHANGES = {
    "one image": lambda c: [*c[:7], {"bytes": png(99), "path": None}, *c[8:]],
    "one byte of a file": lambda c: [*c[:7], {"bytes": c[7]["bytes"] + b"\0", "path": None}, *c[8:]],
    "order": lambda c: [c[1], c[0], *c[2:]],
    "fewer": lambda c: c[:-1],
    "one more": lambda c: [*c, c[0]],
    "one lost": lambda c: [*c[:7], None, *c[8:]],
    "bytes at the border": lambda c: [
        {"bytes": c[0]["bytes"][:-1], "path": None},
        {"bytes": c[0]["bytes"][-1:] + c[1]["bytes"], "path": None},
        *c[2:],
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_another_file(change, cache):
    assert cache.key(column(cells()), EDGE, 3) != cache.key(column(CHANGES[change](cells())), EDGE, 3)


@pytest.mark.parametrize(
    "place, name, value",
    [
        (PIL, "__version__", "99.0"),
        (ImageFile, "LOAD_TRUNCATED_IMAGES", True),
        (PILImage, "MAX_IMAGE_PIXELS", 100),
        (decoded_cache.features, "version", lambda name: "99"),
        (decoded_cache.decoding, "__file__", decoded_cache.__file__),  # other code of ours
        (decoded_cache.grey_levels, "__file__", decoded_cache.__file__),
        (decoded_cache.sys, "warnoptions", ["error"]),
    ],
)
def test_another_decoder_is_another_file(place, name, value, cache, monkeypatch):
    split = column(cells(2))
    keys = {cache.key(split, EDGE, 3), cache.key(split, EDGE, 1), cache.key(split, 8, 3)}
    monkeypatch.setattr(place, name, value)
    assert len(keys) == 3 and cache.key(split, EDGE, 3) not in keys


def test_image_files_are_known_by_their_times_too(cache, tmp_path, decodings):
    """One that is replaced by another of its size is another, also where its time is set back."""
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        PILImage.new("RGB", (EDGE, EDGE), (i, 0, 0)).save(file)
    split = column([{"bytes": None, "path": str(file)} for file in files])
    decode(split, EDGE, cache=cache)
    decode(split, EDGE, cache=cache)
    assert len(decodings) == 3
    before = files[1].stat()
    PILImage.new("RGB", (EDGE, EDGE), (77, 0, 0)).save(files[1])
    assert files[1].stat().st_size == before.st_size
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    found, _ = decode(split, EDGE, cache=cache)
    assert len(decodings) == 6 and found[1, 0, 0, 0] == 77


def test_images_elsewhere_are_not_kept(cache):
    """Their content is known only when they are read."""
    split = column([{"bytes": None, "path": "zip://a.png::https://example.org/a.zip"}])
    assert cache.key(split, EDGE, 3) is None and not cache.folder.exists()


DAMAGE = {
    "truncated": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "header alone": lambda content: content[:40],
    "empty": lambda content: b"",
    "a bit of a pixel": lambda content: content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:],
    "a bit of which were decoded": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "more": lambda content: content + b"\0" * 8,
    "text": lambda content: b"no tensors at all" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_not_used_and_written_anew(damage, cache, decodings):
    split = column(cells())
    want = decode(split, EDGE, cache=cache)
    (file,) = cache.folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert same(decode(split, EDGE, cache=cache), want) and len(decodings) == 24
    assert file.read_bytes() == whole and [file] == list(cache.folder.iterdir())


def test_a_file_of_other_images_under_the_name_is_their_own_damage(cache):
    """The tensors of another file have a checksum of their own: the name is what tells images apart."""
    split = column(cells())
    cache.save("other", torch.zeros(1, 2, 2, 4, dtype=torch.uint8), torch.ones(1, dtype=torch.bool))
    assert cache.load("other") is not None and cache.load(cache.key(split, EDGE, 3)) is None


def test_bad_images_are_left_out_in_the_same_way(cache, tmp_path, monkeypatch, decodings):
    (tmp_path / "data").mkdir()
    data = load(data_dir=write_bad(tmp_path / "data"), skip_bad=True)
    monkeypatch.setattr("apart_hf.data.loaders.cache_folder", lambda: cache.folder)
    found = []
    for is_kept in (False, True, True):
        made = Loaders(
            data, LoaderSettings(CONFIG_16, 8, 8, "memory", skip_bad=True, decoded_cache=is_kept), Accelerator(cpu=True)
        )
        train_loader, val_loader = made.train(), made.evaluation(data.val)
        train_loader.set_epoch(1)
        batches = [list(loader) for loader in (train_loader, val_loader)]
        found.append((batches, [loader.dataset.take_skipped() for loader in (train_loader, val_loader)]))
    # both splits have the same images, which are kept once
    assert len(decodings) == 48 + 24 and [counts for _, counts in found] == [[2, 2]] * 3
    for batches, _ in found[1:]:
        for some, others in zip(batches, found[0][0], strict=True):
            assert all(same(a, b) for a, b in zip(some, others, strict=True))
    # and where they are no longer passed over, the first is named as ever
    with pytest.raises(ApartError, match=rf"image {BAD[0]} of split 'train' .* cannot be decoded"):
        decode(data.train, EDGE, cache=cache)


def test_images_of_another_size_are_an_error_as_ever(cache):
    split = column([*cells(3), {"bytes": png(0, (8, 8)), "path": None}])
    for _ in range(2):
        with pytest.raises(OtherSize, match="image 3 of split 'train'"):
            decode(split, EDGE, cache=cache)
    assert not cache.folder.exists()


def fails_with(error):
    def fails(*arguments, **options):
        raise error

    return fails


@pytest.mark.parametrize("kind", ["no folder", "full", "full, as safetensors says it", "read-only", "not renamed"])
def test_where_nothing_can_be_kept_one_line_says_so(kind, little, tmp_path, monkeypatch, capsys, spoken):
    folder = tmp_path / "cache" / "decoded"
    monkeypatch.setattr("apart_hf.data.loaders.cache_folder", lambda: folder)
    if kind == "no folder":
        (tmp_path / "cache").write_text("a file")
    elif kind == "full":
        monkeypatch.setattr(decoded_cache, "save_file", fails_with(OSError(28, "No space left on device")))
    elif kind == "full, as safetensors says it":
        error = SafetensorError("I/O error: No space left on device (os error 28)")

        def half(tensors, file, metadata):
            file.write_bytes(b"half of it")
            raise error

        monkeypatch.setattr(decoded_cache, "save_file", half)
    elif kind == "read-only":
        monkeypatch.setattr("pathlib.Path.mkdir", _read_only(folder))
    else:
        replace = os.replace
        fails = fails_with(OSError(18, "Invalid cross-device link"))
        monkeypatch.setattr(os, "replace", lambda a, b: (fails if folder in b.parents else replace)(a, b))
    run = train(settings(little, tmp_path / "out", epochs=1, max_steps=1, checkpoint_every=None))
    said = [line for line in capsys.readouterr().out.splitlines() if "decoded" in line]
    assert len(said) == 1 and str(folder) in said[0] and "--no-decoded-cache" in said[0], said
    assert json.loads((run / "metrics.jsonl").read_text())["train_loss"] > 0
    assert not folder.exists() or not list(folder.iterdir())  # nothing half-written


def _read_only(folder):
    from pathlib import Path

    mkdir = Path.mkdir

    def refused(self, *arguments, **options):
        if self == folder:
            raise OSError(30, "Read-only file system", str(self))
        return mkdir(self, *arguments, **options)

    return refused


def test_a_cache_that_can_be_read_alone_is_read(cache, decodings, monkeypatch):
    split = column(cells())
    want = decode(split, EDGE, cache=cache)
    monkeypatch.setattr(decoded_cache, "save_file", fails_with(OSError(30, "Read-only file system")))
    assert same(decode(split, EDGE, cache=cache), want) and len(decodings) == 12


def test_several_that_write_at_once(cache):
    """Whoever reads meanwhile finds nothing, or all of it."""
    split = column(cells())
    want, key = decode(split, EDGE), cache.key(split, EDGE, 3)
    found, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            found.append(cache.load(key))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=lambda: [cache.save(key, *want) for _ in range(20)]) for _ in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    reader.join()
    assert any(one is not None for one in found) and all(one is None or same(one, want) for one in found)
    assert len(list(cache.folder.iterdir())) == 1


def test_what_was_not_finished_is_removed_when_it_is_old(cache):
    cache.folder.mkdir(parents=True)
    old, new = cache.folder / ".key-0.part", cache.folder / ".key-1.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    cache.save("key", *decode(column(cells(2)), EDGE))
    assert not old.exists() and new.exists()


def test_a_second_run_is_the_first_and_decodes_nothing(little, tmp_path, monkeypatch, decodings):
    folder = tmp_path / "decoded"
    monkeypatch.setattr("apart_hf.data.loaders.cache_folder", lambda: folder)
    more = {"epochs": 1, "checkpoint_every": None}
    plain = train(settings(little, tmp_path / "plain", no_decoded_cache=True, **more))
    assert not folder.exists() and len(decodings) == 72 + 30
    for name in ("first", "second"):
        assert_equal_runs(plain, train(settings(little, tmp_path / name, **more)))
    assert len(decodings) == 2 * (72 + 30) and len(list(folder.iterdir())) == 2


def test_it_is_in_the_cache_of_the_data(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "moved")
    assert cache_folder() == tmp_path / "moved" / "apart_hf-decoded"
