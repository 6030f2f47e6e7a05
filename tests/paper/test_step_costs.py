"""What a step costs: measured in turn, counted, kept with machine and versions, and shown in documents."""

import json
import os
import runpy
import statistics
import sys

import pytest
import torch

from apart_hf import ApartError, list_strategies
from apart_hf.paper import cost_tables
from apart_hf.paper.step_costs import Contender, StepCase, make_contenders, measure
from apart_hf.training.cuda_graph import WARM_UP
from tests.support.helpers import ROOT, assert_same
from tests.support.recorded import RecordedOperations

SMALL = StepCase("test_resnet", 8, 32, 2, num_classes=5)
FLAGS = ["--model", "test_resnet", "--batch-size", "8", "--img-size", "32", "--groups", "2", "--repeats", "2"]


def run_script(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "scripts/benchmark.py"), run_name="__main__")


class Clockwork(Contender):
    """A contender whose steps take what is written down."""

    def __init__(self, method, seconds, faults, order):
        self.method, self.case, self.seconds, self.faults = method, SMALL, [], []
        self._seconds, self._faults, self._order = iter(seconds), iter(faults), order

    def timed_step(self):
        self._order.append(self.method)
        self.seconds.append(next(self._seconds))
        self.faults.append(next(self._faults))

    def peak_memory(self):
        return 64.0


def test_contenders_take_turns_and_ratios_are_of_a_round():
    order = []
    first = Clockwork("standard", [9, 9, 0.1, 0.2, 0.4, 0.4], [99, 99, 1, 5, 3, 3], order)
    second = Clockwork("apart", [9, 9, 0.2, 0.5, 0.8, 0.6], [99, 99, 7, 7, 0, 9], order)
    plain, apart = measure([first, second], 4)
    assert order == ["standard", "apart"] * 6
    assert plain["ms_per_step"] == pytest.approx(300) and plain["ratio_min"] == plain["ratio_max"] == 1
    assert (apart["ratio_min"], apart["ratio_median"], apart["ratio_max"]) == pytest.approx((1.5, 2.0, 2.5))
    assert plain["images_per_second"] == pytest.approx(8 / 0.3) and (plain["faults"], apart["faults"]) == (3, 7)
    assert plain["spread"] == pytest.approx(100 * (0.4 - 0.175) / 0.3)  # of the middle half
    assert "operations" not in plain


def test_every_method_is_measured_and_counted():
    contenders = make_contenders(SMALL, list_strategies())
    rows = measure(contenders, 1, count=True)
    assert [row["method"] for row in rows] == list_strategies()
    for contender, row in zip(contenders, rows):
        assert row["ms_per_step"] == pytest.approx(1000 * statistics.median(contender.seconds))
        assert row["spread"] == 0 and row["peak_memory_mib"] > 1 and row["faults"] >= 0
        assert row["operations"] >= rows[0]["operations"] and row["copies"] >= 0
    assert contenders[1].strategy.hyper["groups"] == 2
    assert all(p.grad is None for p in contenders[0].model.parameters())  # counting leaves no gradient


def test_the_batch_is_in_the_layout_of_the_weights():
    one = Contender(StepCase("test_resnet", 8, 32, 2, channels_last=True), "apart")
    assert one.images.is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in one.model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_a_hyper_parameter_is_set_behind_a_method_s_name():
    case = StepCase("test_resnet", 8, 32, 2)
    one, several, more = make_contenders(case, ["advprop:steps=1", "advprop:steps=3", "apart:groups=4:epsilon=0.2"])
    assert [contender.strategy.perturbations[0].steps for contender in (one, several)] == [1, 3]
    assert [(p.groups, p.epsilon) for p in more.strategy.perturbations] == [(4, 0.2)]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--methods", "standard,apert"], "unknown method 'apert': did you mean 'apart'"),
        (["--methods", "standard,advprop:step=1"], "method 'advprop' has no hyper-parameter 'step'"),
        (["--methods", "standard,advprop:steps"], "--methods advprop:steps: 'steps' has no value"),
        (["--methods", "advprop:steps=1:steps=2"], "'steps' comes twice"),
        (["--methods", "standard,advprop:steps=one"], "steps='one': the number of steps"),
        (["--methods", "apart,standard,apart"], "--methods apart,standard,apart: apart is named twice"),
        (["--model", "test_resnat"], "unknown model 'test_resnat': did you mean"),
        (["--model", "vit_tiny_patch16_224", "--img-size", "224"], "has no BatchNorm"),
        (["--groups", "3"], "groups=3"),
        (["--groups", "2,4"], "--groups has 2 values for 1 models; give one, or one for each"),
        (["--model", "test_resnet,resnet18", "--img-size", "32,32,32"], "--img-size has 3 values for 2 models"),
        (["--batch-size", "0"], "argument --batch-size: 0: must be from 1"),
        (["--repeats", "0"], "argument --repeats: 0: must be from 1"),
        (["--device", "quantum"], "--device quantum: cannot be used"),
        (["--profile", "1", "--methods", "apart"], "--profile compares two methods"),
        (["--bytes", "--methods", "apart"], "--bytes compares two methods on one model"),
        (["--cuda-graph"], "--cuda-graph needs a GPU and a model that is not compiled, not --device cpu"),
        (["--json", "/proc/none/x.json"], "--json /proc/none/x.json: cannot be written"),
        (["--render", "/nowhere.md"], "--render /nowhere.md:"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message, monkeypatch, capsys):
    own = FLAGS if "--model" not in flags else FLAGS[2:]
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, *own, *flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and message in error, error


