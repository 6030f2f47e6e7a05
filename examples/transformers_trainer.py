"""transformers.Trainer, with flags: python examples/transformers_trainer.py --apart_method apart-sam --max_steps 100"""

import sys

import torch
from demo_data import demo_images
from transformers import HfArgumentParser, TimmWrapperConfig, TimmWrapperForImageClassification

from apart_hf.integrations.transformers import ApartTrainer, ApartTrainingArguments

DEFAULTS = {
    "output_dir": "output/transformers",
    "max_steps": "150",
    "per_device_train_batch_size": "32",
    "learning_rate": "0.05",
    "optim": "sgd",
    "label_smoothing_factor": "0.1",
    "apart_method": "apart",
    "apart_epsilon": "0.1",
    "apart_groups": "4",
    "report_to": "none",
    "logging_steps": "25",
}


def rows(split, count):
    return [{"pixel_values": image, "labels": label} for image, label in demo_images(split, count)]


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(flags=()):
    defaults = [text for name, value in DEFAULTS.items() for text in (f"--{name}", value)]
    (args,) = HfArgumentParser(ApartTrainingArguments).parse_args_into_dataclasses([*defaults, *flags])
    torch.manual_seed(args.seed)
    # with weights: AutoModelForImageClassification.from_pretrained("timm/resnet50.a1_in1k", num_labels=10)
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=10))
    trainer = ApartTrainer(  # instead of Trainer
        model, args, train_dataset=rows("train", 1024), eval_dataset=rows("test", 512), compute_metrics=compute_metrics
    )
    trainer.train()
    found = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy {found:.1%} after {trainer.state.global_step} steps of {args.apart_method}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
