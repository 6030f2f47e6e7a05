"""Loss and accuracy over all processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import gather, pad_across_processes
from torch import nn

from apart_hf.batchnorm.layouts import is_channels_last
from apart_hf.data import IGNORED
from apart_hf.errors import ApartError
from apart_hf.training.epoch_metrics import Evaluation
from apart_hf.training.metrics import K, TopKAccuracy
from apart_hf.training.predictions import MostConfidentMistakes, Predictions
from apart_hf.utils.progress_bar import progress_bar


def evaluate(network: nn.Module, loader: Iterable, accelerator: Accelerator, mistakes: int = 0) -> Evaluation:
    """Measure mean loss (cross-entropy), top-1 and top-5 accuracy in per cent.

    The network works in inference mode, in the memory format of its weights, and keeps nothing of it.

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
    layout = _memory_format(network)
    device, wrong = accelerator.device, MostConfidentMistakes(mistakes)
    best = [torch.empty(0, K, dtype=torch.int64, device=device)]
    labels, losses = [torch.empty(0, dtype=torch.int64, device=device)], [torch.empty(0, device=device)]
    for images, targets in progress_bar(loader, "evaluation", unit="batch"):
        with torch.inference_mode():  # not around the loader, whose tensors live longer
            with accelerator.autocast():
                output = network(images.contiguous(memory_format=layout)).float()
            losses.append(nn.functional.cross_entropy(output, targets, reduction="none", ignore_index=IGNORED))
            first = output.topk(min(K, output.shape[-1])).indices
            best.append(nn.functional.pad(first, (0, K - first.shape[-1]), value=IGNORED))
        labels.append(targets)
        if mistakes:
            wrong.add(images, targets, first[:, 0], output)
    _forget_inference(network)
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


def _memory_format(network: nn.Module) -> torch.memory_format:
    """Tell in which memory format the weights of convolutions are, and so all activations but the images."""
    if any(is_channels_last(weight) for weight in network.parameters()):
        return torch.channels_last
    return torch.contiguous_format


def _forget_inference(network: nn.Module) -> None:
    """Let go of tensors that were made in inference mode, which no later gradient could go through.

    Autocast keeps weights in 16 bits to the end of its outermost block. Some networks of timm (LeViT) keep in eval mode
    what they compute of their parameters, until they train.
    """
    torch.clear_autocast_cache()
    network.train()
    network.eval()
