"""The command line: what it refuses, and how."""

import re
import sys

import pytest

from apart_hf.cli.train import main
from apart_hf.config.arguments import parse_arguments
from apart_hf.config.train_config import SETTINGS
from tests.support.helpers import FAST, ROOT, run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "resnet81"], "unknown model 'resnet81': did you mean .*'resnet18'"),
        (["--method", "aprt"], "unknown method 'aprt': did you mean 'apart'"),
        (["--dataset", "cifar"], "unknown dataset 'cifar': did you mean 'cifar10'"),
        (["--method", "sam", "--epsilon", "0.1"], "'sam' has no hyper-parameter 'epsilon'"),
        (["--groups", "5"], "groups=5 does not divide the 64 samples"),
        (["--ratio", "0.3"], "19.2 samples, not a whole number"),
        (["--ratio", "2"], "ratio=2.0"),
        (["--epsilon", "-1"], "epsilon=-1.0"),
        (["--method", "sam", "--rho", "-1"], "rho=-1.0"),
        (["--model", "vit_tiny_patch16_224"], "has no BatchNorm layer"),
        (["--batch-size", "9000", "--groups", "1"], "'train' has 6000 images, fewer than one step of 9000"),
        (["--amp-dtype", "float16"], "float16 needs a GPU"),
        (["--val-split", "dev"], "no split 'dev': the splits are train, test"),
        (["--input-key", "img"], "'img' is no image column"),
        (["--num-classes", "7"], "--num-classes 7, but .* has 10 classes"),
        (["--epochs", "0"], "--epochs 0: must be"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "abc"], "argument --lr: invalid float value"),
        (["--learning-rate", "1"], "unrecognized arguments"),
        (["--opt", "momentumm"], "unknown optimizer 'momentumm': did you mean 'momentum'"),
        (["--report-to", "tensorbord"], "unknown tracker 'tensorbord': did you mean 'tensorboard'"),
        (["--report-to", "comet_ml"], "comet_ml: not installed"),
        (["--experiment", "../elsewhere"], "must be a plain folder name"),
        (["--mixup", "0.2", "--batch-size", "33"], "--batch-size 33 is odd"),
        (["--model", "resnet18", "-b", "8", "--groups", "8"], "'layer4.0.bn1' has one value per channel in a group"),
        (["--model", "vgg11_bn"], "'vgg11_bn' does not take images of 28 pixels.*--img-size 224"),
        (["--model", "resnet18.a1_in1"], "cannot create model 'resnet18.a1_in1'"),
        (["--model", "foo:bar"], "cannot create model 'foo:bar'"),
        (["--seed", "5000000000"], "--seed 5000000000"),
        (["--clip-grad", "0"], "--clip-grad 0"),
        (["--cutmix", "1", "--batch-size", "33"], "--batch-size 33 is odd"),
        (["--aa", "foo"], "--aa 'foo' is no policy"),
        (["--aa", "v0", "--color-jitter", "0.4"], "exclude each other"),
        (["--reprob", "1.5"], "--reprob 1.5"),
        (["--model", "test_resnet", "--pretrained"], "cannot create model 'test_resnet'"),
        (["-vb", "0"], "--validation-batch-size 0"),
        (["--aa", "rand-zzz"], "--aa 'rand-zzz' is no policy"),
        (["--ratio", "nan", "--budget", "1"], "ratio=nan"),
        (["--budget", "1e-9"], "--budget 1e-09: 3e-09 epochs"),
        (["--budget", "1e308"], r"--budget 1e\+308"),
        (["--recipe", "cifar100-wrn40-apart", "--epochs", "10"], "--decay-milestones 100 150 lie beyond --epochs 10"),
        (["--opt", "fusedsgd"], "cannot create optimizer 'fusedsgd'"),
        (["--opt", "adahessian"], "adahessian needs second derivatives"),
        (["--method", "standard", "--batch-size", "1", "--img-size", "32"], "one value per channel in a batch"),
        (["--every", "0"], "--every 0"),
        (["--epsilon-warmup-epochs", "-1"], "--epsilon-warmup-epochs -1: must be a finite number of at least 0"),
        (["--epsilon-warmup-epochs", "3", "--epochs", "2"], "--epsilon-warmup-epochs 3 does not end within --epochs 2"),
        (["--epsilon-warmup-epochs", "1", "--method", "sam"], "the method 'sam' has no epsilon; leave the flag out"),
        (["--perturb-from-epoch", "0"], "--perturb-from-epoch 0: must be a finite number of at least 1"),
        (["--perturb-from-epoch", "-3"], "--perturb-from-epoch -3: must be"),
        (["--perturb-from-epoch", "1.5"], "--perturb-from-epoch: invalid int value: '1.5'"),
        (
            ["--perturb-from-epoch", "3", "--epochs", "2"],
            "--perturb-from-epoch 3 lies beyond --epochs 2, and no step would be perturbed; take one of 1 to 2",
        ),
        (
            ["--perturb-from-epoch", "5", "--epochs", "2", "--sched", "cosine", "--cooldown-epochs", "2"],
            r"--perturb-from-epoch 5 lies beyond --epochs 2 \(4 with those of the schedule\)",
        ),
        (["--perturb-from-epoch", "7", "--budget", "1"], "--perturb-from-epoch 7 lies beyond --epochs 6"),
        (["--perturb-from-epoch", "2", "--method", "standard"], "the method 'standard' has no second pass"),
        (
            ["--epsilon-warmup-epochs", "2", "--epochs", "2", "--perturb-from-epoch", "2"],
            "--epsilon-warmup-epochs 2 does not end within --epochs 2, beginning by --perturb-from-epoch 2; shorten",
        ),
        (["--model-ema-decay", "1"], "--model-ema-decay 1.0: must be below 1"),
        (["--expect-processes", "2"], "1 process.* were started, not 2; .*torchrun"),
        (["--sync-bn"], "--sync-bn needs GPUs"),
        (["--method", "sam", "--local-attack"], "'sam' has no hyper-parameter 'local_attack'"),
        (["--method", "asam", "--eta", "-1"], "eta=-1.0"),
        (["--drop-path", "0.1", "--model", "vgg11_bn"], "cannot create model 'vgg11_bn'"),
        (["--epochs", "5", "--warmup-epochs", "5"], "--warmup-epochs 5 leaves nothing of --epochs 5"),
        (["--data-dir", "/nowhere"], "/nowhere does not exist"),
        (["--val-fraction", "1"], "--val-fraction 1.0: a share between 0 and 1"),
        (["--val-fraction", "0.0001"], "class 1 has 600 images, of which 0 would"),
        (["--val-fraction", "0.1", "--streaming"], "--val-fraction needs the whole training split"),
        (["--loader", "memory", "--streaming"], "--loader memory: a stream is not kept"),
        (["--model-kwargs", "drop"], "--model-kwargs 'drop': needs KEY=VALUE"),
        (["--model-kwargs", "nonsense=3"], "cannot create model 'test_resnet'"),
        (["--input-size", "1", "28", "28"], "--input-size 1 28 28: images here are square RGB"),
        (["--input-size", "3", "28", "28", "--img-size", "32"], "--input-size 3 28 28"),
        (["--on-bad-image", "ignore"], "invalid choice: 'ignore'"),
        (["--initial-checkpoint", "/nowhere.pth"], "/nowhere.pth: there is no such file"),
        (["--lr-base", "-1"], "--lr-base -1.0"),
        (["--model-kwargs", "act_layer=foo"], "cannot create model 'test_resnet'"),
        (["--model-kwargs", "features_only=True"], "does not give one value for each of the 10 classes"),
        (["--train-num-samples", "32"], "add --streaming"),
        (["--crop-pct", "0"], "--crop-pct 0.0"),
        (["--mean", "nan", "0", "0"], "--mean .nan, 0.0, 0.0.: must be finite"),
        (["--std", "0", "1", "1"], r"--std .0.0, 1.0, 1.0."),
        (["--checkpoint-every", "5x"], "--checkpoint-every '5x'"),
        (["--time-limit", "5x"], "--time-limit '5x': a whole number above 0 of seconds"),
        (["--resume", "/nowhere"], "--resume /nowhere: there is no checkpoint"),
        (["--log-wandb"], "--report-to wandb: not installed"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "out"), "--model", "test_resnet", *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1 and re.search(message, captured.err), captured.err
    assert not any((tmp_path / "out").glob("*"))


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main([*FAST, "--output", str(tmp_path / "file")])
    assert stop.value.code == 2 and "cannot write" in capsys.readouterr().err


