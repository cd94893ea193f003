"""Saving a converted model as a folder, and getting it back from there.

``saving``        :func:`save`: a converted model becomes a description and tensors
``loading``       :func:`load`: the network is built or taken, converted again, and given the tensors
``description``   what ``dcafy.json`` says, as frozen data; checked when it is read
``tensors``       state dict <-> file: each tensor once, contiguous, with its dtype; fingerprints
``state``         what a state dict does not hold: modes, frozen parameters
``architecture``  which ``torchvision:`` or ``timm:`` name builds the same network
``folder``        the files on the disk, replaced all at once
``card``          README.md: what was measured, for people
``hub``           :func:`push_to_hub`, and folders at ``hf://user/name``

A folder from a stranger is data. Nothing in it is unpickled, imported or called; the only names that it
can choose are those that torchvision and timm register, and they are built without their weights.
"""

from dcafy.checkpoint.hub import push_to_hub
from dcafy.checkpoint.loading import load
from dcafy.checkpoint.saving import save

__all__ = ["load", "push_to_hub", "save"]
