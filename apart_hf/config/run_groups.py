"""Settings of the command itself, of what is published, and of the run: its folder, checkpoints and machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from apart_hf.config.recipes import RECIPES
from apart_hf.config.setting import setting

_command_setting = partial(setting, group="settings")


@dataclass(frozen=True)
class CommandGroup:
    """Says where further settings are read, and what is done with all of them."""

    config: str | None = _command_setting(
        None, "YAML file of settings, as runs write them; flags win", role="command", metavar="FILE"
    )
    # a name, by the time it is compared: the settings that it stands for are compared themselves
    recipe: str | None = _command_setting(
        None,
        f"a setting of the paper, {', '.join(sorted(RECIPES)[:2])}, ...; flags win",
        role="where",
        in_tables=False,
        metavar="NAME",
    )
    print_config: bool = _command_setting(
        False, "print the resolved settings as YAML and exit; touches no data", role="command"
    )


_publishing_setting = partial(setting, group="publishing")


@dataclass(frozen=True)
class PublishingGroup:
    """Says whether and how the finished model is published."""

    license: str | None = _publishing_setting(
        None, "of the exported weights, as the Hub spells it", role="where", metavar="NAME"
    )
    push_to_hub: str | None = _publishing_setting(
        None, "push the finished run to this repository of the Hub", role="where", in_tables=False, metavar="USER/NAME"
    )


_run_setting = partial(setting, group="run")


@dataclass(frozen=True)
class RunGroup:
    """Says how and where a training runs."""

    seed: int = _run_setting(
        0,
        "of weights, data order, augmentation and the second pass",
        role="what",
        least=0,
        most=2**32 - 2,
        in_tables=False,
    )
    amp: bool = _run_setting(
        False, "16-bit forwards: bfloat16, unless --amp-dtype says otherwise", role="how", decides="amp_dtype"
    )
    amp_dtype: Literal["float32", "bfloat16", "float16"] | None = _run_setting(
        None, "arithmetic of the forwards [as configured for accelerate: float32]", role="how", recorded=28
    )
    val_interval: int = _run_setting(
        1, "evaluate and export after every N-th epoch, and after the last one", role="how", least=1
    )
    # results are those of last/, whatever best/ is; but best/ was chosen by it
    eval_metric: Literal["top1", "top5", "eval_loss"] = _run_setting(
        "top1", "what best/ is chosen by", role="how", on_resume="fixed"
    )
    expect_processes: int | None = _run_setting(
        None, "fail unless so many processes were started", role="how", on_resume="free", least=1
    )
    device: str | None = _run_setting(
        None,
        "fail unless this is where accelerate computes: cuda, cpu, ... [any]",
        role="how",
        on_resume="free",
        metavar="NAME",
    )
    threads: int | None = _run_setting(
        None, "CPU threads a process [OMP_NUM_THREADS, or all cores]", role="how", on_resume="free", least=1, most=1024
    )
    no_mallopt: bool = _run_setting(
        False,
        "leave the thresholds of glibc's allocator, which a run raises so that a step takes again the memory that the "
        "step before it freed",
        role="how",
        on_resume="free",
    )
    resume: str | None = _run_setting(
        None,
        "go on exactly from the last checkpoint: of this folder, or auto: of the last run of this name, "
        "which starts anew where there is none",
        role="command",
        metavar="auto|FOLDER",
    )
    override: bool = _run_setting(False, "resume although settings have changed", role="command")
    checkpoint_every: str | None = _run_setting(
        None,
        "write a checkpoint every N steps, or every so many minutes (10m), and after every epoch [epochs]",
        role="where",
        metavar="N|Nm",
    )
    checkpoint_hist: int = _run_setting(
        2, "how many of the latest checkpoints are kept, beside the best epoch's", role="where", least=1
    )
    time_limit: str | None = _run_setting(
        None,
        "stop at a checkpoint before so many seconds, minutes (10m) or hours (2h) have passed since this process was "
        "started, with exit code 75; --resume auto goes on [none]",
        role="command",
        metavar="N[s|m|h]",
    )
    output: str = _run_setting("output", "folder of all runs", role="where", in_tables=False, metavar="DIR")
    experiment: str | None = _run_setting(
        None, "folder of this run in it [DATASET-MODEL-METHOD]", role="where", in_tables=False, metavar="NAME"
    )
    log_interval: int = _run_setting(
        50,
        "steps between lines where there is no terminal for a progress bar, and between figures of trackers",
        role="where",
        least=1,
    )
    log_wandb: bool = _run_setting(False, "the same as --report-to wandb", role="where")
    wandb_project: str | None = _run_setting(
        None, "the same as --project, with --log-wandb", role="where", metavar="NAME", decides="project"
    )
    wandb_tags: list[str] | None = _run_setting(
        None, "tags of this run, with --log-wandb [none]", role="where", metavar="TAG"
    )
    report_to: list[str] | None = _run_setting(
        None, "trackers of accelerate: tensorboard, wandb, trackio, ... [none]", role="where", metavar="NAME"
    )
    project: str = _run_setting("apart_hf", "project that trackers file the run under", role="where", metavar="NAME")