def test_an_experiment_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit) as stop:
        main([*FAST, "--output", str(tmp_path), "--experiment", "mine"])
    assert stop.value.code == 2 and "exists already" in capsys.readouterr().err
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.process
def test_the_script_itself_exits_with_2(tmp_path):
    result = run(sys.executable, ROOT / "scripts/train.py", "--model", "resnet_18", "--output", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("train.py: error: unknown model")


def test_help_has_groups_defaults_and_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for title in ("model:", "method:", "data:", "optimisation:", "run:"):
        assert f"\n{title}\n" in text
    flags = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-zA-Z-]*", text))
    of_timm = (
        "--config --data-dir --dataset --train-split --val-split --input-key --target-key --class-map --model "
        "--pretrained --initial-checkpoint --resume --num-classes --img-size --input-size --model-kwargs -b -vb "
        "--channels-last --grad-accum-steps --grad-checkpointing --torchcompile --amp --amp-dtype --opt --momentum "
        "--weight-decay --clip-grad --sched --lr --lr-base --warmup-epochs --warmup-lr --min-lr --epochs --aa "
        "--color-jitter --reprob --mixup --cutmix --smoothing --drop --drop-path --sync-bn --model-ema "
        "--model-ema-decay --seed --log-interval --checkpoint-hist -j --output --experiment --eval-metric --log-wandb"
    )
    assert set(of_timm.split()) <= flags
    assert {setting.flag for setting in SETTINGS.values()} <= flags
    assert "[128; demo: 64]" in text and "[0.9]" in text
