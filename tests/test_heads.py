"""Contract of every registered head: it reads whatever levels there are, and each of its parameters learns."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from unicon_pipeline.contract import FeatureLevel
from unicon_pipeline.errors import PlanError
from unicon_pipeline.heads import HEADS, Features, PooledLinearHead, SkipLevel, UNetHead, skip_levels

PYRAMIDS = {
    "full resolution": (((1, 1, 1), 4), ((2, 2, 2), 6), ((4, 4, 4), 8)),
    "anisotropic": (((1, 1, 1), 4), ((1, 2, 2), 6), ((2, 4, 4), 8)),
    "half in plane": (((1, 2, 2), 6), ((2, 4, 4), 8)),
    "coarse": (((2, 4, 4), 6), ((4, 8, 8), 8)),
    "tokens": (((8, 8, 8), 16),),
    "tokens, no power of two": (((6, 6, 6), 16),),
}
STEMS = {
    "no stem": {},
    "PET": {"PET": (((1, 1, 1), 3), ((2, 2, 2), 5))},
    "PET and MR": {"PET": (((1, 1, 1), 3), ((2, 2, 2), 5)), "MR": (((1, 1, 1), 2),)},
}
COMBINATIONS = [
    (pyramid, stems)
    for pyramid in PYRAMIDS
    for stems in STEMS
    if stems == "no stem" or pyramid in ("full resolution", "tokens")
]


def declared(levels):
    return tuple(FeatureLevel(stride, channels, channels) for stride, channels in levels)


def maps(levels, shape, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, c, *(n // s for n, s in zip(shape, stride, strict=True))) for stride, c in levels]
    return [torch.randn(size, generator=generator) for size in sizes]


@dataclasses.dataclass(frozen=True)
class Bench:
    levels: tuple[SkipLevel, ...]
    shape: tuple[int, int, int]
    features: Features

    def head(self, kind, **options):
        torch.manual_seed(0)
        return HEADS[kind](self.levels, 3, **options)


@pytest.fixture(params=COMBINATIONS, ids=", ".join)
def bench(request):
    pyramid, stems = PYRAMIDS[request.param[0]], STEMS[request.param[1]]
    divisor = pyramid[-1][0]
    shape = (2 * divisor[0], divisor[1], 3 * divisor[2])
    levels = skip_levels(SimpleNamespace(pyramid=declared(pyramid)), {name: declared(s) for name, s in stems.items()})
    seeds = {name: seed for seed, name in enumerate(stems, start=2)}
    stem_maps = {name: maps(offered, shape, 2, seeds[name]) for name, offered in stems.items()}
    return Bench(levels, shape, Features(maps(pyramid, shape, 2, 1), stem_maps))


def as_list(output):
    return output if isinstance(output, list) else [output]


def extent(size, stride):
    return tuple(n // s for n, s in zip(size, stride, strict=True))


def test_levels_hold_everything_on_offer_from_full_resolution_on(bench):
    assert bench.levels[0].stride_zyx == (1, 1, 1)
    backbone = [(level.stride_zyx, level.backbone_channels) for level in bench.levels if level.backbone_channels]
    assert [channels for _, channels in backbone] == [level.shape[1] for level in bench.features.pyramid]
    assert [extent(bench.shape, stride) for stride, _ in backbone] == [m.shape[2:] for m in bench.features.pyramid]
    for name, offered in bench.features.stems.items():
        found = [(level.stride_zyx, dict(level.stem_channels)[name]) for level in bench.levels
                 if name in dict(level.stem_channels)]  # fmt: skip
        assert [(extent(bench.shape, stride), channels) for stride, channels in found] == [
            (m.shape[2:], m.shape[1]) for m in offered
        ]


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_every_parameter_of_every_head_gets_a_gradient(bench, kind):
    head = bench.head(kind)
    options = {"every_level": True} if kind == "unet" else {}
    outputs = as_list(head(bench.features, **options))
    assert all(output.shape[:2] == (2, 3) and output.isfinite().all() for output in outputs)
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_an_absent_stem_counts_as_zeros(bench, kind):
    head = bench.head(kind)
    zeros = {name: [torch.zeros_like(m) for m in offered] for name, offered in bench.features.stems.items()}
    absent = as_list(head(Features(bench.features.pyramid, {})))
    for a, b in zip(absent, as_list(head(Features(bench.features.pyramid, zeros))), strict=True):
        assert torch.equal(a, b)


def test_a_decoder_reads_each_map_that_is_on_offer(bench):
    head = bench.head("unet")
    (plain,) = head(bench.features)
    for tensor in (*bench.features.pyramid, *(m for offered in bench.features.stems.values() for m in offered)):
        kept = tensor.clone()
        tensor[0] += torch.randn_like(tensor[0])
        (changed,) = head(bench.features)
        tensor.copy_(kept)
        assert not torch.equal(plain[0], changed[0])
        torch.testing.assert_close(plain[1], changed[1])  # the other case of the batch is not concerned


@pytest.mark.parametrize("supervised", [1, 2, 3])
def test_logits_for_deep_supervision(bench, supervised):
    head = bench.head("unet", supervised_levels=supervised)
    outputs = head(bench.features, every_level=True)
    assert head.supervised_strides == tuple(level.stride_zyx for level in bench.levels[:-1][:supervised])
    assert [output.shape for output in outputs] == [
        (2, 3, *extent(bench.shape, stride)) for stride in head.supervised_strides
    ]
    (finest,) = head(bench.features)
    assert finest.shape == (2, 3, *bench.shape) and torch.equal(finest, outputs[0])


def test_stems_are_told_apart_by_name_not_by_order():
    stems = {"PET": declared(STEMS["PET and MR"]["PET"]), "MR": declared(STEMS["PET and MR"]["MR"])}
    spec = SimpleNamespace(pyramid=declared(PYRAMIDS["full resolution"]))
    levels = skip_levels(spec, stems)
    assert levels == skip_levels(spec, dict(reversed(stems.items())))
    assert levels[0].stem_channels == (("MR", 2), ("PET", 3)) and levels[0].channels == 9
    head = UNetHead(levels, 2)
    pyramid = maps(PYRAMIDS["full resolution"], (8, 8, 8), 1, 1)
    offered = {name: maps(STEMS["PET and MR"][name], (8, 8, 8), 1, 2) for name in stems}
    (one,), (other,) = head(Features(pyramid, offered)), head(Features(pyramid, dict(reversed(offered.items()))))
    assert torch.equal(one, other)


def test_a_pooled_head_is_the_mean_of_the_coarsest_map_of_the_foundation():
    spec = SimpleNamespace(pyramid=declared(PYRAMIDS["full resolution"]))
    head = PooledLinearHead(skip_levels(spec, {"PET": declared([((1, 1, 1), 3), ((8, 8, 8), 5)])}), 2)
    pyramid = maps(PYRAMIDS["full resolution"], (8, 8, 16), 2, 1)
    expected = pyramid[-1].flatten(2).mean(2) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(Features(pyramid, {})), expected)


@pytest.mark.parametrize("strides, supervised", [(((1, 1, 1),), 1), (((1, 1, 1), (2, 2, 2)), 0)])
def test_a_decoder_that_cannot_be_is_refused(strides, supervised):
    with pytest.raises(PlanError, match="features at two strides or more, and logits at one level or more"):
        UNetHead(tuple(SkipLevel(stride, 4) for stride in strides), 2, supervised)


def test_every_head_is_under_contract():
    assert set(HEADS) == {"unet", "pooled_linear"}
