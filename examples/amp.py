"""Mixed precision, a gradient scaler and clipping, in a loop of your own: python examples/amp.py"""

from itertools import islice

import timm
import torch
from demo_data import accuracy, demo_loader, endless

from apart_hf import create_loss


def loss_fn(model, batch):
    images, targets = batch
    return torch.nn.functional.cross_entropy(model(images), targets)


def main(steps=150):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    model = timm.create_model("test_resnet", num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device)
    compute_loss = create_loss("apart-sam", model, loss_fn, epsilon=0.1, groups=4, rho=0.1)

    for step, batch in enumerate(islice(endless(demo_loader()), steps)):
        with torch.autocast(device, dtype):
            loss = compute_loss([part.to(device) for part in batch])  # both passes; your criterion is called in it
        scaler.scale(loss).backward()  # all else is as it was
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}, scale {scaler.get_scale():g}")

    found = accuracy(model.cpu())
    print(f"accuracy {found:.1%} after {steps} steps")
    return found


if __name__ == "__main__":
    main()
