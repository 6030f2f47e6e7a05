"""Time and memory of opening a folder of many images, beside timm's own reader of folders.

    python scripts/folder_speed.py --classes 1000 --images 1281

makes train/CLASS/*.jpg with 1,281,000 files (hard links to 100 small JPEGs) and val/CLASS/*.jpg with one a class, and
opens them in fresh processes, in turn by timm and by apart_hf. The folder stays for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

_OPEN = {
    "timm": """
from timm.data.readers.reader_image_folder import ReaderImageFolder
import apart_hf.data.loading
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
kept = [ReaderImageFolder(f"{folder}/{split}") for split in ("train", "val")]
""",
    "apart_hf": """
from timm.data.readers.reader_image_folder import ReaderImageFolder
from apart_hf.data import DataSettings, load_image_data
import apart_hf.data.loading
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
kept = load_image_data(DataSettings(data_dir=folder))
""",
}
_RUN = "import json, resource, sys, time\nfolder = sys.argv[1]\n{}\nprint(json.dumps([time.perf_counter() - start, "
_RUN += "(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))"


def make(folder: Path, classes: int, images: int) -> None:
    """Write the folder, unless it is there."""
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}")
    (temporary / "source").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(100):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(temporary / "source" / f"{index}.jpg", quality=70)
    for split, count in (("train", images), ("val", 1)):
        for number in range(classes):
            place = temporary / split / f"n{number:08}"
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                os.link(temporary / "source" / f"{index % 100}.jpg", place / f"n{number:08}_{index}.JPEG")
    for file in (temporary / "source").iterdir():
        file.unlink()
    (temporary / "source").rmdir()
    temporary.rename(folder)


def main() -> None:
    """Print medians over the repeats, and the ratio and the difference that matter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the images are made [output/folder-CLASSESxIMAGES]")
    parser.add_argument("--classes", type=int, default=100, help="[100]")
    parser.add_argument("--images", type=int, default=1281, help="of each class [1281]")
    parser.add_argument("--repeats", type=int, default=3, help="of each, in turn [3]")
    args = parser.parse_args()
    folder = args.folder or Path("output") / f"folder-{args.classes}x{args.images}"
    make(folder, args.classes, args.images)
    found: dict[str, list[list[float]]] = {name: [] for name in _OPEN}
    for _ in range(args.repeats):
        for name, code in _OPEN.items():
            command = [sys.executable, "-c", _RUN.format(code), str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()}
    for name, rows in found.items():
        seconds = ", ".join(f"{row[0]:.2f}" for row in rows)
        print(f"{name}: {medians[name][0]:.2f} s (each: {seconds}), peak memory +{medians[name][1]:.0f} MB")
    ours, theirs = medians["apart_hf"], medians["timm"]
    print(f"ratio of times {ours[0] / theirs[0]:.2f}; memory {ours[1] - theirs[1]:+.0f} MB of timm's")


if __name__ == "__main__":
    main()
