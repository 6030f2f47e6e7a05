"""What operations read and write in whole steps, as counted, as a file, and in a document."""

import json
import runpy
import sys

from torch import nn

from apart_hf.paper import cost_tables, step_bytes
from apart_hf.paper.step_costs import StepCase, make_contenders
from tests.support.helpers import ROOT

SMALL = StepCase("test_resnet", 8, 32, 2, num_classes=5, kernels="device")
COUNTED = {
    "case": vars(StepCase("wide_resnet40_2", img_size=32, amp_dtype="bfloat16", channels_last=True, kernels="device")),
    "methods": ["standard", "apart"],
    "versions": {"torch": "2.14.1"},
    "operations": {
        "relu": [[2, 3 * 2**20, 3 * 2**20], [4, 6 * 2**20, 6 * 2**20]],
        "convolution": [[40, 2**30, 2**29], [80, 2**31, 2**30]],
        "add": [[1, 2**18, 0], [1500, 2**18, 2**18]],
        "sum": [[0, 0, 0], [1, 2**18, 2**18]],
    },
}
TABLE = """\
wide_resnet40_2, batch 128, 32x32, 16 groups, bfloat16, channels_last, kernels of device, torch 2.14.1, \
apart moves 2.00 times the bytes of standard

| operation | standard: times | standard: read, MiB | standard: written, MiB | apart: times | \
apart: read, MiB | apart: written, MiB |
| --- | --- | --- | --- | --- | --- | --- |
| convolution | 40 | 1,024.0 | 512.0 | 80 | 2,048.0 | 1,024.0 |
| others | 3 | 3.2 | 3.0 | 1,505 | 6.5 | 6.5 |
| all | 43 | 1,027.2 | 515.0 | 1,585 | 2,054.5 | 1,030.5 |
"""


def test_convolutions_write_their_maps_in_each_pass():
    contenders = make_contenders(SMALL, ["standard", "apart"])
    maps, model = [], contenders[0].model
    hooks = [m.register_forward_hook(lambda *_: maps.append(_[2])) for m in model.modules() if type(m) is nn.Conv2d]
    contenders[0].gradients()
    for hook in hooks:
        hook.remove()
    counted = step_bytes.count_bytes(contenders)
    (times, _, written), (twice, _, both) = counted["operations"]["convolution"]
    assert (times, written) == (len(maps), sum(4 * one.numel() for one in maps))
    assert (twice, both) == (2 * times, 2 * written)
    weights = sum(4 * p.numel() for p in model.parameters())
    assert all(written >= weights for _, _, written in counted["operations"]["add_"])  # of the optimizer


def test_a_table_is_rendered():
    assert step_bytes.table(COUNTED) == TABLE


def test_times_stand_beside_the_bytes():
    counted = COUNTED | {"ms": {"relu": [1, 2], "convolution": [10, 20.25], "add": [0.5, 0.5], "sum": [0, 0.125]}}
    text = step_bytes.table(counted)
    assert "\n| convolution | 40 | 1,024.0 | 512.0 | 10.00 | 80 | 2,048.0 | 1,024.0 | 20.25 |\n" in text
    assert text.splitlines()[2].count(": ms |") == 2
    assert "\n| all | 43 | 1,027.2 | 515.0 | 11.50 | 1,585 | 2,054.5 | 1,030.5 | 22.88 |\n" in text


def test_times_are_of_the_operations_that_are_counted():
    counted = step_bytes.count_bytes(make_contenders(SMALL, ["standard", "apart"]), steps=2)
    assert counted["ms"].keys() == counted["operations"].keys()
    for name in ("convolution", "convolution_backward", "native_batch_norm", "threshold_backward", "add_"):
        plain, apart = counted["ms"][name]
        assert plain > 0 and apart > 0, name


def test_a_document_has_both_kinds(tmp_path):
    (tmp_path / "bytes.json").write_text(json.dumps(COUNTED))
    document = "<!-- bytes: bytes.json -->\n{}<!-- end of bytes -->\n"
    assert cost_tables.with_tables(document.format("old\n"), tmp_path) == document.format(TABLE)


def test_the_script_counts_and_writes_a_file(tmp_path, monkeypatch, capsys):
    flags = ["--model", "test_resnet", "--batch-size", "8", "--img-size", "32", "--groups", "2", "--bytes"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, "--json", str(tmp_path / "new/bytes.json")])
    runpy.run_path(str(ROOT / "scripts/benchmark.py"), run_name="__main__")
    counted = json.loads((tmp_path / "new/bytes.json").read_text())
    assert step_bytes.table(counted) in capsys.readouterr().out
    assert counted["methods"] == ["standard", "apart"] and counted["versions"]["torch"]
