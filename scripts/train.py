#!/usr/bin/env python
"""Train a timm BatchNorm model: accelerate launch scripts/train.py --model resnet18 --method apart"""

from apart_hf.cli.train import main

if __name__ == "__main__":
    main()
