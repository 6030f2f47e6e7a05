"""A trained model as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, DropBlock2d, DropPath, PatchDropout, SyncBatchNormAct
from timm.models import save_for_hf
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from apart_hf.errors import ApartError
from apart_hf.hub.model_folder import CLASS_MAP, CONFIG, WEIGHTS, update_record
from apart_hf.utils.files import sha256

# What describes the weights that training started from, and is not true of ours.
_SOURCE_FIELDS = ("license", "origin_url", "paper_name", "paper_ids", "notes")
# The same numbers in evaluation: synchronised or not, and what does nothing there (timm does not record drop rates).
_SAME = {SyncBatchNorm: nn.BatchNorm2d, nn.BatchNorm1d: nn.BatchNorm2d, SyncBatchNormAct: BatchNormAct2d}
_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd, DropPath, DropBlock2d, PatchDropout)


def export_folder(
    model: nn.Module,
    folder: Path,
    *,
    data_config: dict[str, Any],
    label_names: list[str],
    tag: str,
    apart: dict[str, Any],
    license: str | None = None,
) -> None:
    """Write model.safetensors, config.json and class_map.txt, replacing `folder` as a whole.

    Args:
        model: a timm model, unwrapped.
        folder: the target.
        data_config: `apart_hf.data.data_config` of the evaluation images.
        label_names: class names by index.
        tag: timm's name of these weights, after the architecture's.
        apart: what to record of the training, under the key "apart"; the checksum of the weights joins it.
        license: of these weights, as the Hub spells it.

    Raises:
        ApartError: before anything is written, where config.json would not give this model again.
    """
    folder = Path(folder)
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # safetensors takes nothing else
    if "_original_forward" in vars(plain):  # Accelerate's, for 16-bit arithmetic
        del plain.forward, plain._original_forward
    new = _cleared(folder)
    pretrained_cfg = {"tag": tag, **dict.fromkeys(_SOURCE_FIELDS), "license": license}
    config = {"label_names": label_names, "apart": apart, "pretrained_cfg": pretrained_cfg}
    shared = _shared_tensor(plain)
    if shared is not None:
        raise _not_expressible(shared, "shares its weights with another layer")
    try:
        save_for_hf(plain, str(new), model_config=config, safe_serialization=True, data_config=data_config)
        check_expressible(plain, new, data_config["input_size"])
        update_record(new, sha256=sha256(new / WEIGHTS))
        write_class_map(new / CLASS_MAP, label_names)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    # safetensors makes its file private; a folder to be shared gets the permissions of its other file
    (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode & 0o777)
    _replace(folder)


def write_class_map(file: Path, names: list[str]) -> None:
    """Write class names by index, one a line: timm's `--class-map`, for its reader of image folders."""
    file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def copy_folder(source: Path, folder: Path) -> None:
    """Make `folder` a copy of the exported folder `source`, replacing it as a whole."""
    shutil.copytree(source, _cleared(folder))
    _replace(folder)


def _cleared(folder: Path) -> Path:
    """Return where a folder is written before it takes its place, cleared of what an earlier attempt left there."""
    for suffix in ("new", "old"):
        shutil.rmtree(folder.with_name(f".{folder.name}.{suffix}"), ignore_errors=True)
    return folder.with_name(f".{folder.name}.new")


def _replace(folder: Path) -> None:
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def probe(input_size: tuple[int, int, int]) -> torch.Tensor:
    """Make two images of noise (2, C, H, W), always the same, by which two copies of a model are compared."""
    return torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_expressible(model: nn.Module, folder: Path, input_size: tuple[int, int, int]) -> None:
    """Raise ApartError where timm does not give `model` again from `folder`.

    Names the first layer that differs in kind or settings, or whose output does.
    """
    with torch.random.fork_rng(devices=[]):
        again = timm.create_model(f"local-dir:{folder}", pretrained=False)
    found, want = dict(model.named_modules()), dict(again.named_modules())
    for name in [*found, *(name for name in want if name not in found)]:
        _check_layer(name, found.get(name), want.get(name))
    again.load_state_dict(load_file(folder / WEIGHTS))
    outputs = [_outputs(network, input_size) for network in (model, again)]
    for name, output in outputs[0].items():
        if name in outputs[1] and not torch.equal(output, outputs[1][name]):
            raise _not_expressible(name, "gives another output there")


def _check_layer(name: str, layer: nn.Module | None, again: nn.Module | None) -> None:
    if all(module is None or isinstance(module, _IDLE) for module in (layer, again)):
        return
    if layer is None or again is None:
        raise _not_expressible(name, f"was {'removed' if layer is None else 'added'}")
    kinds = [_SAME.get(type(module), type(module)) for module in (layer, again)]
    if kinds[0] is not kinds[1] or _settings(layer) != _settings(again):
        now, then = (f"{type(module).__name__}({module.extra_repr()})" for module in (layer, again))
        raise _not_expressible(name, f"has {now} where timm builds {then}")
    if "forward" in vars(layer):
        raise _not_expressible(name, "has a forward of its own")
    shapes = [
        {key: tuple(tensor.shape) for key, tensor in module.named_parameters(recurse=False)}
        for module in (layer, again)
    ]
    if shapes[0] != shapes[1]:
        raise _not_expressible(name, f"has parameters {shapes[0]} where timm builds {shapes[1]}")


def _settings(layer: nn.Module) -> str:
    """Write the settings of a layer that have a part in what it computes in evaluation."""
    text = layer.extra_repr()
    return re.sub(r"momentum=[^,]+, ", "", text) if isinstance(layer, _BatchNorm) else text


def _not_expressible(name: str, what: str) -> ApartError:
    return ApartError(
        f"the model was altered after timm.create_model: {repr(name) if name else 'the network'} {what}, which "
        "config.json cannot record; pass it as an argument of create_model, or register the architecture with timm."
    )


def _shared_tensor(model: nn.Module) -> str | None:
    """Name a tensor that is in the state_dict under an earlier name too."""
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            return name
        seen.add(tensor.data_ptr())
    return None


def _outputs(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Return each layer's output for the probe, by name, in the order in which they finish."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and name not in outputs:
                outputs[name] = output.clone()  # the next layer may work in place

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in network.named_modules()]
    training = network.training
    try:
        network.eval()(probe(input_size))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return outputs
