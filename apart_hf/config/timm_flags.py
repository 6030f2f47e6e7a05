"""Flags of timm's training script that are not taken here, each with the reason, or what to use instead."""

from __future__ import annotations

_PARTS = "its loss compares several augmentations of each image, and the second pass takes parts of a batch"
_NAFLEX = "NaFlex models have no BatchNorm"
_SIZES = "all batches are of one image size"
_TEACHER = "there is no teacher here; in timm's own script, apart_hf.integrations.timm trains the student by a method"
_CLASSES = "an image has one class here; timm's own script takes a method by apart_hf.integrations.timm"
_ONE_CYCLE = "a schedule has one cycle"
_INITIAL = "the classifier starts as timm makes it; start from weights of your own by --initial-checkpoint"
_PROCESSES = "accelerate launch and torchrun say it"

#: by flag; the reason follows a colon
REFUSED: dict[str, str] = {
    "--aug-splits": _PARTS,
    "--resplit": _PARTS,
    "--jsd-loss": _PARTS,
    "--jsd": _PARTS,
    "--split-bn": "apart refuses layers with parameters for each part of a batch; --groups normalises parts",
    "--color-jitter-prob": "--color-jitter is applied to every image",
    "--grayscale-prob": "use --aa 3a, which turns some images grey",
    "--gaussian-blur-prob": "use --aa 3a, which blurs some images",
    "--train-crop-mode": "images are cropped as by timm's rrc; --scale says how much is left",
    "--cutmix-minmax": "boxes are drawn by --cutmix's alpha",
    "--bce-sum": "the loss is the mean over classes, as timm's default is",
    "--bce-target-thresh": "targets stay soft, as timm's default is",
    "--bce-pos-weight": "all classes weigh the same, as timm's default is",
    "--drop-connect": "deprecated in timm; use --drop-path",
    "--drop-block": "use --model-kwargs drop_block_rate=X",
    "--head-init-scale": _INITIAL,
    "--head-init-bias": _INITIAL,
    "--layer-decay-min-scale": "use --layer-decay alone",
    "--layer-decay-no-opt-scale": "all layers are trained; use --layer-decay alone",
    "--lr-cycle-mul": _ONE_CYCLE,
    "--lr-cycle-decay": _ONE_CYCLE,
    "--lr-cycle-limit": _ONE_CYCLE,
    "--lr-k-decay": "use --sched cosine as it is, or poly",
    "--patience-epochs": "of --sched plateau, which is deprecated in timm and is not taken",
    "--epoch-repeats": "use more --epochs",
    "--start-epoch": "--resume goes on from where a run was",
    "--no-resume-opt": "--resume goes on exactly; start from weights alone by --initial-checkpoint",
    "--recovery-interval": "use --checkpoint-every",
    "--model-ema-warmup": "--model-ema always has timm's warmup",
    "--model-ema-force-cpu": "--model-ema is where the model is",
    "--model-dtype": "weights are float32; use --amp or --amp-dtype for 16-bit forwards",
    "--fast-norm": "of LayerNorm and GroupNorm, which are not perturbed",
    "--fuser": "of TorchScript; use --torchcompile",
    "--torchscript": "a scripted model cannot be perturbed; use --torchcompile",
    "--torchcompile-mode": "--torchcompile compiles in the default mode",
    "--no-ddp-bb": "running statistics are those of one process, see --dist-bn",
    "--synchronize-step": "nothing here needs it",
    "--local_rank": _PROCESSES,
    "--local-rank": _PROCESSES,
    "--device-modules": "accelerate finds the device",
    "--val-num-samples": "the evaluation split is read to its end",
    "--dataset-download": "datasets of the Hub are fetched and kept by themselves",
    "--dataset-trust-remote-code": "code of datasets is not run; use a copy in parquet files",
    "--input-img-mode": "images are read as RGB, or as grey ones by --in-chans 1",
    "--worker-seeding": "what is drawn depends on --seed, epoch and batch, not on loader processes",
    "--save-images": "batches are not kept",
    "--pin-mem": "memory is pinned where there is a GPU",
    "--no-prefetcher": "batches are made by accelerate's loaders, which have no prefetcher of timm's",
    "--use-multi-epochs-loader": "loader processes stay over epochs by themselves",
    "--tta": "evaluation sees each image once",
    "--wandb-resume-id": "--resume goes on with the run, and so does its tracker",
    "--train-img-sizes": _SIZES,
    "--train-batch-sizes": _SIZES,
    "--train-size-probs": _SIZES,
    "--train-size-schedule": _SIZES,
    "--train-size-schedule-spread": _SIZES,
    "--train-size-random-mix": _SIZES,
    "--train-batches-per-epoch": "an epoch is all of the images; use --max-steps or --epochs",
    "--train-steps-per-epoch": "an epoch is all of the images; use --max-steps or --epochs",
    "--variable-batch-loss-scale": _SIZES,
    "--naflex-loader": _NAFLEX,
    "--naflex-train-seq-lens": _NAFLEX,
    "--naflex-max-seq-len": _NAFLEX,
    "--naflex-patch-sizes": _NAFLEX,
    "--naflex-patch-size-probs": _NAFLEX,
    "--naflex-loss-scale": _NAFLEX,
    "--naflex-patchify-channels-first": _NAFLEX,
    "--task": _CLASSES,
    "--target-format": _CLASSES,
    "--multilabel-threshold": _CLASSES,
    "--kd-model-name": _TEACHER,
    "--kd-distill-type": _TEACHER,
    "--kd-loss-type": _TEACHER,
    "--kd-temperature": _TEACHER,
    "--kd-student-feature-dim": _TEACHER,
    "--kd-teacher-feature-dim": _TEACHER,
    "--kd-token-distill-type": _TEACHER,
    "--distill-loss-weight": _TEACHER,
    "--task-loss-weight": _TEACHER,
    "-c": "use --config",
    "--apex-amp": "use --amp",
    "--native-amp": "use --amp",
}
#: by flag and value
REFUSED_VALUES: dict[tuple[str, str], str] = {
    ("--sched", "plateau"): "it follows the evaluation, and timm calls it deprecated; use step or multistep",
    ("--dist-bn", ""): "what is evaluated are the running statistics of one process, or their mean",
}


def refusal(arguments: list[str], known: set[str]) -> str | None:
    """Return why the first flag, or value, of timm's in a command line is not taken; None: there is none.

    Args:
        arguments: the command line.
        known: the flags that are taken.
    """
    for place, argument in enumerate(arguments):
        flag, joined, value = argument.partition("=")
        if flag in REFUSED and flag not in known:
            return f"{flag} of timm is not taken: {REFUSED[flag]}"
        given = flag, value if joined else "".join(arguments[place + 1 : place + 2])
        if given in REFUSED_VALUES and (joined or place + 1 < len(arguments)):
            return f"{flag} {given[1]!r} of timm is not taken: {REFUSED_VALUES[given]}"
    return None
