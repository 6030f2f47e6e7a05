"""What the commands that measure a trained model share: options that name the images, and what comes of them."""

from __future__ import annotations

import argparse

from timm.data import resolve_model_data_config
from torch import nn

from apart_hf.cli.dataset_options import add_dataset_options
from apart_hf.data import DataSettings, ImageData, LoaderSettings, load_image_data
from apart_hf.data.settings import Only
from apart_hf.models import num_classes, pretrained_cfg
from apart_hf.utils.command_line import at_least


def add_image_options(parser: argparse.ArgumentParser, split_flag: str = "--val-split") -> None:
    """Add the options that `measured_images` and `plain_batches` read."""
    add_dataset_options(parser)
    parser.add_argument(split_flag, dest="split", metavar="NAME", help="split to measure on [found]")
    parser.add_argument("-b", "--batch-size", type=at_least(1), default=128, metavar="N", help="[128]")
    parser.add_argument("--workers", type=at_least(0), default=0, metavar="N", help="loader processes [0]")
    parser.add_argument("--no-mallopt", action="store_true", help="leave the thresholds of glibc's allocator")


def measured_images(
    args: argparse.Namespace, model: nn.Module, *, only: Only = "val", streaming: bool = False
) -> ImageData:
    """Load the split to measure on, with the classes of `model`.

    Raises:
        ApartError: where the data are not there, or have other classes.
    """
    names = pretrained_cfg(model).get("label_names")
    return load_image_data(
        DataSettings(
            args.dataset,
            args.dataset_config,
            args.data_dir,
            train_split=args.split,
            val_split=args.split,
            only=only,
            input_key=args.input_key,
            target_key=args.target_key,
            streaming=streaming,
            skip_bad=args.on_bad_image == "skip",
            num_classes=num_classes(model),
            class_names=tuple(names) if isinstance(names, list) else None,
        )
    )


def plain_batches(args: argparse.Namespace, model: nn.Module) -> LoaderSettings:
    """Make batches by the transform that the folder of `model` records, also for images of another size."""
    return LoaderSettings(
        resolve_model_data_config(model),
        1,
        args.batch_size,
        "workers",
        args.workers,
        skip_bad=args.on_bad_image == "skip",
    )
