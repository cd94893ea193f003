"""What a run is asked to do: the options of ``dcafy finetune`` as frozen data."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from dcafy.errors import UsageError
from dcafy.plan.options import check, setting

DECAYED = ("weights", "dense", "all")

LEARNING_RATES = {"adamw": 5e-4, "sgd": 0.01}
TIMES = 10
"""The rate of connections over that of the base; over the base's default rate at most, for 1.0 is too much with sgd."""

WEIGHT_DECAYS = {"adamw": 1e-2, "sgd": 1e-4}


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained: the optimizer, its schedule, the budget, what is kept."""

    epochs: int = setting(10, "How often the training images are gone through.", least=1)
    batch_size: int = setting(32, "Images in a batch, over all processes together.", least=1, also=("--bs",))
    accumulate: int = setting(1, "Batches for one step of the optimizer.", least=1)
    optimizer: str = setting("adamw", "adamw, or sgd with momentum (the paper's).", choices=("adamw", "sgd"))
    lr: float | None = setting(
        None,
        "Learning rate of the base. [default: 0.0005 with adamw, 0.01 with sgd]",
        least=0,
        also=("--learning-rate",),
    )
    connection_lr: float | None = setting(
        None,
        "Learning rate of the connections and of inserted attention. [default: 10 times --lr, but at most 0.005 with "
        "adamw, 0.1 with sgd, and at least --lr]",
        least=0,
    )
    scale_lr: float | None = setting(None, "Learning rate of α and β. [default: that of the connections]", least=0)
    weight_decay: float | None = setting(
        None,
        "Weight decay; see --decayed for of what. [default: 0.01 with adamw, 0.0001 with sgd]",
        least=0,
        also=("--wd",),
    )
    decayed: str = setting(
        "weights",
        "What weight decay is for: weights (not α, β, norms and biases), dense (not biases, batch norms and depthwise "
        "convolutions), or all.",
        choices=DECAYED,
    )
    momentum: float = setting(0.9, "Momentum of sgd.", least=0, below=1)
    nesterov: bool = setting(True, "Nesterov momentum, with sgd.")
    schedule: str = setting(
        "cosine",
        "How the rates fall: cosine, to 0; step, by 10 every --step-epochs (paper 4.1); multistep, by 10 at each of "
        "--milestones (usual for detectors); constant.",
        choices=("cosine", "step", "multistep", "constant"),
    )
    step_epochs: int = setting(30, "Epochs between two steps of the schedule.", least=1)
    milestones: str | None = setting(
        None,
        "Epochs after which the rates of multistep fall, such as 18,22. [default: 2/3 and 11/12 of the run]",
        metavar="EPOCHS",
    )
    warmup_epochs: float = setting(0.0, "Epochs over which the rates rise.", least=0)
    warmup_steps: int = setting(0, "Steps over which they rise, in the place of --warmup-epochs.", least=0)
    warmup_from: float = setting(0.0, "The part of the rates at which they begin to rise.", least=0, below=1)
    label_smoothing: float = setting(0.0, "The part of each label that is spread over all classes.", least=0, below=1)
    mixup: float = setting(0.0, "Strength (alpha) of mixup; 0 is none.", least=0)
    cutmix: float = setting(
        0.0, "Strength (alpha) of CutMix; 0 is none. With both, each batch gets one of them.", least=0
    )
    balance: bool = setting(
        False,
        "Weigh each class in the loss by how rare it is (all images over classes times images of the class), so that "
        "rare ones count as much as common ones.",
    )
    ema: float = setting(
        0.0, "Decay of an average of the weights, such as 0.999, which is then evaluated and kept.", least=0, below=1
    )
    clip_norm: float = setting(0.0, "The largest norm of all gradients together; 0 is no limit.", least=0)
    precision: str = setting("no", "Mixed precision.", choices=("no", "bf16", "fp16"))
    freeze_base: bool = setting(False, "Train only the connections, inserted attention, and a new classifier.")
    freeze_base_epochs: int = setting(0, "Epochs at the start in which only that is trained.", least=0)
    seed: int = setting(0, "Decides the new weights, the order of the images, augmentation and dropout.", least=0)
    workers: int = setting(
        0, "Processes that read images, for each training process; 0 reads them in it.", least=0, below=1025
    )
    checkpoint_steps: int = setting(0, "Steps between two checkpoints. [default: one after each epoch]", least=0)
    usage_images: int = setting(
        1024, "Validation images on which connections are cut and shuffled at the end; 0 is none.", least=0
    )
    cpu: bool = setting(False, "Train on the CPU also where there is a GPU.")

    def __post_init__(self) -> None:
        check(self)
        self._milestones()
        if self.warmup_steps and self.warmup_epochs:
            raise UsageError("--warmup-steps and --warmup-epochs both say how long the rates rise. Leave one out.")

    @property
    def falls_at(self) -> tuple[float, ...]:
        """The epochs after which the rates of ``multistep`` fall; ``UsageError`` where they lie behind the run."""
        found = self._milestones() or (8 / 12 * self.epochs, 11 / 12 * self.epochs)
        if found[-1] >= self.epochs:
            raise UsageError(
                f"--milestones {self.milestones} go beyond the {self.epochs} epochs of the run: there the rates would "
                "never fall. Choose earlier ones, or more --epochs."
            )
        return found

    def _milestones(self) -> tuple[float, ...]:
        """Those that were given; ``UsageError`` where they are no epochs that rise."""
        if self.milestones is None:
            return ()
        try:
            found = tuple(float(part) for part in self.milestones.split(","))
        except ValueError:
            found = ()
        if not found or not all(0 < earlier < later for earlier, later in itertools.pairwise((*found, math.inf))):
            raise UsageError(f"--milestones {self.milestones!r} should be epochs that rise, such as 18,22.")
        return found

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return bool(self.mixup or self.cutmix)

    @property
    def base_rate(self) -> float:
        """The learning rate of the base."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def connection_rate(self) -> float:
        """The learning rate of everything under ``dca``, α and β apart, and of inserted attention."""
        if self.connection_lr is not None:
            return self.connection_lr
        return max(min(TIMES * self.base_rate, TIMES * LEARNING_RATES[self.optimizer]), self.base_rate)

    @property
    def scale_rate(self) -> float:
        """The learning rate of α and β."""
        return self.connection_rate if self.scale_lr is None else self.scale_lr

    @property
    def decay(self) -> float:
        """The weight decay of what has one."""
        return WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay
