"""Options that name a dataset, for commands that read one and train nothing."""

from __future__ import annotations

import argparse

from apart_hf.data import DATASETS


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which images are read, but for their splits."""
    parser.add_argument("--dataset", default="demo", metavar="NAME", help=f"{', '.join(DATASETS)}, or a Hub id [demo]")
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of a Hub dataset [its only one]")
    parser.add_argument("--data-dir", metavar="DIR", help="local folder instead")
    parser.add_argument("--input-key", metavar="NAME", help="column of the images [found]")
    parser.add_argument("--target-key", metavar="NAME", help="column of the class indices [found]")
    parser.add_argument("--on-bad-image", choices=("error", "skip"), default="error", help="[error]")
