"""A trained model, loaded again: python examples/load_checkpoint.py [a released model, a run's folder or user/name]"""

import sys

import torch
from datasets import load_dataset

from apart_hf import list_pretrained, load_pretrained
from apart_hf.data.registry import DEMO_DIR


@torch.no_grad()
def main(name="demo-test_resnet-apart", count=512):
    print(f"models that come with the package: {', '.join(list_pretrained())}")
    model, transform = load_pretrained(name)  # an ordinary timm model in eval mode, and the transform of its images
    names = model.pretrained_cfg["label_names"]

    rows = load_dataset("parquet", data_files=str(DEMO_DIR / "test.parquet"), split=f"train[:{count}]")
    logits = model(torch.stack([transform(row["image"].convert("RGB")) for row in rows]))
    labels = torch.tensor(rows["label"])
    found = (logits.argmax(1) == labels).float().mean().item()
    print(f"accuracy {found:.1%}; the first image is {names[logits[0].argmax()]}, and labelled {names[labels[0]]}")

    # without this package: timm.create_model("local-dir:output/demo-resnet18-apart/last", pretrained=True)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
