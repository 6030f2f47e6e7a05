"""What the examples train on, in the place of your own: the images of the demo that come with the package."""

import torch
from datasets import load_dataset
from torchvision.transforms.functional import pil_to_tensor

from apart_hf.data.registry import DEMO_DIR


def demo_images(split="train", count=1024):
    """Read so many images of "train" or "test", each (3, 28, 28) and scaled to [-1, 1], with their labels of 0 to 9."""
    rows = load_dataset("parquet", data_files=str(DEMO_DIR / f"{split}.parquet"), split=f"train[:{count}]")
    return [(pil_to_tensor(row["image"].convert("RGB")) / 127.5 - 1, row["label"]) for row in rows]


def demo_loader(split="train", batch_size=32, count=1024):
    """Batch them: the training images are shuffled."""
    return torch.utils.data.DataLoader(demo_images(split, count), batch_size, shuffle=split == "train")


def endless(loader):
    """Begin anew when an epoch ends."""
    while True:
        yield from loader


@torch.no_grad()
def accuracy(model, count=512):
    """Tell the share of the first test images that a model of logits gets right."""
    model.eval()
    right = [model(images).argmax(1) == labels for images, labels in demo_loader("test", count=count)]
    return torch.cat(right).float().mean().item()
