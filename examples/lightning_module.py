"""Lightning's Trainer with one callback more: python examples/lightning_module.py"""

import timm
import torch
from demo_data import accuracy, demo_loader
from lightning import LightningModule, Trainer, seed_everything
from torchmetrics.classification import MulticlassAccuracy

from apart_hf.integrations.lightning import Apart


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, batch_idx):  # as it was: what it logs is that of the clean pass
        images, targets = batch
        logits = self.model(images)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        self.accuracy(logits, targets)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(steps=150, **more):
    seed_everything(0)
    module = Classifier()
    trainer = Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[Apart("apart", epsilon=0.1, groups=4)],  # the one line
        default_root_dir="output/lightning",
        **more,
    )
    trainer.fit(module, demo_loader())
    found = accuracy(module.model.cpu())
    print(f"accuracy {found:.1%} after {trainer.global_step} steps")
    return found


if __name__ == "__main__":
    main()
