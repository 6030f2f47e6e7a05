"""Packed data are the images, labels and classes that they were made of; what is wrong with them is named."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image as PIL

from apart_hf.cli.pack import main as pack_command
from apart_hf.cli.train import main as train_command
from apart_hf.data import packing
from apart_hf.data.decoding import rgb
from apart_hf.data.fingerprint import data_digest, fingerprint
from apart_hf.runs.train import train
from tests.support.helpers import ROOT, load, run
from tests.support.images import BAD, png, write_bad
from tests.support.processes import assert_equal_runs
from tests.support.settings import settings


def pixels(split):
    return np.stack([np.asarray(rgb(cell)) for cell, _ in split.cells(list(range(len(split))))])


@pytest.fixture(scope="module")
def packed(little, tmp_path_factory):
    """The little demo set in parts of 20 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PART", 20 * 28 * 28 * 3 + 1_000)
        out = tmp_path_factory.mktemp("packed") / "out"
        pack_command([str(out), "--data-dir", little])
    return out


@pytest.fixture
def copied(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copied")


def test_the_files(packed, little):
    data = load(data_dir=little)
    assert (packed / "classes.txt").read_text().splitlines() == data.class_names
    for split, sizes in ((data.train, [20, 20, 20, 12]), (data.val, [20, 10])):
        folder = packed / split.name
        parts = [np.load(folder / f"images-{number}.npy", allow_pickle=False) for number in range(len(sizes))]
        assert [len(part) for part in parts] == sizes and all(part.dtype == np.uint8 for part in parts)
        assert (np.concatenate(parts) == pixels(split)).all()
        assert np.load(folder / "labels.npy").tolist() == split.labels().tolist()
        assert {file.name for file in folder.iterdir()} == {
            "labels.npy",
            *(f"images-{number}.npy" for number in range(len(sizes))),
        }


def test_parts_are_below_60_megabytes():
    """Of CIFAR-100 19,531 images; the bytes before the array are counted."""
    images = (packing.PART - packing._HEADER) // (32 * 32 * 3)
    assert images > 19_500 and images * 32 * 32 * 3 + 128 < 60_000_000


def test_what_is_read_is_what_was_packed(packed, little):
    before, after = load(data_dir=little), load(data_dir=str(packed))
    assert after.class_names == before.class_names and after.image_size == (28, 28)
    assert [after.train.name, after.val.name] == [before.train.name, before.val.name]
    for split, own in ((before.train, after.train), (before.val, after.val)):
        assert own.labels().tolist() == split.labels().tolist() and (pixels(own) == pixels(split)).all()
        assert [label for _, label in own.cells([25, 3])] == split.labels()[[25, 3]].tolist()
    assert fingerprint(after) == fingerprint(before) and data_digest(after) == data_digest(before)
    assert after.train.place(25) == f"image 25 of split 'train' ({packed}/train/images-1.npy[5])"
    some = after.train.part(np.array([70, 1]))
    assert some.labels().tolist() == before.train.labels()[[70, 1]].tolist()
    assert (pixels(some) == pixels(before.train)[[70, 1]]).all() and some.place(0).startswith("image 70 of split")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": "apart", "groups": 2, "loader": "workers", "workers": 1},
        {"streaming": True},
        {"val_fraction": 0.2, "seed": 3},
    ],
    ids=["memory", "workers", "stream", "validation part"],
)
def test_training_on_it_is_the_same(more, packed, little, tmp_path):
    """Bit for bit, but for a stream, which is of known rows here and of one file there."""
    more = {"epochs": 1, "max_steps": 4, **more}
    run_of = {
        name: train(settings(data, tmp_path / name, **more))
        for name, data in (("packed", str(packed)), ("own", little))
        if name == "packed" or "streaming" not in more
    }
    lines = [json.loads(line) for line in (run_of["packed"] / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[-1]["eval_loss"])
    if "own" in run_of:
        assert_equal_runs(run_of["packed"], run_of["own"])


def test_a_name_beside_it_lends_what_it_lends_to_any_folder(packed):
    data = load("fashion-mnist", str(packed))
    assert data.spec.mean == (0.286, 0.286, 0.286) and (data.spec.input_key, data.spec.target_key) == ("image", "label")
    with pytest.raises(ValueError, match=r"no split 'dev': the splits are train, test"):
        load(data_dir=str(packed), val_split="dev")
    with pytest.raises(ValueError, match=r"has no column 'img', only image, label; see --input-key"):
        load(data_dir=str(packed), input_key="img")


def test_images_of_several_sizes_are_cut_to_one(tmp_path, capsys):
    colours = np.random.default_rng(0).integers(0, 256, size=(6, 4, 6, 3)).astype(np.uint8)
    for name in ("train", "val"):
        for number in range(6):
            folder = tmp_path / "data" / name / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            size = (60, 40) if number < 5 else (40, 40)
            PIL.fromarray(colours[number]).resize(size, PIL.Resampling.NEAREST).save(folder / f"{number}.png")
    out = tmp_path / "out"
    flags = [str(out), "--data-dir", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as ended:
        pack_command(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert re.search(
        r"image 5 of split 'train' \(.*class1/5.png\) has 40x40 pixels, the ones before it 60x40; .*--size N", error
    )
    assert [file.name for file in tmp_path.iterdir()] == ["data"]
    pack_command([*flags, "--size", "20"])
    assert "6 images of 20x20 pixels in 1 file(s)" in capsys.readouterr().out
    data = load(data_dir=str(out))
    found = pixels(data.train)
    order = [0, 2, 4, 1, 3, 5]
    assert data.train.labels().tolist() == [0, 0, 0, 1, 1, 1] and found.shape == (6, 20, 20, 3)
    # the middle of a square of one colour keeps it: blocks of 10 pixels become 5, and a third of the width is cut
    middle = found[:5, 2::5, 2::5]
    assert np.abs(middle.astype(int) - colours[order][:5, :, 1:5]).max() <= 40
    assert np.abs(middle.astype(int) - colours[order][:5, :, 1:5]).mean() < 10


def test_bad_images(tmp_path, capsys):
    """They end the packing, or are left out with their labels."""
    (tmp_path / "data").mkdir()
    data = write_bad(tmp_path / "data")
    with pytest.raises(SystemExit) as ended:
        pack_command([str(tmp_path / "out"), "--data-dir", data])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and re.search(r"image (5|17) of split 'train'", error)
    assert not (tmp_path / "out").exists()
    pack_command([str(tmp_path / "out"), "--data-dir", data, "--on-bad-image", "skip"])
    assert "2 left out that cannot be decoded" in capsys.readouterr().out
    before, after = load(data_dir=data, skip_bad=True), load(data_dir=str(tmp_path / "out"))
    good = [row for row in range(len(before.train)) if row not in BAD]
    assert after.train.labels().tolist() == before.train.labels()[good].tolist()


def test_a_part_of_the_training_split(little, tmp_path):
    """It is the one that a training would take."""
    pack_command([str(tmp_path / "out"), "--data-dir", little, "--val-fraction", "0.25", "--seed", "4"])
    own, packed = load(data_dir=little, val_fraction=0.25, seed=4), load(data_dir=str(tmp_path / "out"))
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["classes.txt", "test", "train", "validation"]
    assert packed.train.labels().tolist() == own.train.labels().tolist()
    assert packed.val.name == "validation" and (pixels(packed.val) == pixels(own.val)).all()


def test_it_replaces_nothing(little, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as ended:
        pack_command([str(tmp_path / "out"), "--data-dir", little])
    assert ended.value.code == 2 and f"{tmp_path}/out exists already; name another" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())


def change(name, make):
    return lambda folder: np.save(folder / name, make(np.load(folder / name)))


FAULTS = {
    "a part between": (
        lambda f: (f / "train/images-1.npy").unlink(),
        "train/images-1.npy is missing: .*72 .* 20 images",
    ),
    "the last part": (
        lambda f: (f / "test/images-1.npy").unlink(),
        "test/images-1.npy is missing: .*30 labels.* 20 images",
    ),
    "the first part": (lambda f: (f / "test/images-0.npy").unlink(), "test/images-0.npy cannot be read .No such file"),
    "a part too many": (
        lambda f: shutil.copy(f / "train/images-3.npy", f / "train/images-4.npy"),
        "train/labels.npy has 72 labels, and the parts beside it hold 84 images",
    ),
    "labels too few": (change("train/labels.npy", lambda a: a[:-1]), "train/labels.npy has 71 labels.* hold 72 images"),
    "labels too many": (
        change("train/labels.npy", lambda a: np.append(a, 0)),
        "train/images-4.npy is missing: labels.npy has 73 labels, and the parts before it 72 images",
    ),
    "labels out of range": (
        change("test/labels.npy", lambda a: np.where(np.arange(30) == 7, 10, a)),
        r"test/labels.npy: 1 labels are outside 0..9, the classes of classes.txt; the first is 10, at 7",
    ),
    "negative labels": (change("train/labels.npy", lambda a: a - 1), r"train/labels.npy: \d+ labels are outside 0..9"),
    "labels of fractions": (
        change("train/labels.npy", lambda a: a + 0.5),
        r"train/labels.npy has \(72,\) float64, and should have \(N,\) class indices, integers",
    ),
    "labels in two columns": (
        change("train/labels.npy", lambda a: np.stack([a, a])),
        r"labels.npy has \(2, 72\) int64",
    ),
    "no labels": (lambda f: (f / "train/labels.npy").unlink(), "train/labels.npy cannot be read .No such file"),
    "floats": (
        change("train/images-0.npy", lambda a: a / 255),
        r"train/images-0.npy has \(20, 28, 28, 3\) float64, and should have \(N, height, width, 3\) uint8",
    ),
    "channels first": (
        change("train/images-2.npy", lambda a: a.transpose(0, 3, 1, 2)),
        r"images-2.npy has \(20, 3, 28, 28\)",
    ),
    "grey": (change("train/images-0.npy", lambda a: a[..., 0]), r"images-0.npy has \(20, 28, 28\) uint8"),
    "another size": (
        change("train/images-1.npy", lambda a: a[:, :14]),
        r"train/images-1.npy has \(20, 14, 28, 3\) uint8, .* with 28x28 pixels as the parts before it",
    ),
    "cut off": (
        lambda f: (f / "test/images-0.npy").write_bytes((f / "test/images-0.npy").read_bytes()[:-9]),
        "test/images-0.npy cannot be read",
    ),
    "empty": (lambda f: (f / "test/images-0.npy").write_bytes(b""), "test/images-0.npy cannot be read"),
    "no array": (lambda f: (f / "test/images-1.npy").write_bytes(b"images"), "test/images-1.npy cannot be read"),
    "pickled": (
        lambda f: np.save(f / "test/labels.npy", np.array([print] * 30, dtype=object), allow_pickle=True),
        "test/labels.npy cannot be read",
    ),
    "no classes": (lambda f: (f / "classes.txt").unlink(), "classes.txt cannot be read .No such file"),
    "a class twice": (
        lambda f: (f / "classes.txt").write_text("a\na\n"),
        "classes.txt needs class names, .* each once",
    ),
    "fewer classes": (
        lambda f: (f / "classes.txt").write_text("a\nb\n"),
        r"train/labels.npy: \d+ labels are outside 0..1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(fault, copied, tmp_path, capsys):
    spoil, message = FAULTS[fault]
    spoil(copied)
    with pytest.raises(SystemExit) as ended:
        train_command(["--model", "test_resnet", "--data-dir", str(copied), "--output", str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_arrays_beside_images_are_no_packed_data(tmp_path):
    """Of another program, say, and not in our form."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(png())
        np.save(tmp_path / split / "labels.npy", np.zeros(3))
    assert load(data_dir=str(tmp_path)).class_names == ["a", "b"]


WITHOUT = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    missing = name.partition(".")[0] in ("datasets", "evaluate", "pyarrow", "pandas", "dill")
    return None if missing else find(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.mark.process
def test_training_and_validation_need_neither_datasets_nor_evaluate(packed, little, tmp_path):
    """Where these packages are not installed; the numbers are those of a run where they are."""
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing/sitecustomize.py").write_text(WITHOUT)
    flags = "--model test_resnet --method standard -b 8 --epochs 2 --lr 0.02 --max-steps 9 --threads 1 --data-dir"
    output = str(tmp_path / "bare")
    program = f"""
import sys
from apart_hf.__main__ import main
main({["train", *flags.split(), str(packed), "--output", output, "--experiment", "run"]})
main({["validate", "--checkpoint", f"{output}/run", "--data-dir", str(packed), "--json"]})
assert not {{"datasets", "evaluate", "pyarrow"}} & set(sys.modules)
main({["train", "--data-dir", little, "--output", output]})
"""
    command = [sys.executable, "-c", program]
    ended = run(*command, PYTHONPATH=f"{tmp_path / 'missing'}:{ROOT}", OMP_NUM_THREADS="1")
    assert ended.returncode == 2, ended.stderr
    assert f"{little} is read by the package datasets, which is not installed: pip install datasets, or" in ended.stderr
    here = train(settings(str(packed), tmp_path / "here", max_steps=9, checkpoint_every=None, threads=1))
    assert_equal_runs(tmp_path / "bare/run", here)
    measured = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))
    last = json.loads((here / "metrics.jsonl").read_text().splitlines()[-1])
    assert measured["holds"] and measured["top1"] == pytest.approx(last["top1"])
    config = json.loads((tmp_path / "bare/run/last/config.json").read_text())
    assert config["apart"]["versions"]["torch"]
