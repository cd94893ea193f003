"""transformers: one conversion for training with labels, inference, hidden states, saving; accelerate."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trained import trained

from client_cases.case import (
    Side,
    all_change,
    all_receive_gradients,
    called,
    case,
    check,
    equal,
    gradients,
    same_state,
    values,
)
from client_cases.networks import CLASSES, labels, pictures, recomputing


class _Logits(nn.Module):
    """What makes plain outputs of a classifier's, so that it can be given trained-like values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return _scores(self.inner(pixel_values=images))


def _scores(output: Any) -> Tensor:
    """A classifier's scores, which PP-LCNet calls its last hidden state."""
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


def classifier(kind: str = "regnet") -> nn.Module:
    return trained(lambda: _Logits(_build(kind)), pictures(8)).inner


def _build(kind: str) -> nn.Module:
    import transformers as hf

    if kind == "regnet":
        config = hf.RegNetConfig(
            embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], groups_width=8, layer_type="y"
        )
        return hf.RegNetForImageClassification(_with_labels(config))
    if kind == "pp_lcnet":
        return hf.PPLCNetForImageClassification(_with_labels(hf.PPLCNetConfig(scale=0.5)))
    if kind == "efficientnet":
        config = hf.EfficientNetConfig(width_coefficient=0.5, depth_coefficient=0.6, hidden_dim=640, image_size=64)
        return hf.EfficientNetForImageClassification(_with_labels(config))
    assert kind == "timm_wrapper"
    config = hf.TimmWrapperConfig(architecture="seresnet18", num_labels=CLASSES, do_pooling=True)
    return hf.TimmWrapperForImageClassification(config)


def _with_labels(config: Any) -> Any:
    config.num_labels = CLASSES
    return config


