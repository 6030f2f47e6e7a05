"""accelerate's own loop, with accumulation and checkpoints: accelerate launch examples/accelerate_loop.py"""

from itertools import islice

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from demo_data import accuracy, demo_loader, endless

from apart_hf import create_loss


def loss_fn(model, batch):
    images, targets = batch
    return torch.nn.functional.cross_entropy(model(images), targets)


def main(steps=150, folder=None):
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, demo_loader(batch_size=16))

    compute_loss = create_loss("apart", model, loss_fn, epsilon=0.1, groups=4, ratio=0.5, uneven="fit")  # after prepare
    accelerator.register_for_checkpointing(compute_loss)  # before load_state

    for step, batch in enumerate(islice(endless(loader), 2 * steps)):
        with accelerator.accumulate(model):
            loss = compute_loss(batch, ends_step=accelerator.sync_gradients)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            accelerator.print(f"step {step // 2}: loss {loss.item():.3f}")

    if folder is not None:
        accelerator.save_state(folder)  # and accelerator.load_state(folder) goes on
    found = accuracy(accelerator.unwrap_model(model).cpu())
    accelerator.print(f"accuracy {found:.1%} after {steps} steps")
    return found


if __name__ == "__main__":
    main()
