"""Streams: every image once in evaluation, full batches and a fixed length in training, the same again by seed."""

import itertools
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PIL

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import Loaders, LoaderSettings
from apart_hf.data.dataset_stream import StreamedImages
from apart_hf.runs.train import train
from tests.support.helpers import ROOT, load, run
from tests.support.settings import CONFIG_16

ROWS = 103  # each of a class of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training split in 4 parts and an evaluation split in 3."""
    folder, rng = tmp_path_factory.mktemp("stream"), np.random.default_rng(0)
    images = [PIL.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(ROWS)]
    rows = Dataset.from_dict(
        {"image": images, "label": list(range(ROWS))},
        features=Features({"image": Image(), "label": ClassLabel(num_classes=ROWS)}),
    )
    for name, parts in (("train", 4), ("test", 3)):
        for part in range(parts):
            rows.shard(parts, part).to_parquet(str(folder / f"{name}-{part:05}-of-{parts:05}.parquet"))
    return str(folder)


def label_of(split, process=0, processes=1, **more):
    """The stream without its images."""
    return StreamedImages(
        split, lambda image: torch.zeros(1), classes=ROWS, process=process, processes=processes, **more
    )


def batches_of(dataset, workers=0):
    training = dataset.batches is not None
    loader = torch.utils.data.DataLoader(dataset, 8, num_workers=workers, drop_last=training)
    return [batch.tolist() for _, batch in loader]


def labels(dataset, workers=0):
    return list(itertools.chain(*batches_of(dataset, workers)))


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (3, 1)])
def test_evaluation_sees_every_image_once(processes, workers, folder):
    split = load(data_dir=folder, streaming=True).val
    found = [labels(label_of(split, process, processes, workers=workers), workers) for process in range(processes)]
    assert sorted(itertools.chain(*found)) == list(range(ROWS))


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 3), (2, 0), (3, 0)])
def test_an_epoch_has_full_batches_and_as_many_on_every_process(processes, workers, folder):
    split = load(data_dir=folder, streaming=True).train
    batches = ROWS // (8 * processes)
    more = {"batches": batches, "batch_size": 8, "workers": workers, "buffer": 20}
    for process in range(processes):
        dataset = label_of(split, process, processes, **more)
        found = batches_of(dataset, workers)
        assert [len(batch) for batch in found] == [8] * batches and len(dataset) == 8 * batches


def test_without_workers_no_image_comes_twice_in_an_epoch(folder):
    split = load(data_dir=folder, streaming=True).train
    dataset = label_of(split, batches=12, batch_size=8, buffer=20)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(labels(dataset))
        assert len(set(epochs[-1])) == 96
    assert epochs[0] == epochs[2] != epochs[1] and epochs[0] != sorted(epochs[0])
    halves = [label_of(split, process, 2, batches=6, batch_size=8) for process in range(2)]
    assert not set(labels(halves[0])) & set(labels(halves[1]))


def test_a_process_that_runs_out_goes_on_in_another_order(folder):
    split = load(data_dir=folder, streaming=True).train
    found = labels(label_of(split, batches=25, batch_size=8, buffer=20))
    assert set(found[:ROWS]) == set(range(ROWS)) and found[:97] != found[ROWS:200]


def test_processes_that_live_on_see_the_next_epoch(folder):
    data = load(data_dir=folder, streaming=True)
    loader = Loaders(data, LoaderSettings(CONFIG_16, 8, 8, workers=2), Accelerator(cpu=True)).train()
    assert loader.persistent_workers and len(loader) == 12
    epochs = []
    for epoch in (0, 1, 1):
        loader.set_epoch(epoch)
        epochs.append([(images, targets) for images, targets in loader])
    assert len(epochs[0]) == 12
    same = [
        all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(epochs[i], epochs[2])) for i in range(2)
    ]
    assert same == [False, True]  # order and augmentation


def test_streamed_and_map_style_evaluation_agree_bit_for_bit(folder):
    settings, accelerator = LoaderSettings(CONFIG_16, 8, 8, "workers"), Accelerator(cpu=True)
    batches = []
    for streaming in (False, True):
        data = load(data_dir=folder, streaming=streaming)
        batches.append(list(Loaders(data, settings, accelerator).evaluation(data.val)))
    for (a, x), (b, y) in zip(*batches, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)


@pytest.mark.parametrize(
    "names, message",
    [(None, "outside 0..4"), (ClassLabel(num_classes=5), "image 3 .*has label -1, outside 0..4; correct it")],
)
def test_a_bad_label_is_found_on_the_way(names, message, tmp_path):
    image = PIL.new("RGB", (16, 16))
    rows = {"image": [image] * 8, "label": [0, 1, 2, -1, 4, 0, 0, 0]}
    features = Features({"image": Image(), "label": names or Value("int64")})
    for name in ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.raises(ApartError, match=message):
        data = load(data_dir=str(tmp_path), streaming=True, num_classes=5)
        list(Loaders(data, LoaderSettings(CONFIG_16, 8, 8), Accelerator(cpu=True)).evaluation(data.val))


