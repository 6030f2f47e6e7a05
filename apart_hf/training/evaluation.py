"""Loss and accuracy over all processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import gather, pad_across_processes
from torch import nn

from apart_hf.data import IGNORED
from apart_hf.errors import ApartError
from apart_hf.training.epoch_metrics import Evaluation
from apart_hf.training.metrics import K, TopKAccuracy
from apart_hf.training.predictions import MostConfidentMistakes, Predictions
from apart_hf.utils.progress_bar import progress_bar


@torch.no_grad()
def evaluate(network: nn.Module, loader: Iterable, accelerator: Accelerator, mistakes: int = 0) -> Evaluation:
    """Measure mean loss (cross-entropy), top-1 and top-5 accuracy in per cent.

    Args:
        network: without DDP, which expects as many batches of every process; left in eval mode.
        loader: batches of this process's share of the images; shares may differ in size. Rows of class `IGNORED` are
            left out.
        accelerator: its arithmetic is used, and its processes join their shares.
        mistakes: how many of the most confident ones are kept, beside all predictions; 0: nothing is kept.

    Returns:
        The mean loss and both accuracies, of all processes.

    Raises:
        ApartError: where no image can be decoded.
    """
    network.eval()
    device, wrong = accelerator.device, MostConfidentMistakes(mistakes)
    best = [torch.empty(0, K, dtype=torch.int64, device=device)]
    labels, losses = [torch.empty(0, dtype=torch.int64, device=device)], [torch.empty(0, device=device)]
    for images, targets in progress_bar(loader, "evaluation", unit="batch"):
        with accelerator.autocast():
            output = network(images).float()
        losses.append(nn.functional.cross_entropy(output, targets, reduction="none", ignore_index=IGNORED))
        first = output.topk(min(K, output.shape[-1])).indices
        best.append(nn.functional.pad(first, (0, K - first.shape[-1]), value=IGNORED))
        labels.append(targets)
        if mistakes:
            wrong.add(images, targets, first[:, 0], output)
    best, labels, losses = (
        gather(pad_across_processes(torch.cat(parts), pad_index=IGNORED)) for parts in (best, labels, losses)
    )
    seen = labels != IGNORED
    if not seen.any():
        raise ApartError("the evaluation split has no image that can be decoded; check --val-split.")
    truth, found = labels[seen].cpu().numpy(), best[seen].cpu().numpy()
    metric = TopKAccuracy(keep_in_memory=True)
    metric.add_batch(predictions=found, references=truth)
    result = metric.compute()
    kept = Predictions(truth, found[:, 0], wrong.gathered(accelerator)) if mistakes else None
    return Evaluation(losses[seen].mean().item(), result["top1"], result["top5"], predictions=kept)