def test_a_recorded_step_is_a_step():
    """But for the fused update, which rounds otherwise; what replays it on a GPU is in tests/gpu."""
    plain, other = (Contender(SMALL, "apart") for _ in range(2))
    other._replay = other._recorded(RecordedOperations())
    for _ in range(WARM_UP):
        plain.step()
    for _ in range(2):
        plain.step()
        other.step()
    want = {name: p.detach() for name, p in plain.model.named_parameters()}
    assert_same({name: p.detach() for name, p in other.model.named_parameters()}, want, tolerance=1e-4)


def test_several_models_in_one_table_and_a_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "new" / "costs.json"
    flags = ["--batch-size", "8,4", "--img-size", "32,24", "--groups", "2", "--repeats", "2", "--count"]
    models = ["--model", "test_resnet", "--model", "test_byobnet"]
    run_script(monkeypatch, *models, *flags, "--methods", "standard, apart", "--json", file)
    said = capsys.readouterr().out
    costs = json.loads(file.read_text())
    assert costs["versions"]["torch"] and costs["machine"] and costs["repeats"] == 2 and costs["threads"] == 1
    found = [(one["case"]["model"], one["case"]["batch_size"], one["case"]["img_size"]) for one in costs["tables"]]
    assert found == [("test_resnet", 8, 32), ("test_byobnet", 4, 24)]
    assert cost_tables.table(costs) in said and said.count("| apart |") == 2
    assert os.listdir(file.parent) == ["costs.json"]


def test_a_measurement_that_fails_leaves_no_file(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, *FLAGS, "--groups", "3", "--json", tmp_path / "costs.json")
    assert not list(tmp_path.iterdir())


def test_the_file_is_named_by_what_it_is_of(tmp_path):
    cases = [StepCase("wide_resnet40_2"), StepCase("resnet18.a1_in1k", 32)]
    name = cost_tables.default_file(cases).as_posix()
    assert name == "results/cost-wide_resnet40_2-resnet18.a1_in1k-nchw-float32-cpu.json"
    other = StepCase("hf_hub:me/mine", channels_last=True, amp_dtype="bfloat16", torchcompile=True, device="cuda:0")
    name = cost_tables.default_file([other], tmp_path)
    assert name == tmp_path / "cost-hf_hub_me_mine-channels_last-bfloat16-compiled-cuda_0.json"
    name = cost_tables.default_file([StepCase("resnet18", cuda_graph=True)], tmp_path, "bytes")
    assert name == tmp_path / "bytes-resnet18-nchw-float32-graph-cpu.json"


ROW = {"method": "standard", "ms_per_step": 1234.4, "spread": 1.25, "images_per_second": 103.7, "ratio_min": 1.0}
ROW |= {
    "ratio_median": 1.0,
    "ratio_max": 1.0,
    "faults": 33000,
    "peak_memory_mib": 697.2,
    "operations": 400,
    "copies": 0,
}
COSTS = {
    "machine": "2 cores of X",
    "versions": {"torch": "2.14.1"},
    "repeats": 15,
    "threads": 2,
    "keeps_memory": True,
    "tables": [
        {
            "case": vars(StepCase("wide_resnet40_2", img_size=32)),
            "rows": [
                ROW,
                ROW
                | {"method": "apart", "ms_per_step": 2468.8, "ratio_min": 1.9, "ratio_median": 2.0, "ratio_max": 2.1}
                | {"operations": 1252, "copies": 37},
            ],
        }
    ],
}
TABLE = """\
float32, NCHW, eager, cpu (2 cores of X), 2 threads, freed memory kept, torch 2.14.1, 15 rounds

| model | method | ms/step | spread | images/s | ratio: min - median - max | page faults | peak memory (MiB) | operations | copies |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| wide_resnet40_2, batch 128, 32x32, 16 groups | standard | 1234 | 1.2 % | 104 | 1 | 33,000 | 697 | 400 | 0 |
|  | apart | 2469 | 1.2 % | 104 | 1.90 - 2.00 - 2.10 | 33,000 | 697 | 1,252 (3.13x) | 37 |
"""  # noqa: E501


def test_a_table_is_rendered():
    assert cost_tables.table(COSTS) == TABLE


def test_a_document_is_rendered_anew(tmp_path, monkeypatch, capsys):
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    document, stale = "# Costs\n\n<!-- costs: costs.json -->\n{}<!-- end of costs -->\n\nMore.\n", "| old |\n"
    assert cost_tables.with_tables(document.format(stale), tmp_path) == document.format(TABLE)
    with pytest.raises(ApartError, match="has no part between"):
        cost_tables.with_tables("# Costs\n", tmp_path)
    for damage in ("[1", "{}", '{"tables": []}', "[]"):
        (tmp_path / "costs.json").write_text(damage)
        with pytest.raises(ApartError, match=r"costs\.json: cannot be read as costs .* measure it again"):
            cost_tables.with_tables(document, tmp_path)
    name = ROOT / "docs/COST.md"
    copy = tmp_path / "COST.md"
    copy.write_text(name.read_text().replace("|  | apart |", "|  | other |"))
    run_script(monkeypatch, "--render", copy)
    assert copy.read_text() == name.read_text() and capsys.readouterr().out == ""


def test_documents_have_the_tables_of_their_files():
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    marked = [path for path in documents if "<!-- end of " in path.read_text()]
    assert ROOT / "docs/COST.md" in marked
    for path in marked:
        text = path.read_text()
        assert cost_tables.with_tables(text, ROOT) == text, f"python scripts/benchmark.py --render {path.name}"
