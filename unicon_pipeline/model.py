"""One task's way through the growing model: frozen foundation, stems, the task's adapter, the task's head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import unicon_pipeline.case_head  # noqa: F401  its heads register themselves
from unicon_pipeline.adapters import ADAPTERS
from unicon_pipeline.extension_plan import ExtensionPlan, StemPlan
from unicon_pipeline.foundation import Foundation, freeze
from unicon_pipeline.heads import HEADS, Features
from unicon_pipeline.levels import skip_levels
from unicon_pipeline.stems import STEMS, masked
from unicon_pipeline.weights import canonical_state


class TaskModel(nn.Module):
    """Input channels in the order of the task's `modalities`; what is not trained stays in evaluation mode.

    Args:
        foundation: shared, frozen.
        stems: for each modality that the foundation does not take natively.
        new_stems: which of them this task brings (and trains); the others are frozen.
        adapter: the task's, or None.
        head: the task's.
    """

    def __init__(
        self,
        foundation: Foundation,
        modalities: tuple[str, ...],
        stems: dict[str, nn.Module],
        new_stems: tuple[str, ...],
        adapter: nn.Module | None,
        head: nn.Module,
    ):
        super().__init__()
        self.foundation = freeze(foundation)
        self.modalities = modalities
        self.stems = nn.ModuleDict(stems)
        self.frozen_stems = tuple(name for name in stems if name not in new_stems)
        for name in self.frozen_stems:
            freeze(self.stems[name])
        self.adapter = adapter
        self.head = head

    def train(self, mode: bool = True) -> TaskModel:
        super().train(mode)
        self.foundation.eval()
        for name in self.frozen_stems:
            self.stems[name].eval()
        return self

    def forward(self, images_bczyx: Tensor, present_bc: Tensor, **head_options) -> Tensor | list[Tensor]:
        """The head's output.

        Args:
            images_bczyx: normalised channels, absent ones zero.
            present_bc: (B, C) bool, which channels a case has; every case has at least one.
        """
        return self.head(self.features(images_bczyx, present_bc), **head_options)

    def features(self, images_bczyx: Tensor, present_bc: Tensor) -> Features:
        """What the head reads; a modality absent from the whole batch costs nothing."""
        added, maps = None, {}
        for name, stem in self.stems.items():
            channel = self.modalities.index(name)
            present = present_bc[:, channel]
            if not bool(present.any()):
                continue
            projected, skips = stem(images_bczyx[:, channel : channel + 1])
            if not bool(present.all()):
                projected, *skips = (masked(tensor, present) for tensor in (projected, *skips))
            added = projected if added is None else added + projected
            maps[name] = skips
        native, native_present = self._native(images_bczyx, present_bc)
        if native is None and added is None:  # a whole case may be judged by figures of what the encoder cannot read
            channels = len(self.foundation.spec.input.modalities)
            native = torch.zeros_like(images_bczyx[:, :1]).expand(-1, channels, -1, -1, -1)
            native_present = native.new_zeros(len(native))
        inputs = (native, native_present, added)
        pyramid = self.foundation(*inputs) if self.adapter is None else self.adapter(self.foundation, *inputs)
        return Features(pyramid, maps, native, native_present)

    def _native(self, images_bczyx: Tensor, present_bc: Tensor) -> tuple[Tensor | None, Tensor | None]:
        wanted = self.foundation.spec.input.modalities
        channels = [self.modalities.index(name) if name in self.modalities else None for name in wanted]
        any_native = present_bc[:, [i for i in channels if i is not None]].any(dim=1)
        if not bool(any_native.any()):
            return None, None
        empty = torch.zeros_like(images_bczyx[:, :1])
        native = torch.cat([empty if i is None else images_bczyx[:, i : i + 1] for i in channels], dim=1)
        return native, None if bool(any_native.all()) else any_native.to(images_bczyx.dtype)

    def trained_state(self) -> dict[str, Tensor]:
        """What this task adds: adapter, head and new stems, each parameter once."""
        frozen = ("foundation.", *(f"stems.{name}." for name in self.frozen_stems))
        return {name: tensor for name, tensor in canonical_state(self).items() if not name.startswith(frozen)}

    def last_layers(self) -> list[nn.Module]:
        """The 1 x 1 x 1 convolution that gives the logits, where the head ends with one."""
        return [self.head.last_layer] if hasattr(self.head, "last_layer") else []

    def drop_last_layers(self) -> None:
        """For prediction: from now on `forward` gives what the last layer would get."""
        self.head.drop_last_layer()

    def merged(self) -> TaskModel:
        """For prediction: a frozen copy with the adapter summed into its foundation; this model can train on."""
        foundation = self.foundation if self.adapter is None else self.adapter.merged(self.foundation)
        stems, head = copy.deepcopy((dict(self.stems), self.head))
        return freeze(TaskModel(foundation, self.modalities, stems, (), None, head))


def build_stem(stem: StemPlan, foundation: Foundation) -> nn.Module:
    """The stem that `stem` describes, with fresh weights, its gate at zero."""
    return STEMS[stem.kind](foundation.spec.projection, stem.strides_zyx, stem.features)


def build_task_model(extension: ExtensionPlan, foundation: Foundation, known_stems: dict[str, nn.Module]) -> TaskModel:
    """The network that `extension` describes, with fresh weights in what the task adds.

    Args:
        known_stems: trained stems by modality; those that the plan reuses must be there.
    """
    new = {stem.modality: build_stem(stem, foundation) for stem in extension.new_stems}
    stems = {stem.modality: {**known_stems, **new}[stem.modality] for stem in extension.stems}
    skips = skip_levels(foundation.spec, {modality: stem.levels for modality, stem in stems.items()})
    adapter = None
    if extension.adapter is not None:
        adapter = ADAPTERS[extension.adapter.kind](foundation, extension.adapter.rank, extension.adapter.alpha)
    head = HEADS[extension.head.kind](skips, extension.head.output_channels, **extension.head.options)
    return TaskModel(foundation, extension.modalities, stems, tuple(new), adapter, head)
