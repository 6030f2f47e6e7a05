"""The metrics of an exported folder by timm alone: python tests/support/plain_timm.py FOLDER PARQUET"""

import json
import sys

import timm
import torch
from datasets import load_dataset


def metrics(folder, data):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    rows = load_dataset("parquet", data_files=str(data), split="train")
    parts = (rows[start : start + 100]["image"] for start in range(0, len(rows), 100))
    with torch.no_grad():
        logits = torch.cat([model(torch.stack([transform(image.convert("RGB")) for image in part])) for part in parts])
    labels = torch.tensor(rows["label"][:])
    return {
        "eval_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "top5": 100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item(),
    }


if __name__ == "__main__":
    print(json.dumps(metrics(*sys.argv[1:])))
    assert "apart_hf" not in sys.modules
