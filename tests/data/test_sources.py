"""Datasets of the Hub, by the real client from a Hub on loopback: loaded, streamed, gated, missing, out of reach."""

import socket
import time

import pytest

from apart_hf import ApartError
from apart_hf.data import DATASETS
from tests.support.helpers import demo_rows, load


def publish(hub, repo_id, rows=32, **create):
    files = {}
    for name in ("train", "test"):
        demo_rows(name).select(range(rows)).to_parquet(file := f"{hub.folder}/{name}.parquet")
        with open(file, "rb") as content:
            files[f"data/{name}-00000-of-00001.parquet"] = content.read()
    if create:
        hub.create(repo_id, "dataset", **create)
    hub.put(repo_id, files, "dataset")


@pytest.fixture
def hub(hub, tmp_path):
    hub.folder = tmp_path
    return hub


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset(streaming, hub):
    publish(hub, "user/shirts")
    data = load("user/shirts", streaming=streaming, train_num_samples=32 if streaming else None)
    assert len(data.class_names) == 10 and len(data.train) == 32 and data.spec.hub_id == "user/shirts"
    label = next(iter(data.val.data))["label"]
    assert label == load().val.labels()[0]


def test_the_registry_is_the_hub_s():
    """Ids, configurations, splits and columns as the Hub has them, figures as published."""
    found = {
        name: (
            spec.path,
            spec.config,
            spec.train_split,
            spec.val_split,
            spec.input_key,
            spec.target_key,
            spec.num_classes,
            spec.image_size,
        )
        for name, spec in DATASETS.items()
        if name != "demo"
    }
    assert found == {
        "fashion-mnist": ("zalando-datasets/fashion_mnist", None, "train", "test", "image", "label", 10, 28),
        "cifar10": ("uoft-cs/cifar10", None, "train", "test", "img", "label", 10, 32),
        "cifar100": ("uoft-cs/cifar100", None, "train", "test", "img", "fine_label", 100, 32),
        "tiny-imagenet": ("zh-plus/tiny-imagenet", None, "train", "valid", "image", "label", 200, 64),
        "imagenet": ("ILSVRC/imagenet-1k", None, "train", "validation", "image", "label", 1000, 224),
        "imagenet-wds": ("timm/imagenet-1k-wds", None, "train", "validation", "jpg", "cls", 1000, 224),
        "imagenette": ("frgfm/imagenette", "320px", "train", "validation", "image", "label", 10, 224),
    }
    for name in ("cifar10", "cifar100"):
        assert DATASETS[name].mean == (0.4914, 0.4822, 0.4465) and DATASETS[name].std == (0.2471, 0.2435, 0.2616)


def test_a_dataset_of_several_configurations(hub):
    publish(hub, "user/sizes")
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: data/{part}-*\n"
        f"  - split: test\n    path: data/test-*\n"
        for name, part in (("small", "train"), ("large", "test"))
    )
    hub.put("user/sizes", {"README.md": f"{card}---\n".encode()}, "dataset")
    for config in (None, "huge"):
        with pytest.raises(ApartError, match=r"name one by --dataset-config: \['(large', 'small|small', 'large)'\]"):
            load("user/sizes", dataset_config=config)
    assert len(load("user/sizes", dataset_config="small").train) == 32


def test_a_dataset_that_is_a_script(hub):
    hub.put("user/script", {"script.py": b"import datasets"}, "dataset")
    with pytest.raises(ApartError, match=r"scripts are no longer supported.*; use a copy in parquet files"):
        load("user/script")


def test_a_registered_dataset_that_is_another(hub):
    publish(hub, "uoft-cs/cifar10", rows=8)
    with pytest.raises(ApartError, match="columns are image"):
        load("cifar10")
    publish(hub, "zh-plus/tiny-imagenet", rows=8)
    with pytest.raises(ApartError, match="zh-plus/tiny-imagenet should have 200 classes, but has 10"):
        load("tiny-imagenet", val_split="test")


def test_a_stream_of_unknown_length(hub):
    publish(hub, "user/unknown")
    with pytest.raises(ApartError, match=r"does not say how many images.*--train-num-samples"):
        load("user/unknown", streaming=True)


def test_gated_imagenet_says_how_to_get_in(hub, monkeypatch):
    publish(hub, DATASETS["imagenet"].path, rows=4, gated=True)
    for token in ("", "hf_read"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ApartError) as error:
            load("imagenet")
        text = str(error.value)
        assert f"it is gated; ask for access at {hub.url}/datasets/ILSVRC/imagenet-1k, then log in (hf auth" in text
        assert "\n" not in text and (not token or token not in text)


def test_a_dataset_that_is_not_there(hub):
    with pytest.raises(ApartError, match=r"cannot load user/nothing: .*check the name and the connection"):
        load("user/nothing")


def test_out_of_reach_a_warm_cache_works_at_once_and_a_cold_one_says_so(hub):
    publish(hub, "user/cached")
    want = load("user/cached").val.labels()
    hub.shutdown()
    hub.server_close()
    import huggingface_hub

    huggingface_hub.close_session()
    start = time.perf_counter()
    assert (load("user/cached").val.labels() == want).all()
    warm = time.perf_counter() - start
    with pytest.raises(ApartError, match=r"cannot load user/cold: http://127.* cannot be reached .*the cache does not"):
        load("user/cold")
    assert warm < 5 and time.perf_counter() - start < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # as it was


def test_a_hub_that_accepts_but_never_answers(online, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        with pytest.raises(ApartError, match="cannot be reached"):
            load("user/cold")
        assert time.perf_counter() - start < 10


def test_offline_by_choice(hub, monkeypatch):
    publish(hub, "user/offline")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ApartError, match="HF_HUB_OFFLINE is set, and the cache does not hold it"):
        load("user/offline")
    assert not hub.requests
