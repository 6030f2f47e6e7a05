"""What is published of a run or a folder, gathered with its card, and loaded again in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from apart_hf.errors import ApartError
from apart_hf.hub.by_class import NUMBERS, PICTURE
from apart_hf.hub.card import comparison, make_card
from apart_hf.hub.export import probe
from apart_hf.hub.model_folder import (
    CLASS_MAP,
    CONFIG,
    WEIGHTS,
    Exported,
    check_intact,
    read_config,
    update_record,
    weights_folder,
)
from apart_hf.hub.pretrained import load_pretrained
from apart_hf.models import is_registered_here

CARD = "README.md"
MODEL = (WEIGHTS, CONFIG, CLASS_MAP)
PUBLISHED = (*MODEL, CARD, "metrics.jsonl", "compared_with.jsonl", "test.json", "plots/training.png", NUMBERS, PICTURE)


@dataclass(frozen=True)
class PushOptions:
    """Says how a folder is pushed.

    Args:
        private: of a repository that is made.
        revision: branch; made where it is not there.
        create_pr: as a pull request.
        commit_message: of the one commit.
        compare_with: another run, for a table in the card.
        license: of the weights; None: the one recorded.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    compare_with: Path | None = None
    license: str | None = None


def stage(folder: Path, repo_id: str, options: PushOptions = PushOptions(), previous: str | None = None) -> Path:
    """Gather what is published, with its card.

    Args:
        folder: a run's output, or a folder in timm's form.
        repo_id: the name on the Hub.
        options: what the card shows.
        previous: the card that is there already; its hand-written parts are kept.

    Returns:
        The folder of what is published: a run's own "hub", or `folder` itself, whose card (and, by `options.license`,
        config.json) is then replaced.

    Raises:
        ApartError: where the folder, its weights or an earlier card cannot be read, the weights are not those of their
            record, or the run to compare with is of another network.
    """
    Exported.read(folder)
    weights = weights_folder(folder)
    check_intact(weights)
    staged = folder if weights == folder else folder / "hub"
    if staged != folder:
        for name in PUBLISHED:
            source = weights / name if name in MODEL else folder / name
            if name == CARD:
                continue
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).unlink(missing_ok=True)  # the run may have gone on since
            if source.exists():
                shutil.copyfile(source, staged / name)
    if options.license is not None:
        config = json.loads((staged / CONFIG).read_text())
        config["pretrained_cfg"]["license"] = options.license
        (staged / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if options.compare_with is not None:
        update_record(staged, compared_with=comparison(staged, options.compare_with))
        shutil.copyfile(options.compare_with / "metrics.jsonl", staged / "compared_with.jsonl")
    here = staged / CARD
    if previous is None and staged == folder and here.exists():  # a run's own may be of another repository
        previous = here.read_text(errors="replace")
    card = make_card(staged, repo_id, previous=previous)
    card.save(here)
    return staged


def published_files(staged: Path) -> list[str]:
    """Name what goes up, and nothing else of the folder."""
    return [name for name in PUBLISHED if (staged / name).is_file()]


def verify(staged: Path) -> None:
    """Load the folder by timm in a fresh process and compare the logits with those of this process, and the checksum.

    Raises:
        ApartError: where they differ or the folder does not load.
    """
    model, _ = load_pretrained(str(staged))  # compares the checksum
    config = read_config(staged)
    noise = probe(tuple(config["pretrained_cfg"]["input_size"]))
    with torch.no_grad():
        want = model(noise)
    ours = "import apart_hf; " if is_registered_here(config["architecture"]) else ""
    with tempfile.TemporaryDirectory() as scratch:
        images, logits = Path(scratch) / "images.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"images": noise}, images)
        code = (
            f"{ours}import sys, timm, torch; from safetensors.torch import load_file, save_file; "
            f"torch.set_num_threads({torch.get_num_threads()}); "
            "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval(); "
            "torch.set_grad_enabled(False); "
            "save_file({'logits': model(load_file(sys.argv[2])['images'])}, sys.argv[3])"
        )
        command = [sys.executable, "-c", code, str(staged), str(images), str(logits)]
        loaded = subprocess.run(command, capture_output=True, text=True, check=False)
        if loaded.returncode:
            reason = (loaded.stderr.strip().splitlines() or ["no message"])[-1]
            raise ApartError(f"{staged} does not load in timm ({reason}); export it again.")
        found = load_file(logits)["logits"]
    if not torch.allclose(found, want, rtol=1e-5, atol=1e-6):
        worst = (found - want).abs().max().item()
        raise ApartError(f"{staged} gives other logits in a fresh process (by {worst:.3g}); it is not pushed.")
