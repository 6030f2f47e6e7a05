"""Whatever the command line or the settings file holds: a resolved configuration, or one line and exit code 2."""

import contextlib
import io

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apart_hf.cli.train import main
from apart_hf.config.recipes import RECIPES
from apart_hf.config.train_config import SETTINGS
from apart_hf.data import DATASETS
from apart_hf.strategies.methods import METHODS
from tests.support.helpers import forget_accelerator

FLAGS = [setting.flag for setting in SETTINGS.values() if setting.name != "print_config"]
NAMES = [
    "test_resnet",
    "resnet18.a1_in1k",
    "vit_base_patch16_224",
    *METHODS,
    *DATASETS,
    *list(RECIPES)[:3],
    "user/name",
    "auto",
    "multistep",
    "adamw",
    "memory",
    "10m",
    "float16",
    "skip",
    "a=1",
]
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "0.5",
    "1e300",
    "-1e300",
    "1e-300",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "9" * 30,
    "9" * 5000,
    "1_0",
    "0x10",
    "\u0661",
    "9" * 400,
]
ODD = [
    "",
    " ",
    "a b",
    "..",
    ".",
    "/",
    "../x",
    "a/../../b",
    "~",
    "\n",
    "\0",
    "é",
    "\ud800",
    "🦊",
    "%s",
    "%(prog)s",
    "--",
    "-",
    "=",
    "'",
    "{}",
    "x" * 300,
    "x" * 5000,
    "file://x",
    ":",
    "hf_hub:",
    "local-dir:/nowhere",
]
VALUES = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(NUMBERS),
    st.sampled_from(ODD),
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(repr),
)
WORDS = st.one_of(
    st.tuples(st.sampled_from(FLAGS), VALUES).map(list),
    st.tuples(st.sampled_from(FLAGS), VALUES).map("=".join).map(lambda word: [word]),
    st.sampled_from(FLAGS).map(lambda flag: [flag]),
    VALUES.map(lambda value: [value]),
    st.tuples(st.sampled_from(FLAGS), VALUES, VALUES, VALUES).map(list),
)
EXAMPLES = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def outcome(arguments):
    """(exit code, stdout, stderr) of the command in this process. A traceback is an exception here."""
    out, error = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), error.getvalue()


def check(arguments):
    code, out, error = outcome(arguments)
    if code == 0:
        assert error == "" and (yaml.safe_load(out)["method"] in METHODS or "--help" in arguments)
    else:
        assert (code, out) == (2, "") and error.endswith("\n") and error.count("\n") == 1, error
    return code


@settings(max_examples=150, **EXAMPLES)
@given(st.lists(WORDS, max_size=4))
def test_any_command_line(words):
    check([word for group in words for word in group] + ["--print-config"])


@settings(max_examples=150, **EXAMPLES)
@given(st.sampled_from([*SETTINGS.values()]), VALUES)
def test_any_value_of_any_flag(setting, value):
    values = [] if setting.kind is bool else [value] * (setting.length or 1)
    check(["--print-config", setting.flag, *values])


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), VALUES, st.dates(), st.binary(max_size=5))
NESTED = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
KEYS = st.one_of(st.sampled_from([*SETTINGS]), VALUES, SCALARS)


@settings(max_examples=150, **EXAMPLES)
@given(found=st.dictionaries(KEYS, NESTED, max_size=3))
def test_any_settings(found, tmp_path_factory):
    check_file(yaml.safe_dump(found, allow_unicode=True).encode(errors="surrogatepass"), tmp_path_factory)


@settings(max_examples=150, **EXAMPLES)
@given(content=st.binary(max_size=60) | st.text("&*!a1:-[]{}#|>'\"?%@\n \t", max_size=40).map(str.encode))
def test_any_bytes(content, tmp_path_factory):
    check_file(content, tmp_path_factory)


