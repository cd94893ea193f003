"""The training loop, on Accelerate: devices, processes, precision, accumulation and clipping are its business."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dcafy.analysis.listening import Usage
from dcafy.analysis.usage import listeners, usage
from dcafy.emit.dca import connections, is_connected
from dcafy.errors import TrainingError, UsageError
from dcafy.graph.modes import evaluating
from dcafy.images.order import derived_seed
from dcafy.trace.accepted import require_module
from dcafy.training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from dcafy.training.feeding import Fed
from dcafy.training.folder import alone_in
from dcafy.training.freezing import frozen_base
from dcafy.training.given import check_split, fed
from dcafy.training.history import ConnectionState, Epoch, History
from dcafy.training.notebook import usual_listener
from dcafy.training.optimization import optimizer_for, scheduler_for
from dcafy.training.options import TrainingConfig
from dcafy.training.parallel import is_main_process
from dcafy.training.signals import Interruption, stopped
from dcafy.training.state import Progress, Standing, captured, draws_kept, restored, seed_draws, unlike_numbers
from dcafy.training.tasks import Batch, Classification, Task
from dcafy.training.telling import Inside, Listener, Silent, Watched
from dcafy.training.wrapping import Replicated, Sharded, as_accelerate_trains, check_kind
from dcafy.wording import needing, one_line

if TYPE_CHECKING:
    from accelerate import Accelerator


def finetune(
    model: nn.Module,
    train: Any,
    val: Any,
    config: TrainingConfig | None = None,
    *,
    task: Task | None = None,
    directory: Path | str | None = None,
    resume: bool = False,
    new_layers: tuple[str, ...] = (),
    listener: Listener | None = None,
) -> History:
    """What a training of ``model``, in place, has measured; the model is in eval mode afterwards.

    ``train`` and ``val``: data sets of (image tensor ``[C, H, W]``, class number), with a length and an index each, or
    DataLoaders over such: then the batches are those of its sampler, made by its ``collate_fn`` with its workers, and
    ``config.batch_size`` and ``config.workers`` say nothing. An ``IterableDataset`` will do, alone or in a DataLoader;
    one without a length is read through once beforehand, to be counted. Under one ``config.seed`` the order of the
    images, their random transforms and dropout are the same again, whatever the number of workers; afterwards torch's
    generators, Python's and numpy's are where they were. ``model`` may be converted or not; its connections learn at a
    rate of their own.

    ``task``: what is trained for; classification where absent. ``directory``: where a checkpoint is kept, from which
    ``resume`` goes on; without one it starts over. Where that run has ended and ``config.epochs`` are more than it had,
    it is trained further: the rates from there on are those of a run of that many epochs. ``new_layers``: modules that
    are trained also where the base is frozen. ``listener``: is told what happens; in a notebook the default is a bar.

    Raises ``UsageError`` (where another process trains in ``directory``, too) and ``InputError`` before the first step,
    ``TrainingError`` where the loss is no number, ``CheckpointError`` for a checkpoint that cannot be read or written,
    ``Interrupted`` after a signal.

    >>> import dcafy, torch, torchvision
    >>> from dcafy.training import TrainingConfig, finetune
    >>> model = dcafy.convert(torchvision.models.mobilenet_v3_small(num_classes=2), verify=False)
    >>> data = [(torch.rand(3, 32, 32), n % 2) for n in range(8)]
    >>> history = finetune(model, data, data, TrainingConfig(epochs=1, batch_size=4))
    >>> history.epochs[0].steps
    2
    """
    config = config or TrainingConfig()
    require_module(model)
    task = task or Classification(config)
    images = fed("train", train, config, task), fed("val", val, config, task)
    place = None if directory is None else Path(directory)
    with nullcontext() if place is None or not is_main_process() else alone_in(place):
        run = Training(model, *images, config, task, new_layers, listener or usual_listener())
        try:
            with draws_kept(run.accelerator.device):
                return run.train(place, resume)
        finally:
            run.listener.closes()


def accelerator_for(config: TrainingConfig) -> Accelerator:
    """Accelerate as ``config`` asks for it; one batch is split between all processes."""
    with needing("Training", "train", "Hugging Face Accelerate"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import DataLoaderConfiguration
    # They live as long as the process, and would refuse a second training with another precision, or in shards.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
            dataloader_config=DataLoaderConfiguration(split_batches=True, dispatch_batches=False),
            rng_types=[],
        )
    except ValueError as error:  # what a device cannot do
        raise UsageError(
            f"Accelerate cannot train that way here: {one_line(error)} Choose another --precision, or change its "
            "configuration (accelerate config)."
        ) from error
    check_kind(accelerator)
    if config.precision != "no" and not accelerator.native_amp:  # Accelerate would train in float32, without a word
        raise UsageError(
            f"--precision {config.precision} cannot be had on the {accelerator.device.type}. Choose bf16, or no."
        )
    return accelerator


class Training:
    """One training: what it works with, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        train: Fed,
        val: Fed,
        config: TrainingConfig,
        task: Task,
        new_layers: tuple[str, ...],
        listener: Listener,
    ) -> None:
        self.config, self.task, self.model = config, task, model
        self.accelerator = accelerator_for(config)
        for name, part in (("train", train), ("val", val)):
            check_split(name, part, self.accelerator.num_processes)
        # Some trackers seed every generator that there is: what is told may not change what is trained.
        told = listener if self.accelerator.is_main_process else Silent()
        self.listener = Inside(told, functools.partial(draws_kept, self.accelerator.device))
        self.connected = is_connected(model)
        model.to(self.accelerator.device)
        seed = derived_seed(config.seed, 1)
        task.check(model, train.first(seed=seed))
        if config.balance:
            task.balance(train.labels())
        cuda = self.accelerator.device.type == "cuda"
        self.order = train.order(seed=config.seed, training=True)
        batches = train.loader(self.order, seed=seed, training=True, cuda=cuda)
        self.train_loader = self.accelerator.prepare_data_loader(batches)
        self.val, self.val_order = val, val.order(seed=0, training=False)
        shown = val.loader(self.val_order, seed=0, training=False, cuda=cuda)
        self.val_loader = self.accelerator.prepare_data_loader(shown)
        self.optimizer = optimizer_for(model, config)
        steps = -(-self.order.in_all // config.accumulate)
        self.schedule = scheduler_for(self.optimizer, config, steps)
        self.total_steps = steps * config.epochs
        self.average: AveragedModel | None = None
        if config.ema:
            decayed: Any = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=decayed)
        self.new_layers = [model.get_submodule(path) for path in new_layers]
        self.wrapped: Replicated | Sharded | None = None
        self.progress = Progress(rate=float(self.schedule.get_last_lr()[0]))
        self.epochs: list[Epoch] = []
        self.by_image: Mapping[str, Tensor] | None = None
        self.skipped: dict[str, None] = {}

    # -- the whole --------------------------------------------------------------------------------------

    def train(self, directory: Path | None, resume: bool) -> History:
        """All epochs that are left."""
        self.file = None if directory is None else directory / CHECKPOINT
        seed_draws(derived_seed(self.config.seed, self.accelerator.process_index), self.accelerator.device)
        with Interruption() as self.interruption:
            if resume and self.file is not None:
                self._resume(self.file)
            self.listener.begins(self.config, self.total_steps, self.progress.step, tuple(self.epochs))
            while self.progress.epoch < self.config.epochs:
                with self.phase() as wrapped:
                    if wrapped is not None:
                        self._epoch(wrapped)
                self._end_epoch()
        if self.average is not None:
            _take(self.model, self.average.module)
        self.model.eval()
        if self.by_image is None:  # a run that had ended before
            self.evaluate(self.model)
        used = self.usage(self.config.usage_images)
        history = History(tuple(self.epochs), used, tuple(self.skipped), self.by_image or {})
        self.listener.ends(history)
        return history

    @contextmanager
    def phase(self) -> Iterator[Replicated | Sharded | None]:
        """What is trained, with the base frozen where this epoch asks for it; ``None`` where nothing is.

        Wrapped anew for each epoch: DDP looks only once at which parameters are trained.
        """
        alone = self.config.freeze_base or self.progress.epoch < self.config.freeze_base_epochs
        with frozen_base(self.model, self.new_layers) if alone else nullcontext():
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                yield None
                return
            self.model.train()
            self.wrapped = as_accelerate_trains(self.accelerator, self.model, self.optimizer)
            failed = True
            try:
                yield self.wrapped
                failed = False
            finally:
                self.wrapped.close(failed=failed)
                self.wrapped = None
                self.accelerator._models.clear()
                self.accelerator._optimizers.clear()

    # -- one epoch --------------------------------------------------------------------------------------

    def _epoch(self, wrapped: Replicated | Sharded) -> None:
        self.order.epoch, self.order.start = self.progress.epoch, self.progress.batch
        for batch in self.train_loader:
            self._skip(batch.unreadable)
            start = time.perf_counter()
            loss = self.batch_done(wrapped, batch)
            if self.accelerator.sync_gradients:
                self._stepped(loss, wrapped)
            self.progress.seconds += time.perf_counter() - start

    def batch_done(self, wrapped: Replicated | Sharded, batch: Batch) -> Tensor:
        """The loss of a batch, whose gradient has been added, and after the last batch of a step also taken."""
        model, optimizer = wrapped.model, wrapped.optimizer
        with self.accelerator.accumulate(model):
            loss, right = self.task.loss(model, batch)
            self.progress.add(loss.detach(), right, len(batch.indices))
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.config.clip_norm:
                self.accelerator.clip_grad_norm_(model.parameters(), self.config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        self.progress.batch += 1
        return loss

    def _stepped(self, loss: Tensor, wrapped: Replicated | Sharded) -> None:
        """After a step of the optimizer."""
        self.progress.step += 1
        self.progress.rate = float(self.schedule.get_last_lr()[0])
        if not wrapped.optimizer.step_was_skipped:
            self.schedule.step()
        if self.average is not None:
            wrapped.gather()
            self.average.update_parameters(self.model)
        due = bool(self.config.checkpoint_steps) and self.progress.step % self.config.checkpoint_steps == 0
        if due or self.progress.batch < self.order.in_all:  # the end of an epoch looks for itself
            self._look_round(due)
        if not self.listener.wants(self.progress.step):
            return
        self.listener.stepped(self.progress.step, float(loss.detach()), self.progress.means(), self.progress.rate)

    def _look_round(self, due: bool, *, always: bool = False) -> None:
        """Stops for a loss that is no number and for a signal; writes a checkpoint where one is due.

        All processes have to agree, which takes a message between them; on their own steps they do without.
        """
        alone = self.accelerator.num_processes == 1 and self.accelerator.device.type == "cpu"
        if not (alone or due or always or self.progress.step % 10 == 0):
            return
        number = self.interruption.signal(self.accelerator.device)
        unlike = self.progress.unlike_a_number(self.accelerator.device)
        if due or number:  # a checkpoint is to be written
            unlike = torch.maximum(unlike, unlike_numbers(self.model).to(unlike))
        seen = torch.stack([unlike, number])
        if self.accelerator.num_processes > 1:
            seen = self.accelerator.gather(seen[None]).amax(0)
        broken, signal = seen.tolist()
        if broken:
            kept = "" if self.file is None else " The last checkpoint is from before; --resume goes on from it."
            raise TrainingError(
                f"The loss or the weights are no numbers any more, at step {self.progress.step} (epoch "
                f"{self.progress.epoch + 1}). Lower --lr or --connection-lr, set --clip-norm 1, or use --precision "
                f"bf16 instead of fp16.{kept}"
            )
        if due or signal:
            self._checkpoint()
        if signal:
            raise stopped(int(signal), None if self.file is None else self.file.parent)

    def _end_epoch(self) -> None:
        metrics = self.evaluate(self._shown())
        if not math.isfinite(metrics.get("loss", 0.0)):
            self.progress.broken = True  # which the look round at the end of the epoch tells, before it saves
        self._share_skipped()
        own = connections(self._shown()) if self.connected else {}
        loss, accuracy = self.progress.means(self.accelerator)
        states = {name: ConnectionState(c.alpha.item(), c.beta.item(), c.contribution()) for name, c in own.items()}
        self.epochs.append(
            Epoch(
                self.progress.epoch + 1,
                self.progress.step,
                self.progress.rate,
                loss,
                accuracy,
                metrics,
                states,
                round(self.progress.seconds, 3),
                len(self.skipped),
            )
        )
        self.listener.measured(self._shown(), self.epochs[-1])
        self.progress.next_epoch()
        self._look_round(True, always=True)
        self.listener.epoch_ended(self.epochs[-1])

    def _shown(self) -> nn.Module:
        """What is evaluated and kept: the average where there is one."""
        return self.model if self.average is None else self.average.module

    @torch.no_grad()
    def evaluate(self, model: nn.Module, most: int | None = None) -> dict[str, float]:
        """The metrics of ``model`` on the validation images; ``most``: on so many batches of them only."""
        meter, in_all = self.task.meter(), self.val_order.in_all
        # Not draws of its own: images are drawn in here, each from torch's generator under a seed of its own.
        with evaluating(model), torch.random.fork_rng(devices=[]):
            for done, batch in enumerate(itertools.islice(self.val_loader, most), start=1):
                self._skip(batch.unreadable)
                meter.update(model, batch)
                self.listener.advanced("validation", done, max(done, in_all))
        metrics = meter.result(self.accelerator)
        self.by_image = meter.by_image
        return metrics

    def _skip(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.skipped:
                self.skipped[name] = None
                self.listener.skipped(name)

    def _share_skipped(self) -> None:
        """Every process has read other images: the main one names those that none of them could read."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            self._skip(gather_object(list(self.skipped)))

    def usage(self, most: int) -> Usage | None:
        """What the network makes of its connections, on images that every process goes through by itself."""
        heard = listeners(self.model)
        if not (heard and most and isinstance(self.task, Classification)):
            return None
        shown = self.val.some(most, cuda=self.accelerator.device.type == "cuda")
        batches = [(batch.inputs, batch.labels) for batch in shown]
        return usage(self.model, Watched(batches, heard, self.listener))

    # -- checkpoints ------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        if self.file is None:
            return
        with nullcontext() if self.wrapped is None else self.wrapped.whole():
            checkpoint = captured(self._standing())
        if self.accelerator.is_main_process:
            write_checkpoint(self.file, checkpoint)
        self.accelerator.wait_for_everyone()

    def _standing(self) -> Standing:
        return Standing(
            self.config,
            self.accelerator,
            self.model,
            self.optimizer,
            self.schedule,
            self.average,
            self.order.length,
            self.progress,
            self.epochs,
            self.skipped,
        )

    def _resume(self, file: Path) -> None:
        checkpoint = read_checkpoint(file)
        if checkpoint is not None:
            restored(self._standing(), checkpoint, file)
            self.listener.resumed(self.progress.epoch, self.progress.step)


@torch.no_grad()
def _take(model: nn.Module, other: nn.Module) -> None:
    """Gives ``model`` the values of ``other``."""
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        ours.copy_(theirs)