def example(batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": pictures(batch)}


KINDS = ("regnet", "timm_wrapper", "efficientnet", "pp_lcnet")


@case("transformers")
def one_conversion_serves_all(side: Side) -> str:
    """Logits, loss with labels, hidden states and tuples with the original's; trained by its own loss"""
    for kind in KINDS:
        model = classifier(kind)
        start, x = side.at_start(model, example()), pictures(3)
        check(isinstance(start, type(model)), f"{kind}: not a {type(model).__name__}")
        for given in (
            {},
            {"labels": labels(3)},
            {"output_hidden_states": True},
            {"return_dict": False, "labels": labels(3)},
        ):
            if kind == "pp_lcnet" and "labels" in given:
                continue  # it takes none
            with torch.no_grad():
                expected, found = (m(pixel_values=x, **given) for m in (model, start))
            check(type(found) is type(expected), f"{kind}: {type(found).__name__}")
            equal(_plain(found), _plain(expected), f"{kind} {sorted(given)}")
        d = side.under_way(model, example()).train()
        _loss(d, 3).backward()
        all_receive_gradients(side, d)
    return ", ".join(KINDS)


def _loss(model: nn.Module, batch: int) -> Tensor:
    """The classifier's own loss where it has one."""
    if type(model).__name__.startswith("PPLCNet"):
        return cross_entropy(_scores(model(pixel_values=pictures(batch))), labels(batch))
    loss: Tensor = model(pixel_values=pictures(batch), labels=labels(batch)).loss
    return loss


def _plain(output: Any) -> list[Any]:
    return list(output.to_tuple() if hasattr(output, "to_tuple") else output)


@case("transformers")
def in_parts(side: Side) -> None:
    """d.base_model(x), pooled and classified by hand: the whole's logits; hidden states end in what is pooled"""
    d = side.under_way(classifier(), example())
    x = pictures(3)
    with torch.no_grad():
        whole = d(pixel_values=x, output_hidden_states=True)
        equal(d.classifier(d.base_model(x).pooler_output), whole.logits)
        equal(d.classifier(d.regnet.pooler(whole.hidden_states[-1])), whole.logits, "of the last hidden state")
        equal(d.regnet.encoder(d.regnet.embedder(x)).last_hidden_state, whole.hidden_states[-1], "encoder")


@case("transformers", "accelerate")
def trainer(side: Side) -> str:
    """Trainer with labels, evaluation, saved steps and a resumed run: loss falls, connections train, they are saved"""
    import transformers as hf

    class Pictures(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            label = index % CLASSES
            return {"pixel_values": pictures(1, seed=index)[0] + label, "labels": torch.tensor(label)}

    d = side.under_way(classifier(), example())
    before = values(side, d)
    with tempfile.TemporaryDirectory() as folder:

        def settings(epochs: int) -> Any:
            return hf.TrainingArguments(
                folder, num_train_epochs=epochs, per_device_train_batch_size=4, use_cpu=True, save_strategy="epoch",
                eval_strategy="epoch", logging_steps=1, learning_rate=5e-3, report_to=[], disable_tqdm=True,
            )  # fmt: skip

        run = hf.Trainer(d, settings(3), train_dataset=Pictures(), eval_dataset=Pictures())
        run.train()
        losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
        check(losses[-1] < losses[0], f"losses {losses}")
        all_change(side, d, before)
        predicted = run.predict(Pictures()).predictions
        check(predicted.shape == (12, CLASSES), f"predictions {predicted.shape}")
        other = hf.Trainer(
            side.at_start(classifier(), example()), settings(4), train_dataset=Pictures(), eval_dataset=Pictures()
        )
        other.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-9"))
        check(other.state.global_step == 12, f"resumed to step {other.state.global_step}")
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


@case("transformers")
def save_pretrained(side: Side) -> None:
    """save_pretrained of the whole: every key; from_pretrained reads its base; its state dict loads into a new one"""
    from safetensors.torch import load_file

    d = side.under_way(classifier(), example())
    with tempfile.TemporaryDirectory() as folder:
        d.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
        base = type(classifier()).from_pretrained(folder)
    same_state(state, d.state_dict(), "saved")
    own = base.state_dict()
    check(all(torch.equal(own[key], state[key]) for key in own), "another base")
    again = side.at_start(base.eval(), example())
    again.load_state_dict(state)
    equal(_plain(called(again.eval(), example())), _plain(called(d.eval(), example())))


@case("transformers")
def gradient_checkpointing_enable(side: Side) -> str:
    """Loss and gradients with those without; the blocks run twice (models that have it: timm's and PP-LCNet)"""
    for kind, path in (
        ("timm_wrapper", "timm_model.layer3.0.conv1"),
        ("pp_lcnet", "encoder.blocks.3.layers.1.depthwise_convolution"),
    ):
        plain = side.under_way(classifier(kind), example()).train()
        twice = copy.deepcopy(plain)
        twice.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs = recomputing(twice, path)
        losses = []
        for network in (plain, twice):
            torch.manual_seed(7)
            loss = _loss(network, 4)
            loss.backward()
            losses.append(loss.item())
        check(losses[0] == losses[1], f"{kind}: another loss")
        check(len(runs) == 2, f"{kind}: {path} ran {len(runs)} times")
        same_state(gradients(plain), gradients(twice), f"{kind}: gradients")
        all_receive_gradients(side, twice)
    return "to the bit"


@case("transformers")
def pipeline(side: Side) -> None:
    """pipeline("image-classification") around it: the labels and scores of its own softmax"""
    import numpy
    import transformers as hf
    from PIL import Image

    d = side.under_way(classifier(), example())
    processor = hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0)
    picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8"))
    found = hf.pipeline("image-classification", model=d, image_processor=processor)(picture, top_k=CLASSES)
    scores = called(d, dict(processor(picture, return_tensors="pt"))).logits.softmax(-1)[0]
    expected = sorted(scores.tolist(), reverse=True)
    check(all(abs(a["score"] - b) < 1e-6 for a, b in zip(found, expected, strict=True)), "other scores")


@case("accelerate")
def offloaded(side: Side) -> None:
    """cpu_offload and hooks on every module (its patched forwards): outputs to the bit, also after they are removed"""
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules

    d = side.under_way(classifier(), example())
    expected = called(d, example()).logits
    hooked = copy.deepcopy(d)
    for module in hooked.modules():
        add_hook_to_module(module, ModelHook())
    equal(called(hooked, example()).logits, expected, "with hooks")
    remove_hook_from_submodules(hooked)
    equal(called(hooked, example()).logits, expected, "hooks removed")
    away = cpu_offload(copy.deepcopy(d), execution_device=torch.device("cpu"))
    check(all(p.is_meta for p in away.parameters()), "nothing was offloaded")
    equal(called(away, example()).logits, expected, "offloaded")


@case("accelerate")
def accelerator(side: Side) -> None:
    """Accelerator: prepared, two steps with accumulation, save_state and load_state: the same parameters"""
    from accelerate import Accelerator

    torch.manual_seed(0)
    d = side.under_way(classifier("timm_wrapper"), example()).train()
    before = values(side, d)
    run = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = run.prepare(d, torch.optim.SGD(d.parameters(), lr=0.05))
    for batch in range(4):
        with run.accumulate(model):
            run.backward(model(pixel_values=pictures(4, seed=batch), labels=labels(4)).loss)
            optimizer.step()
            optimizer.zero_grad()
    all_change(side, run.unwrap_model(model), before)
    state = {key: value.clone() for key, value in d.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        run.save_state(folder)
        with torch.no_grad():
            for parameter in d.parameters():
                parameter.zero_()
        run.load_state(folder)
    same_state(d.state_dict(), state, "loaded")
