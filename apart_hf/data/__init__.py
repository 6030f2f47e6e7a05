"""Image classification data from the Hub, a folder, or the bundled demo set."""

from apart_hf.data.loading import ImageData, load_image_data
from apart_hf.data.registry import DATASETS, DatasetSpec, find_dataset
from apart_hf.data.transforms import TransformedImages, data_config, eval_transform, train_transform

__all__ = [
    "DATASETS", "DatasetSpec", "ImageData", "TransformedImages", "data_config", "eval_transform", "find_dataset",
    "load_image_data", "train_transform",
]
