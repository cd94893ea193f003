"""segmentation_models_pytorch: attention in decoders and in encoders."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trained import trained

from client_cases.case import Side, all_receive_gradients, called, case, check, equal, same_state
from client_cases.networks import pictures

CLIENT = "segmentation_models_pytorch"


def network(kind: str = "Unet", encoder: str = "resnet18", **options: Any) -> nn.Module:
    import segmentation_models_pytorch as smp

    return trained(lambda: getattr(smp, kind)(encoder, encoder_weights=None, classes=2, **options), pictures(8))


@case(CLIENT)
def unet_scse(side: Side) -> None:
    """Unet("resnet18", decoder_attention_type="scse"): the original's masks; encoder, decoder and head by hand"""
    x = pictures()
    # The narrowest decoder block by default has one hidden unit, which may be dead, as four may.
    model = network(decoder_attention_type="scse", decoder_channels=(256,) * 5)
    equal(called(side.at_start(model, x), x), called(model, x))
    d = side.under_way(model, x)
    with torch.no_grad():
        equal(d.segmentation_head(d.decoder(d.encoder(x))), d(x), "in parts")
    d.train()(x).square().mean().backward()
    all_receive_gradients(side, d)


@case(CLIENT)
def predict(side: Side) -> None:
    """d.predict from training mode: d(x) in eval mode, and the model is left in eval mode"""
    x = pictures()
    d = side.under_way(network(decoder_attention_type="scse"), x)
    expected = called(d.eval(), x)
    equal(d.train().predict(x), expected)
    check(not d.training, "left in training mode")


@case(CLIENT)
def save_pretrained(side: Side) -> None:
    """save_pretrained writes the whole state dict and the configuration; smp.from_pretrained reads base and config"""
    from safetensors.torch import load_file
    from segmentation_models_pytorch import Unet

    d = side.under_way(network(decoder_attention_type="scse"), pictures())
    with tempfile.TemporaryDirectory() as folder:
        d.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
        same_state(state, d.state_dict(), "saved")
        again = Unet.from_pretrained(folder, strict=False)
    own = again.state_dict()
    check(all(torch.equal(own[key], state[key]) for key in own), "another base")
    check(again.encoder.__class__ is d.encoder.__class__ or side is Side.CONVERTED, "another encoder")


@case(CLIENT)
def attention_in_the_encoder(side: Side) -> str:
    """Unet and FPN on encoders with SE (se_resnet, efficientnet, timm's): the original's masks, d.encoder(x)"""
    count = 0
    for kind, encoder in (
        ("Unet", "timm-efficientnet-b0"),
        ("FPN", "efficientnet-b0"),
        ("Unet", "tu-seresnet18"),
        ("DeepLabV3Plus", "tu-regnety_002"),
        ("Unet", "timm-mobilenetv3_small_075"),
    ):
        x = pictures()
        model = network(kind, encoder)
        equal(called(side.at_start(model, x), x), called(model, x), f"{kind} {encoder}")
        d = side.under_way(model, x)
        with torch.no_grad():
            equal(d.segmentation_head(d.decoder(d.encoder(x))), d(x), f"{kind} {encoder} in parts")
        count += 1
    return f"{count} networks"
