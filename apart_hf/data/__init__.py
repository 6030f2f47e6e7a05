"""Image classification data from the Hub, a folder, or the bundled demo set."""

from apart_hf.data.decoding import IGNORED, ON_BAD_IMAGE
from apart_hf.data.loaders import Loaders
from apart_hf.data.loading import ImageData, load_image_data
from apart_hf.data.registry import DATASETS, DatasetSpec, find_dataset, registered
from apart_hf.data.settings import LOADERS, DataSettings, LoaderSettings
from apart_hf.data.splits import Split
from apart_hf.data.transforms import data_config

__all__ = [
    "DATASETS",
    "IGNORED",
    "LOADERS",
    "ON_BAD_IMAGE",
    "DataSettings",
    "DatasetSpec",
    "ImageData",
    "LoaderSettings",
    "Loaders",
    "Split",
    "data_config",
    "find_dataset",
    "load_image_data",
    "registered",
]
