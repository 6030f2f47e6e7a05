"""timm's own parts (task, scaler, checkpoints), as its train.py puts them together: python examples/timm_train.py

examples/timm_train.diff is the same line for timm's train.py itself.
"""

from itertools import islice

import timm
import torch
from demo_data import accuracy, demo_loader, endless
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, NativeScaler

from apart_hf.integrations.timm import apart


def main(steps=150, folder=None):
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model("test_resnet", num_classes=10).to(device)
    optimizer = create_optimizer_v2(model, "momentum", lr=0.05)
    loss_scaler = NativeScaler(device.type)

    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=device, verbose=False)
    task = apart(task, "apart", epsilon=0.1, groups=4)  # the one line
    if folder is not None:
        saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=folder, recovery_dir=folder)

    for step, (images, targets) in enumerate(islice(endless(demo_loader()), steps)):
        result = task(images.to(device), targets.to(device))
        loss_scaler(result["loss"], optimizer, clip_grad=1.0, parameters=task.get_trainable_module().parameters())
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: loss {result['loss'].item():.3f}")

    found = accuracy(task.get_eval_model().cpu())
    if folder is not None:
        saver.save_checkpoint(0, metric=found)  # with the method's state
    print(f"accuracy {found:.1%} after {steps} steps")
    return found


if __name__ == "__main__":
    main()
