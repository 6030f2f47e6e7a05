"""Settings of small runs, and timm's description of small images."""

from __future__ import annotations

from apart_hf.config.train_config import TrainConfig

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CONFIG = {
    "input_size": (3, 28, 28),
    "mean": MEAN,
    "std": STD,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "crop_mode": "center",
}

CONFIG_16 = CONFIG | {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def settings(little, output, **more):
    return TrainConfig(
        **{
            "model": "test_resnet",
            "method": "standard",
            "data_dir": little,
            "batch_size": 8,
            "epochs": 2,
            "lr": 0.02,
            "output": str(output),
            "experiment": "run",
            "checkpoint_every": "2",
            "checkpoint_hist": 99,
            **more,
        }
    )
