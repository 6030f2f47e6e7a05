import os
import socket
import tempfile

# Before any library reads them: no test reaches out, and logs stay short. The Hub is a server on loopback, which the
# fixture `hub` starts at this address.
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    HUB_PORT = free.getsockname()[1]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads of several processes on few cores wait for each other without spinning
    "HF_HOME": tempfile.mkdtemp(prefix="apart_hf-tests-"),
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
os.environ.pop("HF_TOKEN", None)

import gc
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from apart_hf.config.train_config import TrainConfig
from apart_hf.runs.train import train
from apart_hf.utils import hub_client
from apart_hf.utils.command_line import logging_to_output
from tests.support.fork_server import end_all, no_wait_for_the_disk
from tests.support.helpers import batch, build, forget_accelerator, write_demo
from tests.support.hub_server import HubServer
from tests.support.loader_processes import end_loader_processes, note_loader_processes
from tests.support.markers import python_is_started_by_marked_tests
from tests.support.settings import settings

try:
    import datasets
    import hypothesis
except ImportError:  # tests/gpu needs neither
    pass
else:
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # after each pass over a shuffled stream; usually 5 s
    # how long an example takes says nothing on a machine that is shared
    hypothesis.settings.register_profile("shared machine", deadline=None)
    hypothesis.settings.load_profile("shared machine")


ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name.upper().startswith(("HF_", "OMP_", "NO_PROXY"))
}
note_loader_processes()


@pytest.fixture(autouse=True)
def loader_processes_end():
    yield
    end_loader_processes()


def pytest_addoption(parser):
    parser.addoption("--report", help="file for the table that slow tests make")


def pytest_sessionfinish(session):
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    for item in items:
        if "hub" in item.fixturenames:
            item.add_marker("hub")


def pytest_collection_finish():
    """A run ends with a full collection of garbage, which need not look at the libraries' million objects."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    os.environ |= ENVIRONMENT  # whatever an earlier test has left: nothing that is started reaches out
    with python_is_started_by_marked_tests(item):
        return (yield)


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch):
    """Accelerate keeps precision and device for a whole process; each test here stands for one.

    It computes with one thread: its models are so small that a second one costs more than it gives.
    """
    on_one_core(monkeypatch)
    yield
    forget_accelerator()
    end_all()


def on_one_core(monkeypatch):
    monkeypatch.setattr("apart_hf.utils.processes.cores", lambda: 1)
    monkeypatch.setattr(os, "fsync", no_wait_for_the_disk)
    torch.set_num_threads(1)


@pytest.fixture
def drawn():
    """Runs draw their curves, and the pictures of their last evaluation; elsewhere they are spared these seconds."""


@pytest.fixture(autouse=True)
def without_curves(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("apart_hf.runs.folder.plot_training", lambda history, path, title: path.write_bytes(b""))
        monkeypatch.setattr(
            "apart_hf.runs.closer_look.draw", lambda run, *_: (run.folder.path / "plots/confusion.png").write_bytes(b"")
        )


@pytest.fixture
def online(monkeypatch):
    """The clients of this process and of those it starts try to reach the Hub, whether it is there or not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_write")


@pytest.fixture
def hub(online):
    """A Hub on loopback, and a token that may write to `user` and `team`."""
    with HubServer(HUB_PORT) as server:
        yield server
        huggingface_hub.close_session()  # or its open connections would go on to this server


@pytest.fixture
def model():
    return build("test_byobnet", dtype=torch.float32)


@pytest.fixture
def data():
    return batch(8, dtype=torch.float32)


@pytest.fixture(scope="session")
def little(tmp_path_factory):
    """72 training and 30 test images of the demo set as a parquet folder."""
    return write_demo(tmp_path_factory.mktemp("data") / "little", train=72, test=30)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of two epochs on 128 images of the demo set."""
    folder = tmp_path_factory.mktemp("finished")
    return train(
        TrainConfig(
            model="test_resnet",
            data_dir=write_demo(folder / "data", train=128, test=60),
            batch_size=32,
            groups=4,
            epochs=2,
            lr=0.02,
            license="apache-2.0",
            output=str(folder),
            experiment="run",
        )
    )


@pytest.fixture(scope="session")
def trained(little, tmp_path_factory):
    """The run of `settings(little, ...)`: two epochs of nine steps, with a checkpoint after every second step."""
    with pytest.MonkeyPatch.context() as patch:
        on_one_core(patch)
        run = train(settings(little, tmp_path_factory.mktemp("trained")))
    forget_accelerator()
    return run


@pytest.fixture
def trained_here(trained, tmp_path):
    """A copy of it where `settings(little, tmp_path)` puts it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def spoken():
    """What is logged goes to standard output, as in a command."""
    with logging_to_output():
        yield


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Between two tries of a request nobody waits for seconds: neither our client nor huggingface_hub's."""
    monkeypatch.setattr(hub_client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda _: time.sleep(0.01)))


@pytest.fixture
def quickly(monkeypatch):
    """Without the fresh process of `verify`, which takes seconds; other tests go through it."""
    monkeypatch.setattr("apart_hf.hub.publish.verify", lambda staged: None)
