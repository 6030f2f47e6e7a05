"""What the figures of trained models share: names of the models, and files that appear all together or not at all."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from apart_hf.errors import ApartError


def model_labels(args: argparse.Namespace) -> list[str]:
    """Name the models as figure and table call them.

    Raises:
        ApartError: where there are not as many names as models, or two are the same.
    """
    labels = args.label or [Path(checkpoint).resolve().name for checkpoint in args.checkpoint]
    if len(labels) != len(args.checkpoint) or len(set(labels)) < len(labels):
        raise ApartError(
            f"{len(args.checkpoint)} checkpoints are labelled {', '.join(labels)}; give each a --label of its own."
        )
    return labels


def data_name(args: argparse.Namespace) -> str:
    """Name the data as figures do."""
    return Path(args.data_dir).resolve().name if args.data_dir else args.dataset


@contextlib.contextmanager
def new_files(args: argparse.Namespace, *kinds: str) -> Iterator[list[Path]]:
    """Give the files FIGURE.KIND to write, in the folder --output, which is there; undo that where the block fails.

    Args:
        args: the figure, and where it goes.
        kinds: endings.

    Raises:
        ApartError: where a file is there already, or the folder cannot be written.
    """
    folder = Path(args.output)
    made_here = [one for one in (folder, *folder.parents) if not one.exists()]
    files = [folder / f"{args.figure}.{kind}" for kind in kinds]
    try:
        for file in files:
            if file.exists():
                raise ApartError(f"{file} exists already; choose another --output, or remove it.")
        folder.mkdir(parents=True, exist_ok=True)
        files[0].touch()  # rather now than when all is measured
        files[0].unlink()
    except OSError as error:
        raise ApartError(f"cannot write {folder}: {error.strerror}; choose another --output.") from error
    try:
        yield files
    except ApartError:
        with contextlib.suppress(OSError):
            for one in made_here:
                one.rmdir()
        raise
