"""Image classification data from the Hub, a folder, or the bundled demo set."""

from typing import TYPE_CHECKING

from apart_hf.data.registry import DATASETS, DatasetSpec, find_dataset, registered
from apart_hf.data.settings import DataSettings, LoaderKind, LoaderSettings, OnBadImage
from apart_hf.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from apart_hf.data.decoding import IGNORED
    from apart_hf.data.loaders import Loaders
    from apart_hf.data.loading import ImageData, load_image_data
    from apart_hf.data.splits import Split
    from apart_hf.data.transforms import data_config
else:  # they bring datasets and accelerate, which a command line that only reads settings need not wait for
    __getattr__ = lazy_exports(
        __name__,
        {
            "IGNORED": "decoding",
            "ImageData": "loading",
            "Loaders": "loaders",
            "Split": "splits",
            "data_config": "transforms",
            "load_image_data": "loading",
        },
    )

__all__ = [
    "DATASETS",
    "IGNORED",
    "DataSettings",
    "DatasetSpec",
    "ImageData",
    "LoaderKind",
    "LoaderSettings",
    "Loaders",
    "OnBadImage",
    "Split",
    "data_config",
    "find_dataset",
    "load_image_data",
    "registered",
]
