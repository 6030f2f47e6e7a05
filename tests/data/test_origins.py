"""What is wrong with an image or a label is said of its file, or of its row and column, by any loader."""

import itertools
import re
import zlib

import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PIL

from apart_hf import ApartError
from apart_hf.data import Loaders, LoaderSettings, Split
from apart_hf.data.dataset_stream import StreamedImages
from tests.support.helpers import load
from tests.support.images import damaged, labelled, png
from tests.support.settings import CONFIG_16

LOADERS = {
    "memory": {"loader": "memory"},
    "workers": {"loader": "workers"},
    "one worker": {"loader": "workers", "workers": 1},
    "stream": {},
    "stream, one worker": {"workers": 1},
}
BAD = 5


def folder_of_images(folder):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(4):
                (folder / part / name / f"{number}.png").write_bytes(png(number))
    bad = folder / "train/dog/1.png"
    bad.write_bytes(damaged("truncated"))
    return str(bad)


def table(name=None):
    content = [png(number) for number in range(8)]
    content[BAD] = damaged("truncated")
    features = Features({"picture": Image(), "label": ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": one, "path": name and f"{number}-{name}"} for number, one in enumerate(content)]
    return Dataset.from_dict({"picture": cells, "label": [0] * 4 + [1] * 4}, features=features)


def parquet(folder):
    table().to_parquet(str(folder / "train.parquet"))
    table().to_parquet(str(folder / "test.parquet"))
    return f"row {BAD}, column 'picture'"


def parquet_in_parts(folder):
    for part in range(2):
        table("a.png").shard(2, part).to_parquet(str(folder / f"train-{part:05}-of-00002.parquet"))
    table().to_parquet(str(folder / "test.parquet"))
    return f"row {BAD}, column 'picture', {BAD}-a.png"


def saved(folder):
    DatasetDict(train=table("b.png"), test=table()).save_to_disk(str(folder / "saved"))
    return f"row {BAD}, column 'picture', {BAD}-b.png"


@pytest.mark.parametrize(
    "write, loader",
    [*itertools.product((folder_of_images, parquet_in_parts), LOADERS), (parquet, "workers"), (saved, "stream")],
)
def test_a_bad_image_is_named_where_it_is(write, loader, tmp_path):
    named = write(tmp_path)
    place = str(tmp_path / "saved") if write is saved else str(tmp_path)
    data = load(data_dir=place, streaming=loader.startswith("stream"))
    made = Loaders(data, LoaderSettings(CONFIG_16, 4, 4, **LOADERS[loader]), Accelerator(cpu=True))
    for give in (made.train, lambda: made.evaluation(data.train)):
        want = re.escape(f"image {BAD} of split 'train' ({named}) cannot be decoded")
        with pytest.raises(ApartError, match=want):
            for _ in range(2):
                list(give())


@pytest.mark.parametrize("label", [-1, 7, None])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_label_is_named_where_it_is(label, streaming, parquet):
    rows = labelled(names=(), labels=[0, 1, 1, label, 0, 1])
    with pytest.raises(ApartError, match=r"3 .*\brow 3, column 'label'"):
        data = load(data_dir=parquet(train=rows, test=rows), streaming=streaming, num_classes=2)
        list(Loaders(data, LoaderSettings(CONFIG_16, 6, 6), Accelerator(cpu=True)).evaluation(data.val))


def test_a_bad_label_of_a_file(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(6)]
    for path in paths:
        PIL.new("L", (8, 8)).save(path)
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": paths, "label": [0, 1, 0, None, 1, 0]}, features=features)
    with pytest.raises(ApartError, match=re.escape(f"1 labels are missing, the first at 3 ({paths[3]})")):
        Split.of(rows, "train", "image", "label").labels()
    rows = Dataset.from_dict({"image": paths, "label": [0, 1, 0, 1, 9, 0]}, features=features)
    split = Split.of(rows, "train", "image", "label", streamed=True)
    with pytest.raises(ApartError, match=re.escape(f"image 4 of split 'train' ({paths[4]}) has label 9, outside 0..1")):
        list(StreamedImages(split, lambda image: torch.zeros(1), classes=2))


def test_of_an_image_that_is_searched_too_long_the_number_read_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("apart_hf.data.splits._SEARCH_SECONDS", -1)
    monkeypatch.setattr("apart_hf.data.splits._AT_ONCE", 2)
    parquet_in_parts(tmp_path)
    data = load(data_dir=str(tmp_path), streaming=True)
    dataset = StreamedImages(data.train, lambda image: torch.zeros(1), classes=2, batches=2, batch_size=4)
    with pytest.raises(
        ApartError, match=r"the \d\. image of split 'train' that process 0 .* \(column 'picture', 5-a\.png\)"
    ):
        list(dataset)


def test_a_decompression_bomb_is_named_before_training(tmp_path):
    folder_of_images(tmp_path)
    bomb = tmp_path / "train/cat/9.png"
    whole = png()
    header = whole[12:16] + (30_000).to_bytes(4) * 2 + whole[24:29]
    bomb.write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4) + whole[33:])
    with pytest.raises(ApartError, match=re.escape(f"({bomb}) cannot be decoded (Image size (900000000 pixels)")):
        load(data_dir=str(tmp_path))


def test_an_image_of_another_size_is_named(tmp_path):
    for part in ("train", "val"):
        for number in range(20):
            folder = tmp_path / part / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            PIL.new("RGB", (16, 16) if number != 8 else (17, 16)).save(folder / f"{number}.png")
    data = load(data_dir=str(tmp_path))
    want = re.escape(f"({tmp_path}/train/class0/8.png) has 17x16 pixels, others 16x16")
    with pytest.raises(ApartError, match=want):
        Loaders(data, LoaderSettings(CONFIG_16, 4, 4, "memory"), Accelerator(cpu=True)).train()
