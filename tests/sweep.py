"""One APART step on every timm BatchNorm model, compared with a plain step on the same batch.

    python -m tests.sweep --output docs/models.csv

Runs a model at the smallest input it takes, batch 4, groups 2, in training mode, and checks: every parameter that a
plain step gives a finite gradient gets one (where float32 overflows, at the next larger input); buffers are the plain
step's, bit for bit; classes, attributes, parameters, buffers and state_dict keys of every module are what they were.
Models above `--largest` parameters run on the meta device: shapes only. The table is the memory of the sweep: models in
it are not run again.
"""

from __future__ import annotations

import argparse
import csv
import gc
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.models import list_models, model_entrypoint
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import create_strategy
from tests.support.helpers import snapshot

CLASSES, BATCH, GROUPS = 10, 4, 2
COLUMNS = ("model", "file", "parameters", "bn_layers", "pixels", "run", "status", "seconds")
SIZES = (32, 64, 96, 128, 160, 192, 224)


def on_meta(name: str, **kwargs) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=CLASSES, **kwargs)


def batchnorm_models() -> list[str]:
    """Every model of timm's own with a `_BatchNorm`, in timm's order."""
    names = [name for name in list_models() if model_entrypoint(name).__module__.startswith("timm.")]
    return [name for name in names if batchnorms(on_meta(name))]


def batchnorms(model: torch.nn.Module) -> int:
    return sum(isinstance(m, _BatchNorm) for m in model.modules())


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def source_file(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition(".")[2]


def inputs(name: str) -> Iterator[tuple[int, dict]]:
    """Square inputs, in pixels, that the model takes in training, from the smallest to its own, and what create_model
    needs for them."""
    cfg = timm.get_pretrained_cfg(name)
    own = cfg.input_size[-1]
    tries = [(size, {}) for size in SIZES if size < own and not cfg.fixed_input_size]
    if cfg.fixed_input_size:
        tries = [(size, {"img_size": size}) for size in (*SIZES, 256) if size < own]
    for pixels, kwargs in tries:
        try:
            step(on_meta(name, **kwargs).train(), pixels, lambda model: create_strategy("standard", model))
        except Exception:  # whatever a model raises for an input that is too small for it
            continue
        yield pixels, kwargs
    yield own, {}


def criterion(output, targets):
    return cross_entropy(output[0] if isinstance(output, (tuple, list)) else output, targets)


def step(model, pixels, make_strategy):
    """One step on a batch that depends on nothing but its size. Returns the strategy."""
    torch.manual_seed(0)
    device = next(model.parameters()).device
    images = torch.randn(BATCH, 3, pixels, pixels).to(device)
    targets = torch.arange(BATCH, device=device)
    strategy = make_strategy(model)
    torch.manual_seed(1)  # dropout and drop path of the clean pass
    strategy.accumulate_gradients(images, targets, criterion)
    return strategy


def check(model, pixels) -> str:
    """ "ok", or what is wrong."""
    model.train()
    before, buffers = snapshot(model), {n: b.clone() for n, b in model.named_buffers()}
    step(model, pixels, lambda m: create_strategy("standard", m))
    real = next(model.parameters()).device.type != "meta"
    has_gradient = {
        n for n, p in model.named_parameters() if p.grad is not None and (not real or p.grad.isfinite().all())
    }
    plain = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        for n, b in model.named_buffers():
            b.copy_(buffers[n])
    model.zero_grad()
    strategy = step(model, pixels, lambda m: create_strategy("apart", m, groups=GROUPS))
    if snapshot(model) != before:
        return "modules changed"
    lacking = [n for n, p in model.named_parameters() if n in has_gradient and p.grad is None]
    if lacking:
        return f"no gradient: {lacking[0]}"
    if not real:
        return "ok"
    for n, p in model.named_parameters():
        if n in has_gradient and not p.grad.isfinite().all():
            return f"gradient not finite: {n}"
    for n, b in model.named_buffers():
        if not torch.equal(b, plain[n]):
            return f"buffer differs: {n}"
    if not strategy.perturbations[0]._deltas.any():
        return "nothing was perturbed"
    without = len(list(model.parameters())) - len(has_gradient)
    return f"ok ({without} parameters without a gradient in a plain step too)" if without else "ok"


def sweep(name: str, largest: int) -> dict:
    """The model's row of the table."""
    start, model = time.perf_counter(), on_meta(name)
    row = {"model": name, "file": source_file(name), "parameters": parameters(model), "bn_layers": batchnorms(model)}
    real = row["parameters"] < largest
    row["run"] = "real" if real else "shapes"
    for row["pixels"], kwargs in inputs(name):
        try:
            model = timm.create_model(name, num_classes=CLASSES, **kwargs) if real else on_meta(name, **kwargs)
            row["status"] = check(model, row["pixels"])
        except Exception as error:  # the table says what went wrong, and the sweep goes on
            row["status"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        # two values per channel, as the smallest inputs give, overflow float32 in a network of hundreds of layers
        if not row["status"].startswith("gradient not finite"):
            break
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/models.csv"))
    parser.add_argument("--models", help="separated by commas [all with BatchNorm]")
    parser.add_argument("--largest", type=int, default=100_000_000, help="parameters from which on only shapes are run")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    names = args.models.split(",") if args.models else batchnorm_models()
    done = set()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.exists():
        done = {row["model"] for row in csv.DictReader(args.output.open())}
    print(f"{len(names)} models, {len(done & set(names))} of them done", flush=True)
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for name in names:
            if name in done:
                continue
            row = sweep(name, args.largest)
            writer.writerow(row)
            file.flush()
            print(*row.values(), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
