"""What the report's words mean, for whoever has not read the paper."""

from __future__ import annotations

WORDS: dict[str, tuple[str, str]] = {
    "X": ("X", "the feature map on which an attention block acts: channels of height by width numbers."),
    "G": (
        "G",
        "what a block gathers from its feature map X: one number for each channel (or place), such as its mean.",
    ),
    "T": (
        "T",
        "the attention map: what a block makes of G, one weight for each channel (or place). X is multiplied by it, so "
        "that T near 0 switches a channel off.",
    ),
    "connection": (
        "connection",
        "what dcafy adds: the T of a block goes to the next block too, which then works with αG + βT̃ in the place of "
        "its own G alone (T̃ is T, made to fit in size). At α = 1 and β = 0 the network computes what it did before.",
    ),
    "alpha": ("α", "the learned weight of the block's own G. It begins at 1."),
    "beta": (
        "β",
        "the learned weight of the message from the block before. It begins at 0, where nothing is heard yet; "
        "behind attention that was put in as a no-op, at 0.5, where what is heard changes nothing yet.",
    ),
    "contribution": (
        "contribution",
        "|β| / (|α| + |β|): how large β is beside α (paper 4.5). It does not say whether anything depends on it.",
    ),
    "share": (
        "message share",
        "‖β·T̃‖ / (‖αG‖ + ‖β·T̃‖) on these images: how much of what goes into a block came from the block before.",
    ),
    "cut": (
        "cut",
        "the connection is switched off (no message) and the loss is measured again: what the connection is worth in "
        "all. A rise means that the network uses it.",
    ),
    "mean": (
        "mean",
        "the average message is heard in the place of this image's: what it is worth that messages differ at all. "
        "Where that costs nothing, the connection is a constant, the same for every image.",
    ),
    "shuffled": (
        "shuffled",
        "another image's message is heard: what it is worth that the message is of this very image.",
    ),
    "varies": (
        "varies",
        "the part of the message (of its energy) that differs between images; the rest is a constant.",
    ),
    "moves": ("T moves", "how far the block's T moves if the connection is cut, in standard deviations (σ) of T."),
    "error": ("±", "a standard error, from the differences image by image; twice as much is about a 95% interval."),
    "spread": (
        "spread",
        "the standard deviation of T over images and channels. Near 0, attention tells nothing apart.",
    ),
    "stage": ("stage", "the part of a network that computes on feature maps of one size."),
    "cam": (
        "Grad-CAM",
        "a map of what in the image speaks for a class, from the gradients of its score; bright (or red) is much.",
    ),
}
"""Key -> the word, and what it means."""

FIRST = ("X", "G", "T", "connection", "alpha", "beta")
"""What the picture of the words shows; the others are looked up."""
