"""Contract of every registered head: it reads whatever levels there are, and each of its parameters learns."""

import dataclasses
from importlib import import_module

import pytest
import torch

from unicon_pipeline.contract import CT_HU_RULE, FeatureLevel, FoundationSpec, InputContract
from unicon_pipeline.errors import PlanError
from unicon_pipeline.heads import HEADS, Features, PooledLinearHead, UNetHead
from unicon_pipeline.levels import DETAIL, SkipLevels, skip_levels

PYRAMIDS = {
    "full resolution": (((1, 1, 1), 4), ((2, 2, 2), 6), ((4, 4, 4), 8)),
    "anisotropic": (((1, 1, 1), 4), ((1, 2, 2), 6), ((2, 4, 4), 8)),
    "half in plane": (((1, 2, 2), 6), ((2, 4, 4), 8)),
    "coarse": (((2, 4, 4), 6), ((4, 8, 8), 8)),
    "one level": (((4, 4, 4), 8),),
    "tokens": (((8, 8, 8), 16),) * 3,
    "tokens, one layer": (((8, 8, 8), 16),),
    "tokens, no power of two": (((6, 6, 6), 16),) * 2,
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
WITH_DETAIL = [(pyramid, stems) for pyramid, stems in COMBINATIONS if PYRAMIDS[pyramid][0][0] != (1, 1, 1)]


def declared(levels):
    return tuple(FeatureLevel(stride, channels, channels) for stride, channels in levels)


def skips_of(pyramid, stems, native=("CT", "CECT")):
    levels = declared(PYRAMIDS[pyramid])
    contract = InputContract(native, "LPS", None, None, levels[-1].stride_zyx, dict.fromkeys(native, CT_HU_RULE))
    kind = "tokens" if pyramid.startswith("tokens") else "pyramid"
    spec = FoundationSpec("net", {}, contract, kind, levels[0], levels, levels[-1].channels, 1.0, "none")
    return skip_levels(spec, {name: declared(offered) for name, offered in stems.items()})


def maps(levels, shape, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, c, *(n // s for n, s in zip(shape, stride, strict=True))) for stride, c in levels]
    return [torch.randn(size, generator=generator) for size in sizes]


@dataclasses.dataclass(frozen=True)
class Bench:
    skips: SkipLevels
    shape: tuple[int, int, int]
    maps: Features

    @property
    def features(self):
        """The same maps in new lists: a decoder takes them out."""
        stems = {name: list(offered) for name, offered in self.maps.stems.items()}
        return dataclasses.replace(self.maps, pyramid=list(self.maps.pyramid), stems=stems)

    @property
    def decoder(self):
        return "unetr" if self.skips.kind == "tokens" else "unet"

    def head(self, kind=None, **options):
        torch.manual_seed(0)
        return HEADS[kind or self.decoder](self.skips, 3, **options)


@pytest.fixture(params=COMBINATIONS, ids=", ".join)
def bench(request):
    pyramid, stems = PYRAMIDS[request.param[0]], STEMS[request.param[1]]
    divisor = pyramid[-1][0]
    shape = (2 * divisor[0], divisor[1], 3 * divisor[2])
    seeds = {name: seed for seed, name in enumerate(stems, start=2)}
    stem_maps = {name: maps(offered, shape, 2, seeds[name]) for name, offered in stems.items()}
    (native,) = maps([((1, 1, 1), 2)], shape, 2, 9)
    return Bench(skips_of(request.param[0], stems), shape, Features(maps(pyramid, shape, 2, 1), stem_maps, native))


@pytest.fixture(params=("decoder", "pooled_linear"))
def kind(request, bench):
    return bench.decoder if request.param == "decoder" else request.param


with_detail = pytest.mark.parametrize("bench", WITH_DETAIL, ids=", ".join, indirect=True)


def as_list(output):
    return output if isinstance(output, list) else [output]


def extent(size, stride):
    return tuple(n // s for n, s in zip(size, stride, strict=True))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(as_list(one), as_list(other), strict=True))


def test_levels_hold_everything_on_offer_from_full_resolution_on(bench):
    levels = bench.skips.levels
    assert levels[0].stride_zyx == (1, 1, 1)
    if bench.skips.kind == "pyramid":
        backbone = [(level.stride_zyx, level.backbone_channels) for level in levels if level.backbone_channels]
        assert [channels for _, channels in backbone] == [level.shape[1] for level in bench.features.pyramid]
        assert [extent(bench.shape, stride) for stride, _ in backbone] == [m.shape[2:] for m in bench.features.pyramid]
    for name, offered in bench.features.stems.items():
        found = [(level.stride_zyx, dict(level.side_channels)[name]) for level in levels
                 if name in dict(level.side_channels)]  # fmt: skip
        assert [(extent(bench.shape, stride), channels) for stride, channels in found] == [
            (m.shape[2:], m.shape[1]) for m in offered
        ]


def test_every_parameter_of_every_head_gets_a_gradient(bench, kind):
    head = bench.head(kind)
    options = {} if kind == "pooled_linear" else {"every_level": True}
    outputs = as_list(head(bench.features, **options))
    assert all(output.shape[:2] == (2, 3) and output.isfinite().all() for output in outputs)
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_an_absent_stem_counts_as_zeros(bench, kind):
    head = bench.head(kind)
    zeros = {name: [torch.zeros_like(m) for m in offered] for name, offered in bench.features.stems.items()}
    absent = head(dataclasses.replace(bench.features, stems={}))
    assert same(absent, head(dataclasses.replace(bench.features, stems=zeros)))


def test_a_decoder_reads_each_map_that_is_on_offer(bench):
    head = bench.head()
    (plain,) = head(bench.features)
    hidden = [bench.features.pyramid[i] for i in getattr(head, "sources", range(len(bench.features.pyramid)))]
    native = [bench.features.native] if bench.skips.detail else []
    for tensor in (*hidden, *native, *(m for offered in bench.features.stems.values() for m in offered)):
        kept = tensor.clone()
        tensor[0] += torch.randn_like(tensor[0])
        (changed,) = head(bench.features)
        tensor.copy_(kept)
        assert not torch.equal(plain[0], changed[0])
        torch.testing.assert_close(plain[1], changed[1])  # the other case of the batch is not concerned


@pytest.mark.parametrize("supervised", [1, 2, 3])
def test_logits_for_deep_supervision(bench, supervised):
    head = bench.head(supervised_levels=supervised)
    outputs = head(bench.features, every_level=True)
    assert head.supervised_strides == tuple(level.stride_zyx for level in bench.skips.levels[:-1][:supervised])
    assert [output.shape for output in outputs] == [
        (2, 3, *extent(bench.shape, stride)) for stride in head.supervised_strides
    ]
    (finest,) = head(bench.features)
    assert finest.shape == (2, 3, *bench.shape) and torch.equal(finest, outputs[0])


class TestDetailPath:
    def test_it_is_there_only_where_the_foundation_begins_coarser_than_the_image(self, bench):
        parts = {name.split(".")[0] for name in bench.head().state_dict()}
        coarse = bench.skips.levels[0].backbone_channels == 0
        assert ("detail" in parts) == coarse
        assert parts - {"detail", "neck"} == {"up", "blocks", "logits"}
        if not coarse:
            assert same(bench.head()(bench.features), bench.head()(dataclasses.replace(bench.features, native=None)))

    @with_detail
    def test_its_maps_are_at_every_level_that_is_finer(self, bench):
        head = bench.head()
        offered = {level.stride_zyx: dict(level.side_channels).get(DETAIL, 0) for level in bench.skips.levels}
        finer = [stride for stride in offered if stride < bench.skips.levels[len(bench.skips.detail)].stride_zyx]
        assert [stride for stride, channels in offered.items() if channels] == finer
        assert [m.shape for m in head.detail(bench.features.native)] == [
            (2, offered[stride], *extent(bench.shape, stride)) for stride in finer
        ]

    @with_detail
    def test_a_case_without_native_modality_gets_zeros(self, bench):
        head = bench.head()
        (absent,) = head(dataclasses.replace(bench.features, native=None))
        present = torch.tensor([1.0, 0.0])
        (mixed,) = head(dataclasses.replace(bench.features, native_present=present))
        (full,) = head(bench.features)
        torch.testing.assert_close(mixed[0], full[0])
        torch.testing.assert_close(mixed[1], absent[1])
        head.detail.register_forward_hook(lambda *_: pytest.fail("the detail path of an absent modality ran"))
        assert same(head(dataclasses.replace(bench.features, native=None)), [absent])


def test_stems_are_told_apart_by_name_not_by_order():
    stems = STEMS["PET and MR"]
    skips = skips_of("full resolution", stems)
    assert skips == skips_of("full resolution", dict(reversed(stems.items())))
    assert skips.levels[0].side_channels == (("MR", 2), ("PET", 3)) and skips.levels[0].channels == 9
    head = UNetHead(skips, 2)

    def output(names):
        pyramid = maps(PYRAMIDS["full resolution"], (8, 8, 8), 1, 1)
        return head(Features(pyramid, {name: maps(stems[name], (8, 8, 8), 1, 2) for name in names}))

    assert same(output(stems), output(reversed(stems)))


@pytest.mark.parametrize("pyramid", ["full resolution", "tokens"])
def test_a_pooled_head_is_the_mean_of_the_coarsest_map_of_the_foundation(pyramid):
    stems = {"PET": (((1, 1, 1), 3), ((8, 8, 8), 5))}
    head = PooledLinearHead(skips_of(pyramid, stems), 2)
    features = maps(PYRAMIDS[pyramid], (8, 8, 16), 2, 1)
    expected = features[-1].flatten(2).mean(2) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(Features(features, {})), expected)


@pytest.mark.parametrize("levels, supervised", [(1, 1), (3, 0)])
def test_a_decoder_that_cannot_be_is_refused(levels, supervised):
    skips = skips_of("full resolution", {})
    skips = dataclasses.replace(skips, levels=skips.levels[:levels])
    with pytest.raises(PlanError, match="features at two strides or more, and logits at one level or more"):
        UNetHead(skips, 2, supervised)


@pytest.mark.parametrize("kind, pyramid, fitting", [("unet", "tokens", "unetr"), ("unetr", "coarse", "unet")])
def test_a_decoder_for_another_kind_of_foundation_is_refused(kind, pyramid, fitting):
    with pytest.raises(PlanError, match=f"is {fitting}, and no other"):
        HEADS[kind](skips_of(pyramid, {}), 2)


def test_every_head_is_under_contract():
    import_module("unicon_pipeline.case_head")  # test_case_head.py has those of whole cases
    assert set(HEADS) == {"unet", "unetr", "pooled_linear", "fusion", "fusion_ensemble"}