def damage(file):
    """As a disk does it: its size and its end stay."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle - 500 : middle + 500] = b"\xff" * 1000
    file.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_ends_a_run_in_one_line(workers, folder, tmp_path, capfd):
    shutil.copytree(folder, tmp_path / "data")
    damage(tmp_path / "data/train-00002-of-00004.parquet")
    with pytest.raises(SystemExit) as ended:
        flags = f"--model test_resnet --streaming -b 8 --groups 2 --epochs 1 --workers {workers} --experiment run"
        main([*flags.split(), "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path)])
    error = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in error, error
    assert re.search(
        r"error: split 'train': the stream cannot be read on after \d+ rows \(.+\); replace damaged files",
        error.strip().splitlines()[-1],
    )


def test_what_a_stream_cannot_tell(tmp_path, folder):
    rows = {"image": [PIL.new("RGB", (16, 16))] * 8, "label": [0] * 8}
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(
        str(tmp_path / "train.parquet")
    )
    with pytest.raises(ApartError, match=r"names no classes.*--num-classes"):
        load(data_dir=str(tmp_path), streaming=True, val_split="train")
    with pytest.raises(ApartError, match="--val-fraction"):
        TrainConfig(streaming=True, val_fraction=0.1)
    with pytest.raises(ApartError, match="--loader memory: a stream is not kept"):
        data = load(data_dir=folder, streaming=True)
        Loaders(data, LoaderSettings(CONFIG_16, 8, 8, "memory"), Accelerator(cpu=True))
    assert len(load(data_dir=folder, streaming=True, train_num_samples=50).train) == 50
    data = load(data_dir=folder, streaming=True, train_num_samples=5)
    with pytest.raises(ApartError, match="has 5 images, fewer than one step of 8"):
        Loaders(data, LoaderSettings(CONFIG_16, 8, 8), Accelerator(cpu=True))


def test_a_class_map_of_a_stream(folder, tmp_path):
    (tmp_path / "names").write_text("\n".join(str(i) for i in reversed(range(ROWS))))
    data = load(data_dir=folder, streaming=True, class_map=str(tmp_path / "names"))
    plain = labels(label_of(load(data_dir=folder, streaming=True).val))
    assert labels(label_of(data.val)) == [ROWS - 1 - label for label in plain]


@pytest.mark.parametrize("kind", ["imagefolder", "save_to_disk"])
def test_other_folders_stream_too(kind, tmp_path):
    image = PIL.new("RGB", (16, 16))
    if kind == "imagefolder":
        for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
            (tmp_path / part).mkdir(parents=True)
            for i in range(3):
                image.save(tmp_path / part / f"{i}.png")
    else:
        features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
        rows = Dataset.from_dict({"image": [image] * 6, "label": [0, 1] * 3}, features=features)
        DatasetDict(train=rows, val=rows).save_to_disk(str(tmp_path))
    data = load(data_dir=str(tmp_path), streaming=True)
    assert data.class_names == ["cat", "dog"] and (len(data.train), len(data.val)) == (6, 6)
    assert sorted(labels(label_of(data.val))) == [0, 0, 0, 1, 1, 1]


def test_a_streamed_run_and_its_repetition(folder, tmp_path):
    lines = []
    for name in "ab":
        run_folder = train(
            TrainConfig(
                model="test_resnet",
                data_dir=folder,
                streaming=True,
                batch_size=16,
                groups=2,
                epochs=2,
                shuffle_buffer=20,
                output=str(tmp_path),
                experiment=name,
            )
        )
        lines.append([json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()])
        for line in lines[-1]:
            del line["seconds"], line["images_per_second"]
    assert lines[0] == lines[1] and len(lines[0]) == 2


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_stream_with_workers(folder, tmp_path):
    """Evaluation shares of 52 and 51 images: every image is counted once."""
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    flags = "--model test_resnet --streaming -b 16 -vb 8 --groups 4 --epochs 1 --workers 1 --experiment two"
    places = ["--data-dir", folder, "--output", tmp_path]
    result = run(*launch.split(), ROOT / "scripts/train.py", *flags.split(), *places, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert "103 training and 103 evaluation images" in result.stdout and "1 epochs of 3 steps" in result.stdout
    found = json.loads((tmp_path / "two/metrics.jsonl").read_text())
    code = (  # one process, the whole split at once
        "import sys, timm, torch; from tests.support.helpers import load\n"
        "from apart_hf.data.dataset_map import TransformedImages\n"
        "from apart_hf.data.transforms import eval_transform\n"
        "m = timm.create_model(f'local-dir:{sys.argv[1]}', pretrained=True).eval(); d = load(data_dir=sys.argv[2])\n"
        "t = eval_transform(timm.data.resolve_model_data_config(m) | {'crop_mode': 'center'})\n"
        "rows = TransformedImages(d.val, t).__getitems__(list(range(len(d.val))))\n"
        "with torch.no_grad(): out = m(torch.stack([x for x, _ in rows]))\n"
        "print(torch.nn.functional.cross_entropy(out, torch.tensor([y for _, y in rows])).item())"
    )
    plain = run(sys.executable, "-c", code, tmp_path / "two/last", folder)
    assert plain.returncode == 0, plain.stderr
    assert float(plain.stdout) == pytest.approx(found["eval_loss"], rel=1e-5)
