"""A loop of your own, with a schedule of epsilon: python examples/own_loop.py"""

from itertools import islice

import timm
import torch
from demo_data import accuracy, demo_loader, endless

from apart_hf import create_strategy


def main(steps=150):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    strategy = create_strategy("apart", model, epsilon=0.1, groups=4, uneven="fit")

    for step, (images, targets) in enumerate(islice(endless(demo_loader()), steps)):
        strategy.set(epsilon=0.1 * min(1.0, step / 50))  # a warm-up
        loss, output = strategy.accumulate_gradients(images, targets, criterion)  # instead of forward and backward
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            right = (output.argmax(1) == targets).float().mean()
            print(f"step {step}: loss {loss:.3f}, {right:.0%} of the batch right")

    found = accuracy(model)
    print(f"accuracy {found:.1%} after {steps} steps")
    return found


if __name__ == "__main__":
    main()
