#!/usr/bin/env python
"""How large rounding noise is where the gradient of delta is zero in exact arithmetic, by arithmetic and layout.

    python scripts/noise_floor.py

g_delta of each model on one batch of 16, compared with float64. A component is structural where float64 has at most
1e-11 of its layer's largest; shares are relative to that. "Real to zero": real components that the dead zone sets
to zero in this arithmetic and not in float64. Last, how many signs of delta differ from float64's.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import create_strategy

HALF = (("bfloat16", torch.bfloat16), ("float16", torch.float16))
SETTINGS = {
    "float32": {},
    "float32, channels_last": {"layout": torch.channels_last},
    "float32, compiled": {"compiled": True},
    **{name: {"amp": dtype} for name, dtype in HALF},
    **{f"{name}, channels_last": {"amp": dtype, "layout": torch.channels_last} for name, dtype in HALF},
}
MODELS = {"test_efficientnet": {}, "efficientnet_b0": {}, "levit_128s": {"img_size": 64}}
BATCH, PIXELS = 16, 64


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """With random gamma and beta: at their initial values other gradients vanish too."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **MODELS[name])
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.5)
    return model.to(dtype).train()


def attack(
    name: str,
    images: Tensor,
    targets: Tensor,
    *,
    dtype=torch.float32,
    layout=torch.contiguous_format,
    amp=None,
    compiled=False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(g_delta, delta, index of the layer) over all channels."""
    model = build(name, dtype).to(memory_format=layout)
    if compiled:
        model = torch.compile(model)
    autocast = amp and (lambda: torch.autocast("cpu", amp))
    strategy = create_strategy("apart", model, groups=2, epsilon=0.1, autocast=autocast)
    images = images.to(dtype).contiguous(memory_format=layout)
    scale = 2.0**12 if amp == torch.float16 else 1.0  # as GradScaler would
    strategy.accumulate_gradients(images, targets, cross_entropy, backward=lambda loss: (loss * scale).backward())
    (statistics,) = strategy.perturbations
    return statistics._gradient().double() / scale, statistics._deltas.double(), statistics._layer_of


def relative(g: Tensor, layer: Tensor) -> Tensor:
    size = g.abs()
    largest = size.new_zeros(int(layer.max()) + 1).scatter_reduce_(0, layer, size, "amax")
    return size / largest[layer]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas, of those in the default")
    args = parser.parse_args()
    print(
        "| model | arithmetic | structural: share of all | median | 99 % | largest | real: median | real to zero "
        "| unlike float64: structural | real | all |\n" + "|---" * 11 + "|"
    )
    for name in args.models.split(","):
        g = torch.Generator().manual_seed(1)
        images = torch.randn(BATCH, 3, PIXELS, PIXELS, generator=g)
        targets = torch.randint(10, (BATCH,), generator=g)
        exact, exact_delta, layer = attack(name, images, targets, dtype=torch.float64)
        structural = relative(exact, layer) <= 1e-11
        for setting, options in SETTINGS.items():
            torch._dynamo.reset()
            found, delta, _ = attack(name, images, targets, **options)
            share, differs = relative(found, layer), delta.sign() != exact_delta.sign()
            noise = share[structural].quantile(torch.tensor([0.5, 0.99, 1.0]).double()).tolist()
            zeroed = (delta == 0) & (exact_delta != 0)
            cells = [
                name,
                setting,
                f"{structural.double().mean():.1%}",
                *(f"{x:.1e}" for x in noise),
                f"{share[~structural].median():.1e}",
                f"{zeroed[~structural].double().mean():.3%}",
                *(f"{part.double().mean():.3%}" for part in (differs[structural], differs[~structural], differs)),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
