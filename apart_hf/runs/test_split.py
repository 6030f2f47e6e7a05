"""The look at the test split, once, at the end of a run that was validated on a part of its training split."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from accelerate.utils import broadcast
from safetensors.torch import load_file

from apart_hf.hub.model_folder import WEIGHTS
from apart_hf.runs.closer_look import look_closer
from apart_hf.runs.report import describe_test
from apart_hf.training.epoch_metrics import Evaluation
from apart_hf.training.predictions import SHOWN
from apart_hf.utils.processes import from_main_process

if TYPE_CHECKING:
    from apart_hf.runs.run import Run

_log = logging.getLogger(__name__)


def evaluate_test(run: Run) -> Evaluation:
    """Evaluate last/ and best/ of a trained run on the test split, and record both.

    Returns:
        The evaluation of last/.
    """
    split, best, trainer = run.data.test, run.history.best(), run.trainer
    assert split is not None and best is not None  # the last epoch is always evaluated
    loader = run.loaders.evaluation(split)
    found = {"last": (run.history.latest.epoch, trainer.evaluate(loader, SHOWN))}
    network = run.accelerator.unwrap_model(trainer.evaluated, keep_torch_compile=False)
    if run.accelerator.is_main_process:
        network.load_state_dict(load_file(run.folder.path / "best" / WEIGHTS))
    for tensor in network.state_dict().values():  # other machines need not see the folder
        tensor.copy_(broadcast(tensor, from_process=0))
    found["best"] = (best.epoch, trainer.evaluate(loader))
    for name, (epoch, evaluation) in found.items():
        _log.info(describe_test(split.name, name, epoch, evaluation))
    from_main_process(run.accelerator, lambda: look_closer(run, split, loader, found["last"][1]))
    from_main_process(run.accelerator, lambda: run.folder.record_test(split, found))
    return found["last"][1]
