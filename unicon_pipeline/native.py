"""Native tasks: what a checkpoint was trained for before it became a foundation.

A native task keeps its own network (nnU-Net's decoder and folds, CT-CLIP's text latents) on the shared foundation.
It has no adapters and no stems, needs every modality that it was trained with, and is never trained here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from unicon_pipeline.foundation import Foundation, freeze
from unicon_pipeline.registry import Registry
from unicon_pipeline.weights import canonical_state


class NativeModel(nn.Module, ABC):
    """Base of every native network; `foundation` is shared and frozen.

    It is built from `options` alone, and its own weights are all but the foundation's.
    """

    def __init__(self, foundation: Foundation, options: dict[str, Any]):
        super().__init__()
        self.foundation = freeze(foundation)
        self.options = options

    @abstractmethod
    def forward(self, images_bczyx: Tensor, present_bc: Tensor) -> list[Tensor]:
        """Logits as the one item of a list, as `TaskModel` gives them: (B, C, Z, Y, X), or (B, C) for whole cases."""

    def last_layers(self) -> list[nn.Module]:
        """The 1 x 1 x 1 convolutions whose mean gives the logits, where it ends with such."""
        return []

    def drop_last_layers(self) -> None:
        """For prediction: from now on `forward` gives what the last layers would get, side by side."""

    def own_state(self) -> dict[str, Tensor]:
        """The weights that are not the foundation's."""
        return {name: t for name, t in canonical_state(self).items() if not name.startswith("foundation.")}

    def merged(self) -> NativeModel:
        """Itself: there is no adapter."""
        return freeze(self)


NATIVES: Registry[type[NativeModel]] = Registry("native task")
