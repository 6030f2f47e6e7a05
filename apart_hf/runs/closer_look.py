"""A closer look at the last evaluation of a run, from its own predictions: class by class, and the worst mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apart_hf.data import Split
from apart_hf.runs.class_plots import plot_accuracy, plot_confusion
from apart_hf.runs.confusion import Confusion
from apart_hf.runs.contact_sheet import caption, pixels, plot_mistakes
from apart_hf.training.epoch_metrics import Evaluation
from apart_hf.training.predictions import Mistake
from apart_hf.utils.files import write_whole, writing

if TYPE_CHECKING:
    from apart_hf.runs.run import Run

NUMBERS, PICTURES = ("classes.json", "confusion.json", "errors.json"), ("classes.png", "confusion.png", "errors.png")


def look_closer(run: Run, split: Split, loader: Any, evaluation: Evaluation) -> None:
    """Write what the predictions of an evaluation show, as JSON and as pictures, into plots/.

    Args:
        run: whose last epoch was evaluated; on its main process.
        split: that was evaluated.
        loader: that gave its images.
        evaluation: where it has no predictions, nothing is written.

    Raises:
        ApartError: where a file cannot be written.
    """
    if evaluation.predictions is None:
        return
    mistakes, names = evaluation.predictions.mistakes, run.data.class_names
    confusion, folder = Confusion.of(evaluation.predictions, names), run.folder.path / "plots"
    # true streams come in an unknown order where several processes read them
    known = split.rows_known or (run.accelerator.num_processes == 1 and loader.num_workers == 0)
    shown = [_as_row(one, names) | (_place(split, one.position) if known else {}) for one in mistakes]
    found = {"split": run.folder.split_name(split), "epoch": run.history.latest.epoch, **confusion.totals()}
    with writing(run.folder.path):
        for name, numbers in zip(
            NUMBERS, (confusion.by_class(), confusion.matrix(), {"most_confident": shown}), strict=True
        ):
            write_whole(folder / name, json.dumps(found | numbers) + "\n")
        draw(run, confusion, mistakes, shown, f"{found['images']:,} images of split {found['split']}")


def draw(run: Run, confusion: Confusion, mistakes: list[Mistake], shown: list[dict[str, Any]], images: str) -> None:
    """Draw classes.png, confusion.png and, where there is a mistake, errors.png.

    Args:
        run: of the evaluation.
        confusion: its numbers.
        mistakes: its most confident ones.
        shown: what is said of each.
        images: which ones were evaluated, in words.
    """
    folder, config = run.folder.path / "plots", run.config
    title = f"{config.model}, {config.method}, {config.dataset_name}, epoch {run.history.latest.epoch}"
    plot_accuracy(confusion, folder / "classes.png", f"{title}: {images}")
    plot_confusion(confusion, folder / "confusion.png", f"{title}: {images}")
    (folder / "errors.png").unlink(missing_ok=True)
    if mistakes:
        errors = f"the {len(mistakes)} most confident of {confusion.totals()['errors']:,} errors"
        scale = run.folder.images["mean"], run.folder.images["std"]
        tiles = [pixels(one.image, *scale) for one in mistakes]
        texts = [caption(row) for row in shown]
        plot_mistakes(tiles, texts, folder / "errors.png", f"{title}: {errors}, {images}")


def forget(folder: Path) -> None:
    """Remove what an earlier end of the run in `folder` has left: there is more to come."""
    for name in (*NUMBERS, *PICTURES):
        (folder / "plots" / name).unlink(missing_ok=True)


def _as_row(mistake: Mistake, names: list[str]) -> dict[str, Any]:
    return {"class": names[mistake.label], "predicted": names[mistake.predicted], "confidence": mistake.confidence}


def _place(split: Split, position: int) -> dict[str, Any]:
    """Say which image it is: its row in the split, its file where it is one, and both in words."""
    origin = split.origin(position, split.input_key)
    return {
        "index": position if split.rows is None else int(split.rows[position]),
        "file": origin if os.path.isfile(origin) else None,
        "image": split.place(position),
    }
