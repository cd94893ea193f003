"""Training loops and adapters: Lightning, fastai, peft."""

from __future__ import annotations

import contextlib
import copy
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from networks import SELinear, with_attention
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trained import trained

from client_cases.case import Side, all_change, called, case, check, close, equal, same_state, values
from client_cases.networks import CLASSES, labels, pictures, step, timm_network


def loader(batches: int = 3) -> DataLoader[Any]:
    images = torch.cat([pictures(4, seed=seed) for seed in range(batches)])
    return DataLoader(TensorDataset(images, labels(4).repeat(batches)), batch_size=4)


# -- Lightning -----------------------------------------------------------------------------------------------------


def lit_classifier(network: nn.Module) -> Any:
    """A module of Lightning's whose optimizer is given what requires a gradient."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone
            self.head = nn.Linear(CLASSES, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.backbone(images))

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    torch.manual_seed(0)
    return Classifier(network)


def fitted(module: Any, folder: str, epochs: int, **options: Any) -> Any:
    import lightning

    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder,
        enable_model_summary=True, **options,
    )  # fmt: skip
    trainer.fit(module, loader())
    return trainer


@case("lightning")
def fit_and_checkpoint(side: Side) -> None:
    """Trainer.fit trains the connections; load_from_checkpoint gives the same outputs; fit goes on from a checkpoint"""
    import lightning

    x = pictures()
    d = side.under_way(timm_network(), x)
    before = values(side, d)
    with tempfile.TemporaryDirectory() as folder:
        module = lit_classifier(d.train())
        trainer = fitted(module, folder, 2)
        all_change(side, d, before)
        path = str(Path(folder) / "one.ckpt")
        trainer.save_checkpoint(path)
        again = type(module).load_from_checkpoint(path, backbone=side.at_start(timm_network(), x))
        equal(called(again.eval(), x), called(module.eval(), x))
        other = lit_classifier(side.at_start(timm_network(), x).train())
        more = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder
        )
        more.fit(other, loader(), ckpt_path=path, weights_only=False)
        check(more.global_step == 9, f"went on to step {more.global_step}")


@case("lightning")
def backbone_finetuning(side: Side) -> str:
    """BackboneFinetuning: only batch norms move while the backbone is frozen; then all of it trains, connections too"""
    from lightning.pytorch.callbacks import BackboneFinetuning, Callback

    d = side.under_way(timm_network(), pictures())
    names = [name for name, _ in d.named_parameters()]
    start = [p.detach().clone() for p in d.parameters()]
    frozen: list[str] = []

    def standing_still() -> list[str]:
        return [name for name, a, b in zip(names, start, d.parameters(), strict=True) if torch.equal(a, b)]

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 0:
                frozen.extend(standing_still())

    module = lit_classifier(d.train())
    thaw = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=1.0, train_bn=False, should_align=False
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = fitted(module, folder, 2, callbacks=[thaw, Look()])
    norms = {id(p) for m in d.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    expected = [name for name, p in d.named_parameters() if id(p) not in norms]
    check(frozen == expected, f"moved while frozen: {sorted(set(expected) - set(frozen))[:2]}")
    given = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    check(len({id(p) for p in given}) == len(given) == len(names) + 2, "not every parameter once")
    check(not standing_still(), f"{len(standing_still())} parameters stood still afterwards: {standing_still()[:2]}")
    return f"{len(names)} parameters"


@case("lightning")
def weight_averaging(side: Side) -> None:
    """EMAWeightAveraging over two epochs: afterwards the model has an average, and computes as a copy given it"""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    x = pictures()
    d = side.under_way(timm_network(), x)
    before = values(side, d)
    module = lit_classifier(d.train())
    with tempfile.TemporaryDirectory() as folder:
        fitted(module, folder, 2, callbacks=[EMAWeightAveraging(decay=0.5)])
    all_change(side, d, before)
    other = lit_classifier(side.at_start(timm_network(), x))
    other.load_state_dict(module.state_dict())
    equal(called(other.eval(), x), called(module.eval(), x))


# -- fastai --------------------------------------------------------------------------------------------------------


def fastai_data() -> Any:
    from fastai.data.core import DataLoaders

    return DataLoaders(loader(), loader())


@contextlib.contextmanager
def silent(learn: Any) -> Iterator[None]:
    """Inside it a Learner shows no bars; its module of schedules is there, which gives it ``fine_tune``."""
    for module in ("progress", "schedule"):
        importlib.import_module(f"fastai.callback.{module}")
    with learn.no_bar(), learn.no_logging():
        yield


def body_of(side: Side, cut: Any) -> tuple[nn.Module, nn.Module]:
    """A network, and what fastai's create_body makes of it."""
    from fastai.vision.learner import create_body

    d = side.under_way(timm_network(), pictures())
    return d, create_body(d, cut=cut)


@case("fastai")
def bodies(side: Side) -> None:
    """create_body cut at the pooling, by a number from the front and by a function: the features of the whole"""
    x = pictures()
    for cut in (None, 8, lambda model: nn.Sequential(*list(model.children())[:8])):
        d, body = body_of(side, cut)
        expected = called(d.forward_features, x) if hasattr(d, "forward_features") else None
        check(expected is not None, "no forward_features to compare with")
        equal(called(body.eval(), x), expected)


