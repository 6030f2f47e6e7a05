"""Image classification data from the Hub, a folder, or the bundled demo set."""

from apart_hf.data.loaders import LOADERS, LoaderSettings, make_loaders
from apart_hf.data.loading import ImageData, load_image_data
from apart_hf.data.registry import DATASETS, DatasetSpec, find_dataset
from apart_hf.data.transforms import data_config

__all__ = [
    "DATASETS", "LOADERS", "DatasetSpec", "ImageData", "LoaderSettings", "data_config", "find_dataset",
    "load_image_data", "make_loaders",
]
