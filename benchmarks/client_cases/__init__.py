"""What other libraries do with a model, as cases that run on the original and on the connected model.

Each module holds the cases of one kind of client; importing this imports them all, and with them what they need of
torch and timm only: a client itself is imported by its own cases.
"""

from client_cases import (
    compression,
    explanations,
    exporting,
    hugging_face,
    processes,
    segmentation,
    timm_models,
    torch_itself,
    torchvision_models,
    training,
)
from client_cases.case import CASES, Case, Side

__all__ = [
    "CASES",
    "Case",
    "Side",
    "compression",
    "explanations",
    "exporting",
    "hugging_face",
    "processes",
    "segmentation",
    "timm_models",
    "torch_itself",
    "torchvision_models",
    "training",
]