@case("fastai")
def learner(side: Side) -> str:
    """A Learner with a connected body and fastai's head, frozen, unfrozen, saved: connections are trained"""
    from fastai.callback.schedule import Learner
    from fastai.vision.learner import create_head

    d, body = body_of(side, 8)
    before = values(side, d)
    model = nn.Sequential(body, create_head(512, CLASSES))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        learn = Learner(
            fastai_data(), model, loss_func=nn.CrossEntropyLoss(), path=folder,
            splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())],
        )  # fmt: skip
        with silent(learn):
            learn.freeze()
            learn.fit(1)
            learn.unfreeze()
            learn.fit_one_cycle(2, slice(1e-4, 1e-2))
        all_change(side, d, before)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        learn.save("saved")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        learn.load("saved")
        same_state(model.state_dict(), state, "loaded")
    return f"loss {learn.recorder.losses[0]:.2f} to {learn.recorder.losses[-1]:.2f}"


@case("fastai")
def vision_learner(side: Side) -> None:
    """vision_learner with an architecture that gives the connected model: fine_tune trains the connections"""
    from fastai.vision.learner import vision_learner as make

    d = side.under_way(timm_network(), pictures())
    before = values(side, d)

    def architecture(pretrained: bool = False) -> nn.Module:
        return d

    learn = make(
        fastai_data(), architecture, pretrained=False, n_out=CLASSES, normalize=False, loss_func=nn.CrossEntropyLoss(),
        splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())],
    )  # fmt: skip
    with silent(learn):
        learn.fine_tune(1, freeze_epochs=1)
    all_change(side, d, before)


# -- peft ----------------------------------------------------------------------------------------------------------


def adapted(side: Side, model: nn.Module, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, **options))


@case("peft")
def lora(side: Side) -> str:
    """LoRA with modules_to_save=["dca"]: α, β and matches train, the base stands still; saved, reloaded, to the bit"""
    from peft import PeftModel

    x = pictures()
    model = timm_network()
    d = side.at_start(model, x)
    kept = ["dca"] if side is Side.CONVERTED else ["fc"]
    adapter = adapted(side, d, target_modules=["fc1", "fc2", "conv1"], modules_to_save=kept)
    equal(called(adapter.eval(), x), called(model, x), "at the start")
    moving = {name for name, p in adapter.named_parameters() if p.requires_grad}
    stray = [name for name in moving if "lora_" not in name and "modules_to_save" not in name]
    check(not stray, f"trained besides: {stray[:2]}")
    new = [name for name in moving if "modules_to_save" in name]
    if side is Side.CONVERTED:
        expected = sum(1 for c in side.connections(side.at_start(model, x)).values() for _ in c.parameters())
        check(len(new) == expected, f"{len(new)} of {expected} parameters of connections are to be saved")
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    _few_steps(adapter)
    changed = {name for name, p in adapter.named_parameters() if not torch.equal(p, before[name])}
    check(changed == moving, f"stood still: {sorted(moving - changed)[:2]}")
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        again = PeftModel.from_pretrained(side.at_start(model, x), folder)
    statistics = dict(adapter.named_buffers())
    for name, value in again.named_buffers():  # an adapter's file has no statistics of norms
        value.copy_(statistics[name])
    equal(called(again.eval(), x), called(adapter.eval(), x), "reloaded")
    check(not torch.equal(called(adapter, x), called(model, x)), "training made no difference")
    return f"{len(new)} parameters of modules to save"


def _few_steps(model: nn.Module) -> None:
    """Two steps, so that what starts at zero gives the rest a gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        step(model)
        optimizer.step()


@case("peft")
def lora_on_all_linear(side: Side) -> str:
    """target_modules="all-linear": the original's layers and the matches', outputs at the start, merged after steps"""
    x = pictures()
    model = trained(lambda: with_attention(SELinear), pictures(8))
    d = side.under_way(model, x)
    expected = called(d, x)
    adapter = adapted(side, d, target_modules="all-linear")
    equal(called(adapter.eval(), x), expected, "at the start")
    adapted_layers = {name for name, module in adapter.named_modules() if hasattr(module, "lora_A")}
    base = {name for name in adapted_layers if "dca" not in name.split(".")}
    check(len(base) == sum(isinstance(m, nn.Linear) for m in model.modules()), f"{len(base)} linear layers of the base")
    _few_steps(adapter)
    later = called(adapter.eval(), x)
    return f"{len(adapted_layers)} layers, merged {close(called(adapter.merge_and_unload().eval(), x), later)}"


@case("peft")
def lora_on_timm_wrapper(side: Side) -> None:
    """LoRA around transformers' TimmWrapper: outputs at the start, one step, the adapter's parameters moved"""
    from client_cases.hugging_face import classifier, example

    d = side.under_way(classifier("timm_wrapper"), example())
    expected = called(d, example()).logits
    adapter = adapted(side, d, target_modules=r".*\.(fc1|fc2)", modules_to_save=["timm_model.fc"])
    equal(called(adapter.eval(), example()).logits, expected)
    adapter.train()(pixel_values=pictures(4), labels=labels(4)).loss.backward()
    moving = [p for p in adapter.parameters() if p.requires_grad]
    check(all(p.grad is not None for p in moving), "parameters without a gradient")
    equal(called(copy.deepcopy(adapter).eval(), example()).logits, called(adapter.eval(), example()).logits, "a copy")
