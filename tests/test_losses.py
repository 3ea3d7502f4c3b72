"""Losses against formulas written down separately in numpy, and against torch's own functions."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from unicon_pipeline.dataset import Labels
from unicon_pipeline.errors import UniconError
from unicon_pipeline.losses import MultiLabelLoss, SegmentationLoss, downsample_nearest

EXCLUSIVE = Labels(names=("liver", "tumour"), values=((1,), (5,)), regions=False, written=(1, 5), ignore=7)
REGIONS = Labels(names=("whole", "core"), values=((1, 2), (2,)), regions=True, written=(1, 2), ignore=3)


def make_batch(labels, values, shape=(2, 4, 6, 8), seed=0):
    """Logits (B, C, Z, Y, X) that need a gradient, and label values (B, 1, Z, Y, X)."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(shape[0], labels.output_channels, *shape[1:])).astype(np.float32) * 2
    maps = generator.choice(values, size=(shape[0], 1, *shape[1:])).astype(np.int16)
    return torch.from_numpy(logits).requires_grad_(), torch.from_numpy(maps)


def reference_exclusive(logits, maps, values, ignore):
    """Soft Dice over the batch without background, and cross-entropy; float64, voxel lists instead of masks."""
    logits = np.moveaxis(logits.astype(np.float64), 1, -1).reshape(-1, logits.shape[1])
    flat = maps.reshape(-1)
    logits, flat = logits[flat != ignore], flat[flat != ignore]
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    classes = np.zeros(len(flat), int)
    for channel, value in enumerate(values, start=1):
        classes[flat == value] = channel
    entropy = -np.log(probabilities[np.arange(len(flat)), classes]).mean()
    dice = []
    for channel in range(1, logits.shape[1]):
        truth = classes == channel
        numerator = 2 * probabilities[truth, channel].sum() + 1e-5
        dice.append(numerator / (truth.sum() + probabilities[:, channel].sum() + 1e-5))
    return entropy - np.mean(dice) + 1


def reference_regions(logits, maps, values, ignore):
    """The same with one sigmoid per region."""
    logits = np.moveaxis(logits.astype(np.float64), 1, -1).reshape(-1, logits.shape[1])
    flat = maps.reshape(-1)
    logits, flat = logits[flat != ignore], flat[flat != ignore]
    probabilities = 1 / (1 + np.exp(-logits))
    entropies, dice = [], []
    for channel, members in enumerate(values):
        truth, guess = np.isin(flat, members), probabilities[:, channel]
        entropies.append(-np.where(truth, np.log(guess), np.log(1 - guess)).mean())
        dice.append((2 * guess[truth].sum() + 1e-5) / (truth.sum() + guess.sum() + 1e-5))
    return np.mean(entropies) - np.mean(dice) + 1


@pytest.mark.parametrize("values", [(0, 1, 5), (0, 1, 5, 7), (0, 1)], ids=["full", "ignore", "class absent"])
def test_exclusive_labels_match_the_formulas(values):
    logits, maps = make_batch(EXCLUSIVE, values)
    loss = SegmentationLoss(EXCLUSIVE)(logits, maps)
    expected = reference_exclusive(logits.detach().numpy(), maps.numpy(), (1, 5), 7)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 1, 2, 3)], ids=["full", "ignore"])
