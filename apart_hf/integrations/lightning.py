"""Lightning: a callback by which the Trainer's automatic optimization makes both passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apart_hf.errors import ApartError
from apart_hf.integrations.extras import brought_by
from apart_hf.integrations.lightning_step import NoLoss, StepCall, check_module
from apart_hf.integrations.own_parameters import join_groups
from apart_hf.strategies.hyper_parameters import MethodName, Uneven
from apart_hf.strategies.loss import create_loss
from apart_hf.strategies.machine import processes
from apart_hf.strategies.methods import check_hyper_parameters
from apart_hf.strategies.sample_count import count_samples
from apart_hf.strategies.two_pass import TwoPassStrategy
from apart_hf.strategies.two_pass_loss import TwoPassLoss

with brought_by("lightning", "lightning"):
    from lightning import Callback, LightningModule, Trainer

__all__ = ["Apart"]
_CURE = "override count_samples(batch) of the callback Apart, which returns it"
_RANDOM = "random"  # in the state: of the generator, by process


class Apart(Callback):
    """Lets a Lightning Trainer train by a method: `Trainer(callbacks=[Apart("apart", epsilon=0.1, groups=16)])`.

    The LightningModule stays as it is. Its training_step is called in both passes, and what it returns in the first
    one, with the method's gradient in the loss, is what the Trainer goes on with: accumulation, precision, clipping,
    DistributedDataParallel and hooks are Lightning's. What training_step logs or collects counts once: the second call
    leaves neither logs nor metrics nor attributes behind. The Trainer's checkpoints keep the method's state.

    Args:
        method: one of `list_strategies()`.
        every: the second pass is made in each so-manieth step of the optimizer.
        uneven: see `create_strategy`; the default fits groups and ratio to batches of any size.
        generator: see `create_strategy`. Checkpoints keep its state or, where it is None, that of torch's global one.
        mean, std: see `create_strategy`.
        **hyper: the method's hyper-parameters, see `create_strategy`. An auxiliary gamma and beta (aux_affine) are
            trained in the optimizer and group of those in whose place they stand.

    Attributes:
        loss: the `TwoPassLoss` of the module that is trained; None before `fit`.

    Raises:
        ApartError: for an unknown method or hyper-parameter; in `fit` as `create_strategy` does, and for a module that
            optimizes by hand (see docs/LOOPS.md) or whose training_step takes an iterator.

    Example:
        >>> import timm, torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from apart_hf.integrations.lightning import Apart
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = timm.create_model("test_resnet", num_classes=10)
        ...     def training_step(self, batch, batch_idx):
        ...         images, targets = batch
        ...         loss = torch.nn.functional.cross_entropy(self.model(images), targets)
        ...         self.log("loss", loss)
        ...         return loss
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> loader = torch.utils.data.DataLoader([(torch.randn(3, 32, 32), k % 10) for k in range(16)], batch_size=8)
        >>> quiet = {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}
        >>> apart = Apart("apart", epsilon=0.1, groups=4)
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[apart], **quiet)
        >>> trainer.fit(Classifier(), loader)
        >>> apart.strategy, apart.strategy.steps
        (apart(epsilon=0.1, groups=4, ratio=1.0), 2)
    """

    def __init__(
        self,
        method: MethodName,
        *,
        every: int = 1,
        uneven: Uneven = "fit",
        generator: torch.Generator | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        **hyper: Any,
    ):
        check_hyper_parameters(method, hyper)
        self.method, self.generator = method, generator
        scale = {"mean": mean, "std": std}
        self._options: dict[str, Any] = {"every": every, "uneven": uneven, "generator": generator, **scale, **hyper}
        self.loss: TwoPassLoss[Any, Any] | None = None
        self._module: LightningModule | None = None
        self._kept: dict[str, Any] | None = None
        self._random: Tensor | None = None  # of a checkpoint
        self._ends_step = True

    @property
    def strategy(self) -> TwoPassStrategy:
        """Return the strategy, for `strategy.set` in a hook and for its figures.

        Raises:
            ApartError: before `fit`.

        Example:
            >>> from apart_hf.integrations.lightning import Apart
            >>> class Warmup(Apart):
            ...     def on_train_batch_start(self, trainer, *args):
            ...         super().on_train_batch_start(trainer, *args)
            ...         self.strategy.set(epsilon=0.1 * min(1.0, trainer.global_step / 100))
        """
        if self.loss is None:
            raise ApartError(
                "Apart has a strategy once trainer.fit has begun; use it in a hook from on_train_start on."
            )
        return self.loss.strategy

    def count_samples(self, batch: Any) -> int | None:
        """Tell how many samples a batch has, where its tensors do not: override it for such batches.

        Args:
            batch: as training_step has it.

        Returns:
            Their number: tensors of that length are cut where the ratio is below 1, others belong to all samples.
            None: every tensor has a row for each sample.

        Example:
            >>> from apart_hf.integrations.lightning import Apart
            >>> class ApartByLabels(Apart):
            ...     def count_samples(self, batch):
            ...         return len(batch["labels"])
        """
        return None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the loss of the module that is trained, and go on from a checkpoint's state, or from an earlier fit."""
        check_module(pl_module)
        before = self.loss if self._module is pl_module else None
        self.loss = create_loss(self.method, cast(nn.Module, trainer.strategy.model), StepCall.in_pass, **self._options)
        self._module = pl_module
        state, self._kept = dict(self._kept or {}), None
        by_process = state.pop(_RANDOM, None)
        if by_process is not None:
            self._random = by_process[dist.get_rank() % len(by_process) if processes() > 1 else 0]
            self._go_on_drawing()
            state |= {"generator": self._random} if "generator" in state else {}
        if state:
            self.loss.load_state_dict(state)
        elif before is not None:
            self.loss.go_on_from(before)
        join_groups(trainer.optimizers, self.loss.strategy)

    def _go_on_drawing(self) -> None:
        if self.generator is None and self._random is not None:
            torch.set_rng_state(self._random)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in the place of the training step of the Trainer's strategy, which calls that of the module."""
        trainer.strategy.__dict__["training_step"] = partial(self._training_step, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look whether the optimizer steps after this batch, as the Trainer's loop decides it."""
        done = batch_idx + 1
        self._ends_step = (
            done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches or trainer.is_last_batch
        )
        if batch_idx > 0:  # gone on within an epoch: Lightning has drawn for a loader that was there already
            self._go_on_drawing()
        self._random = None

    def _training_step(self, trainer: Trainer, *inputs: Any, **named: Any) -> Any:
        if self.loss is None or self._module is None:
            raise ApartError("Apart is not set up; let trainer.fit call its hooks.")
        samples = self.count_samples(next(iter((*inputs, *named.values())), None))
        if samples is None and self.loss.strategy.counts_samples:
            count_samples((inputs, named), cure=_CURE)
        call = StepCall(trainer, self._module)
        try:
            with trainer.strategy.precision_plugin.train_step_context():
                result = self.loss((inputs, named, call), samples=samples, ends_step=self._ends_step)
        except NoLoss as without:
            return without.output
        return {"loss": result[0], **result[1]} if isinstance(result, tuple) else result

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the Trainer's strategy as it was."""
        trainer.strategy.__dict__.pop("training_step", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer's strategy as it was."""
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer's strategy as it was."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept between steps to go on exactly, of all processes: each of them calls this."""
        if self.loss is None:
            return self._kept or {}
        state = self.loss.state_dict()
        own: Tensor = torch.get_rng_state() if self.generator is None else self.generator.get_state()
        states = [own] * processes()
        if processes() > 1:
            dist.all_gather_object(states, own)
        return state | ({_RANDOM: states} if self.loss.strategy.perturbations else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, once `fit` begins."""
        self._kept = dict(state_dict)
