"""What tests of other people's frameworks are given; the frameworks are imported where a test asks for it."""

import logging
import warnings

import pytest
import torch

from tests.support.loops import hyper_of


@pytest.fixture
def arguments(tmp_path):
    """Makes training arguments of transformers: of a method, or of the trainer as it is."""
    from transformers import TrainingArguments

    from apart_hf.integrations.transformers import ApartTrainingArguments
    from tests.support.transformers_trainer import COMMON

    def make(method=None, ratio=1, size=8, dtype=torch.float32, **more):
        kind, mine = TrainingArguments, {}
        if method is not None:
            kind, mine = ApartTrainingArguments, {f"apart_{k}": v for k, v in hyper_of(method, ratio).items()}
            mine["apart_method"] = method
        precision = {"bf16": dtype == torch.bfloat16, "per_device_train_batch_size": size}
        return kind(str(tmp_path / "output"), **COMMON | precision | mine | more)

    return make


@pytest.fixture
def quiet_lightning():
    """Lightning's advice on small data is not heard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        yield
