import os

# before any library reads them: no test reaches out, and logs stay short
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tests.helpers import batch, build

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # after each pass over a shuffled stream; usually 5 s


def pytest_addoption(parser):
    parser.addoption("--report", help="file for the table that slow tests make")


@pytest.fixture(autouse=True)
def a_process_of_its_own():
    """Accelerate keeps precision and device for a whole process; each test here stands for one."""
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    return build("test_byobnet", dtype=torch.float32)


@pytest.fixture
def data():
    return batch(8, dtype=torch.float32)
