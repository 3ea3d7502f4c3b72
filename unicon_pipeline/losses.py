"""Training losses: Dice with cross-entropy for segmentation, masked cross-entropy for findings.

What was not annotated (the ignore label, a blank finding) adds nothing to the loss and gets a zero gradient; where
nothing at all is annotated the loss is zero, not NaN. All arithmetic is in float32, under autocast too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from unicon_pipeline.contract import ZYX
from unicon_pipeline.dataset import Labels
from unicon_pipeline.errors import UniconError

DICE_SMOOTH = 1e-5


class SegmentationLoss(nn.Module):
    """Soft Dice plus cross-entropy of label maps, at one or several resolutions.

    Exclusive labels: softmax over background and outputs; Dice leaves the background out. Regions: one sigmoid per
    output. Dice is taken over the whole batch (nnU-Net's batch Dice), its term is 1 - Dice, so the loss is never
    negative. Label values that belong to no output, padding included, count as background.

    Args:
        labels: which label values belong to which output channel, and which value is ignored.
        deep_supervision_strides: input voxels per voxel of each expected output (z, y, x), finest first. The weights
            are 1, 1/2, 1/4, ... divided by their sum; each target keeps the voxel nearest to the output's centre.
    """

    def __init__(self, labels: Labels, deep_supervision_strides: Sequence[ZYX] = ((1, 1, 1),)) -> None:
        super().__init__()
        if not deep_supervision_strides:
            raise UniconError("SegmentationLoss: no output stride is given; expected at least ((1, 1, 1),).")
        self.regions = labels.regions
        self.strides = tuple(tuple(stride) for stride in deep_supervision_strides)
        raw_weights = [0.5**level for level in range(len(self.strides))]
        self.weights = tuple(weight / sum(raw_weights) for weight in raw_weights)
        self.register_buffer("membership", _membership_table(labels), persistent=False)
        self.register_buffer("annotated", _annotated_table(labels), persistent=False)

    def forward(self, logits: Tensor | Sequence[Tensor], labels_bzyx: Tensor) -> Tensor:
        """The loss as a float32 scalar.

        Args:
            logits: (B, C, Z, Y, X) for each stride, finest first, C as `Labels.output_channels`. A bare tensor is the
                finest output alone (validation).
            labels_bzyx: label map values as in the label files, any integer type, (B, 1, Z, Y, X) or (B, Z, Y, X).

        Raises:
            UniconError: the outputs do not match the strides, the label map or the number of classes.
        """
        if isinstance(logits, Tensor):
            outputs, strides, weights = [logits], self.strides[:1], (1.0,)
        else:
            outputs, strides, weights = list(logits), self.strides, self.weights
        if len(outputs) != len(strides):
            raise UniconError(f"SegmentationLoss: {len(outputs)} outputs for {len(strides)} declared strides.")
        if labels_bzyx.ndim == 5:
            labels_bzyx = labels_bzyx[:, 0]
        total = None
        for output, stride, weight in zip(outputs, strides, weights, strict=True):
            target = downsample_nearest(labels_bzyx, stride)
            self._check_shapes(output, target, stride)
            with torch.autocast(device_type=output.device.type, enabled=False):
                term = weight * self._one_resolution(output.float(), target)
            total = term if total is None else total + term
        return total

    def _one_resolution(self, logits: Tensor, labels_bzyx: Tensor) -> Tensor:
        """`logits` (B, C, Z, Y, X) float32, `labels_bzyx` at the same resolution."""
        # the last row of both tables stands for every value that no output knows
        index = labels_bzyx.long().clamp(0, len(self.annotated) - 1)  # (B, Z, Y, X)
        member = self.membership[index].movedim(-1, 1)  # (B, C, Z, Y, X) float32, 0 or 1
        mask = self.annotated[index].unsqueeze(1)  # (B, 1, Z, Y, X) float32, 0 or 1
        if self.regions:
            probabilities = torch.sigmoid(logits)
            entropy = functional.binary_cross_entropy_with_logits(logits, member, reduction="none")
            entropy = entropy.mean(dim=1, keepdim=True)  # (B, 1, Z, Y, X)
        else:
            log_probabilities = functional.log_softmax(logits, dim=1)
            entropy = -(log_probabilities * member).sum(dim=1, keepdim=True)  # (B, 1, Z, Y, X)
            probabilities, member = log_probabilities.exp()[:, 1:], member[:, 1:]
        entropy = (entropy * mask).sum() / mask.sum().clamp(min=1.0)
        return entropy + 1.0 - _batch_dice(probabilities, member, mask)

    @torch.no_grad()
    def overlap(self, logits: Tensor, labels_bzyx: Tensor) -> Tensor:
        """Counts for the Dice of hard decisions: (2, outputs) = twice the overlap, and the sum of both sizes.

        Counts of several batches add up; their ratio is the Dice over all of them. Ignored voxels count for neither.
        """
        index = labels_bzyx.reshape(logits.shape[0], *logits.shape[2:]).long().clamp(0, len(self.annotated) - 1)
        wanted = self.membership[index].movedim(-1, 1) > 0
        if self.regions:
            decided = logits > 0
        else:
            # Not argmax: over channels it takes a sixth of a training step on a CPU. Ties count for background.
            largest = logits.amax(dim=1, keepdim=True)
            wanted, decided = wanted[:, 1:], (logits[:, 1:] == largest) & (logits[:, :1] < largest)
        annotated = self.annotated[index].unsqueeze(1) > 0
        wanted, decided = wanted & annotated, decided & annotated
        axes = (0, 2, 3, 4)
        return torch.stack((2 * (wanted & decided).sum(axes), wanted.sum(axes) + decided.sum(axes)))

    def _check_shapes(self, logits: Tensor, target: Tensor, stride: ZYX) -> None:
        channels = self.membership.shape[1]
        expected = (target.shape[0], channels, *target.shape[1:])
        if tuple(logits.shape) != expected:
            raise UniconError(
                f"SegmentationLoss: the output at stride {stride} has shape {tuple(logits.shape)}, "
                f"expected {expected}: {channels} channels, and a label map whose shape is a multiple of the stride."
            )


class MultiLabelLoss(nn.Module):
    """Binary cross-entropy over several findings, mean over the annotated ones.

    Args:
        pos_weight: (T,) weight of the positive answers of each finding; None: all 1.
    """

    def __init__(self, pos_weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("pos_weight", None if pos_weight is None else pos_weight.float(), persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss as a float32 scalar; 0 where nothing is annotated.

        Args:
            logits: (B, T).
            targets: (B, T) with 0, 1, or NaN for a finding that was not annotated.

        Raises:
            UniconError: the shapes differ.
        """
        if logits.shape != targets.shape:
            raise UniconError(f"MultiLabelLoss: logits {tuple(logits.shape)}, targets {tuple(targets.shape)}.")
        with torch.autocast(device_type=logits.device.type, enabled=False):
            annotated = ~torch.isnan(targets)
            # masked before the entropy: NaN times zero would still be NaN, in the gradient too
            known_logits = torch.where(annotated, logits.float(), 0.0)
            known_targets = torch.where(annotated, targets.float(), 0.0)
            entropy = functional.binary_cross_entropy_with_logits(
                known_logits, known_targets, pos_weight=self.pos_weight, reduction="none"
            )
            return (entropy * annotated).sum() / annotated.sum().clamp(min=1)


def dice_of_counts(counts: Tensor) -> float:
    """Mean Dice of the counts of `SegmentationLoss.overlap`, over the outputs that occur at all; NaN if none does."""
    overlap, sizes = counts.double()
    return float((overlap / sizes)[sizes > 0].mean())


def downsample_nearest(labels_bzyx: Tensor, stride_zyx: ZYX) -> Tensor:
    """Every stride-th voxel of (B, Z, Y, X), the one at the centre of its block (torch's "nearest-exact")."""
    z, y, x = (slice(stride // 2, None, stride) for stride in stride_zyx)
    return labels_bzyx[:, z, y, x]


def _batch_dice(probabilities: Tensor, member: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice, mean over classes; sums run over the batch and the voxels where `mask` is 1."""
    axes = (0, 2, 3, 4)
    probabilities = probabilities * mask
    overlap = (probabilities * member).sum(axes)  # (C,)
    total = probabilities.sum(axes) + (member * mask).sum(axes)
    return ((2.0 * overlap + DICE_SMOOTH) / (total + DICE_SMOOTH)).mean()


def _table_length(labels: Labels) -> int:
    known = [value for members in labels.values for value in members]
    return max([0, *known, -1 if labels.ignore is None else labels.ignore]) + 2


def _membership_table(labels: Labels) -> Tensor:
    """(values + 1, C): row v is the target of a voxel with label value v."""
    first = 0 if labels.regions else 1
    table = torch.zeros(_table_length(labels), first + len(labels.values))
    for channel, members in enumerate(labels.values, start=first):
        table[list(members), channel] = 1.0
    if not labels.regions:
        table[:, 0] = 1.0 - table[:, 1:].amax(dim=1)
    return table


def _annotated_table(labels: Labels) -> Tensor:
    """(values + 1,): 0 for the ignore value, else 1."""
    table = torch.ones(_table_length(labels))
    if labels.ignore is not None:
        table[labels.ignore] = 0.0
    return table