def check_file(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    return check(["--config", str(file), "--print-config"])


@pytest.mark.parametrize(
    "content, code",
    [
        (b"", 0),
        (b"--- {}", 0),
        (b"# nothing", 0),
        (b"a: &a [*a]", 2),
        (b"epochs: &e 3\nworkers: *e", 0),
        (b"\xff\xfe\x00", 2),
        (b"lr: .nan", 2),
        (b"? [a]\n: 1", 2),
        (b"epochs: 1\n---\nepochs: 2", 2),
        (b"lr: 2020-01-01", 2),
        (b"lr: 2020-99-99", 2),
        (b"<<: 3", 2),
        (b"[" * 1000, 2),
        (b"epochs: " + b"9" * 5000, 2),
        (b"model: !!python/object/apply:os.mkdir ['PWNED']", 2),
        (b"model: !!python/name:os.system", 2),
        (
            b"a: &a [x,x,x,x,x,x,x,x]\n"
            + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 8)) for c in b"bcdefghij")
            + b"model: *j",
            2,
        ),  # 8**10 words
        (
            b"model: [&a [x,x,x,x,x,x,x,x], "
            + b", ".join(b"&%c [%s]" % (c, b",".join([b"*%c" % (c - 1)] * 8)) for c in b"bcdefghij")
            + b"]",
            2,
        ),
    ],
)
def test_files(content, code, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_file(content, tmp_path_factory) == code
    assert not list(tmp_path.iterdir())  # nothing in it was run


def test_a_folder_and_a_pipe_are_no_settings(tmp_path):
    for path in (tmp_path, "/dev/null/x", "\0", ""):
        assert check(["--config", str(path), "--print-config"]) in ((0,) if path == "" else (2,))


START = {  # values that are taken alone; most combinations fit, some do not
    "model": ["test_resnet", "test_byobnet", "test_efficientnet"],
    "method": [*METHODS],
    "batch-size": ["1", "4", "6"],
    "groups": ["1", "2", "3"],
    "ratio": ["0.5", "1"],
    "every": ["1", "2"],
    "img-size": ["1", "8", "33"],
    "opt": ["momentum", "adamw", "lamb", "lbfgs", "lion", "muon", "sgdp", "adafactor", "lookahead_adam"],
    "loader": ["memory", "workers", "auto"],
    "aa": ["rand-m9-mstd0.5", "augmix-m5-w3", "v0"],
    "mixup": ["0.2", "1e9"],
    "cutmix": ["1"],
    "reprob": ["1"],
    "smoothing": ["0.9"],
    "drop": ["0.5"],
    "drop-path": ["0.1"],
    "amp-dtype": ["bfloat16"],
    "grad-accum-steps": ["2", "1000"],
    "clip-grad": ["1e-9"],
    "val-fraction": ["0.5"],
    "sched": ["none", "cosine"],
    "warmup-epochs": ["1"],
    "crop-pct": ["0.01", "1"],
    "interpolation": ["random"],
    "momentum": ["1", "0"],
    "eval-metric": ["eval_loss"],
    "checkpoint-every": ["1", "1m"],
    "on-bad-image": ["skip"],
    "train-split": ["test", "train[:9]"],
    "val-split": ["train"],
    "input-key": ["label"],
    "num-classes": ["10", "11"],
    "class-map": ["/dev/null"],
    "mean": ["1e30"],
    "initial-checkpoint": ["/dev/null"],
    "model-kwargs": ["act_layer=1"],
    "report-to": ["tensorboard"],
    "license": ["mit", "no such"],
    "seed": ["4294967294"],
    "lr-base": ["0.1"],
}


@pytest.mark.slow
@settings(max_examples=120, **EXAMPLES)
@given(st.dictionaries(st.sampled_from([*START]), st.integers(0, 10), min_size=1, max_size=5))
def test_what_can_be_read_starts_or_says_why(little, tmp_path_factory, drawn):
    arguments = {"model": "test_resnet", "batch-size": "4", "groups": "2"}
    arguments |= {name: START[name][number % len(START[name])] for name, number in drawn.items()}
    words = [word for name, value in arguments.items() for word in [f"--{name}", *[value] * (1 + 2 * (name == "mean"))]]
    forget_accelerator()
    output = str(tmp_path_factory.mktemp("out"))
    words += ["--data-dir", little, "--max-steps", "1", "--epochs", "2", "--threads", "1", "--output", output]
    code, _, error = outcome(words)
    assert code in (0, 2) and "Traceback" not in error
    if code:
        assert ": error: " in error.splitlines()[-1], error
