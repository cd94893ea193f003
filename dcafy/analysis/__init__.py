"""What the attention of a network does, as tensors and dataclasses that a notebook can plot.

``attention_values``  T of every block over images (paper Fig. 1)
``grad_cam``          where the network looks, by stage (paper Fig. 1 and 4)
``contributions``     what each connection contributes (paper 4.5, Fig. 5)
``draw``              the blocks and connections as SVG
"""

from dcafy.analysis.contributions import contributions
from dcafy.analysis.gradcam import GradCam, StageMaps, grad_cam
from dcafy.analysis.values import AttentionValues, Histogram, attention_values
from dcafy.plan.blocks import Contribution
from dcafy.plan.drawing import Drawing, Lane, draw

__all__ = [
    "AttentionValues",
    "Contribution",
    "Drawing",
    "GradCam",
    "Histogram",
    "Lane",
    "StageMaps",
    "attention_values",
    "contributions",
    "draw",
    "grad_cam",
]