def test_regions_match_the_formulas(values):
    logits, maps = make_batch(REGIONS, values)
    loss = SegmentationLoss(REGIONS)(logits, maps)
    expected = reference_regions(logits.detach().numpy(), maps.numpy(), ((1, 2), (2,)), 3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_part_is_torchs():
    """With one class that never occurs and is never predicted, Dice's part is constant: only the entropy is left."""
    labels = Labels(names=("a",), values=((1,),), regions=False, written=(1,), ignore=2)
    logits = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    maps = torch.randint(0, 3, (2, 3, 4, 5), generator=torch.Generator().manual_seed(2))
    annotated = maps != 2
    entropy = functional.cross_entropy(logits, maps.clamp(max=1).masked_fill(~annotated, -100), ignore_index=-100)
    guess = logits.softmax(1)[:, 1][annotated]
    truth = (maps == 1)[annotated]
    dice = (2 * guess[truth].sum() + 1e-5) / (truth.sum() + guess.sum() + 1e-5)
    assert SegmentationLoss(labels)(logits, maps).item() == pytest.approx((entropy + 1 - dice).item(), rel=1e-5)


def test_dice_is_taken_over_the_batch():
    """A case without the class must not count as a Dice of its own."""
    labels = Labels(names=("a",), values=((1,),), regions=False, written=(1,), ignore=None)
    maps = torch.zeros(2, 1, 4, 4, 4, dtype=torch.int16)
    maps[0, :, :2] = 1
    logits = torch.stack([-20.0 * (maps[:, 0] * 2 - 1), 20.0 * (maps[:, 0] * 2 - 1)], dim=1).float()
    assert SegmentationLoss(labels)(logits, maps).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("labels", [EXCLUSIVE, REGIONS], ids=["exclusive", "regions"])
def test_ignored_voxels_get_no_gradient_and_do_not_matter(labels):
    values = (0, 1, 5, 7) if labels is EXCLUSIVE else (0, 1, 2, 3)
    logits, maps = make_batch(labels, values)
    ignored = (maps == labels.ignore).expand_as(logits)
    loss = SegmentationLoss(labels)(logits, maps)
    loss.backward()
    assert torch.all(logits.grad[ignored] == 0)
    assert torch.all(logits.grad[~ignored] != 0)
    moved = logits.detach().clone()
    moved[ignored] += 3.0
    assert SegmentationLoss(labels)(moved, maps).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("labels", [EXCLUSIVE, REGIONS], ids=["exclusive", "regions"])
def test_everything_ignored_is_finite(labels):
    logits, maps = make_batch(labels, (labels.ignore,))
    loss = SegmentationLoss(labels)(logits, maps)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.all(logits.grad == 0)


def test_gradient_matches_finite_differences():
    logits, maps = make_batch(REGIONS, (0, 1, 2, 3), shape=(1, 2, 2, 3))
    criterion = SegmentationLoss(REGIONS)
    criterion(logits, maps).backward()
    arrays = logits.detach().numpy().astype(np.float64)
    for index in [(0, 0, 0, 0, 0), (0, 1, 1, 1, 2), (0, 0, 1, 0, 1)]:
        up, down = arrays.copy(), arrays.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        difference = reference_regions(up, maps.numpy(), ((1, 2), (2,)), 3) - reference_regions(
            down, maps.numpy(), ((1, 2), (2,)), 3
        )
        assert logits.grad[index].item() == pytest.approx(difference / 2e-5, abs=1e-5)


def test_padding_and_unknown_values_are_background():
    logits, maps = make_batch(EXCLUSIVE, (0, 1, 5))
    odd = maps.clone()
    odd[maps == 0] = -1
    odd[0, 0, 0][maps[0, 0, 0] == 0] = 900
    odd[1, 0, 0][maps[1, 0, 0] == 0] = 3  # between the known values
    assert not torch.equal(odd, maps)
    criterion = SegmentationLoss(EXCLUSIVE)
    assert criterion(logits, odd).item() == criterion(logits, maps).item()


def test_deep_supervision_is_the_weighted_sum_of_its_levels():
    strides = ((1, 1, 1), (1, 2, 2), (2, 4, 4))
    _, maps = make_batch(EXCLUSIVE, (0, 1, 5, 7), shape=(2, 4, 8, 8))
    outputs, expected = [], 0.0
    for level, stride in enumerate(strides):
        shape = [2] + [n // s for n, s in zip((4, 8, 8), stride, strict=True)]
        logits, _ = make_batch(EXCLUSIVE, (0,), shape=tuple(shape), seed=level)
        outputs.append(logits)
        small = functional.interpolate(maps.double(), size=shape[1:], mode="nearest-exact").numpy()
        expected += reference_exclusive(logits.detach().numpy(), small, (1, 5), 7) * (4, 2, 1)[level] / 7
    loss = SegmentationLoss(EXCLUSIVE, strides)(outputs, maps)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(output.grad.abs().sum() > 0 for output in outputs)
    finest_alone = SegmentationLoss(EXCLUSIVE, strides)(outputs[0], maps).item()
    assert finest_alone == SegmentationLoss(EXCLUSIVE)(outputs[0], maps).item()


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 4), (4, 8, 8)])
def test_downsampling_is_torchs_nearest_exact(stride):
    maps = torch.arange(2 * 8 * 16 * 16).reshape(2, 8, 16, 16)
    size = [n // s for n, s in zip((8, 16, 16), stride, strict=True)]
    expected = functional.interpolate(maps[:, None].double(), size=size, mode="nearest-exact")[:, 0].long()
    assert torch.equal(downsample_nearest(maps, stride), expected)


@pytest.mark.parametrize("labels", [EXCLUSIVE, REGIONS], ids=["exclusive", "regions"])
def test_autocast_does_not_lower_the_precision(labels):
    logits, maps = make_batch(labels, (0, 1, 2))
    half = logits.detach().bfloat16().requires_grad_()
    plain = SegmentationLoss(labels)(half.detach().float(), maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SegmentationLoss(labels)(half, maps)
        finding = MultiLabelLoss()(half[:, :, 0, 0, 0], torch.ones(half.shape[:2]))
    loss.backward()
    assert loss.dtype == torch.float32 and finding.dtype == torch.float32
    assert loss.item() == plain.item()
    assert torch.isfinite(half.grad).all()


def test_wrong_shapes_are_named():
    logits, maps = make_batch(EXCLUSIVE, (0, 1, 5))
    with pytest.raises(UniconError, match="2 outputs for 1"):
        SegmentationLoss(EXCLUSIVE)([logits, logits], maps)
    with pytest.raises(UniconError, match="3 channels"):
        SegmentationLoss(EXCLUSIVE)(logits[:, :2], maps)
    with pytest.raises(UniconError, match="multiple of the stride"):
        SegmentationLoss(EXCLUSIVE, ((1, 1, 1), (4, 4, 4)))([logits, logits[..., :1, :1, :1]], maps)
    with pytest.raises(UniconError, match="no output stride"):
        SegmentationLoss(EXCLUSIVE, ())
    with pytest.raises(UniconError, match="targets"):
        MultiLabelLoss()(torch.zeros(2, 3), torch.zeros(2, 2))


def test_findings_match_torch_where_annotated():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, generator=generator).requires_grad_()
    targets = torch.randint(0, 2, (6, 4), generator=generator).float()
    blank = torch.rand(6, 4, generator=generator) < 0.4
    pos_weight = torch.tensor([1.0, 2.0, 0.5, 7.0])
    weights = pos_weight.expand(6, 4)[~blank]
    expected = functional.binary_cross_entropy_with_logits(logits[~blank], targets[~blank], pos_weight=weights)
    loss = MultiLabelLoss(pos_weight)(logits, targets.masked_fill(blank, torch.nan))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.all(logits.grad[blank] == 0) and torch.all(logits.grad[~blank] != 0)


def test_no_finding_annotated_is_finite():
    logits = torch.randn(3, 2).requires_grad_()
    loss = MultiLabelLoss()(logits, torch.full((3, 2), torch.nan))
    loss.backward()
    assert loss.item() == 0.0 and torch.all(logits.grad == 0)
