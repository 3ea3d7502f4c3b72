"""CT-CLIP's image encoder against a second reading of it: plain NumPy, token by token, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from unicon_pipeline.checkpoint import read_checkpoint
from unicon_pipeline.contract import FoundationSpec, InputContract, IntensityRule
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.ctvit import convert, recognises
from unicon_pipeline.foundation import declare, freeze
from unicon_pipeline.geometry import Grid, Volume, orient
from unicon_pipeline.imported import ImportOptions
from unicon_pipeline.intensity import normalise
from unicon_pipeline.weights import canonical_state, load_exactly

DIM, HEADS, DIM_HEAD, FEED_FORWARD, DEPTH, PATCH_ZYX = 12, 3, 4, 32, 2, (2, 4, 4)
GRID, LATENT, CODES = 3, 6, 20
STACKS = ("enc_spatial_transformer", "enc_temporal_transformer")
ARCH_KWARGS = {
    "dim": DIM,
    "spatial_depth": DEPTH,
    "temporal_depth": DEPTH,
    "heads": HEADS,
    "dim_head": DIM_HEAD,
    "feed_forward": FEED_FORWARD,
    "patch_zyx": list(PATCH_ZYX),
    "hidden_layers": [1, 2, 3, 4],
}


def tiny_spec(**changed) -> FoundationSpec:
    contract = InputContract(
        modalities=("CT",),
        orientation="PLS",
        spacing_zyx_mm=(1.5, 0.75, 0.75),
        fixed_shape_zyx=None,
        divisible_by_zyx=PATCH_ZYX,
        intensity={"CT": IntensityRule("piecewise", "HU", (-1000.0, 1000.0), (-1.0, 1.0))},
    )
    return declare("ctvit", ARCH_KWARGS | changed, contract, "tokens", "CC-BY-NC-SA-4.0", {})


def shapes_of_ctclip(dim, heads, dim_head, feed_forward, depth, patch_zyx, grid, latent, codes):
    """Names and shapes in a state dict of CT-CLIP, without its text encoder."""
    patch, slice_patch, inner = math.prod(patch_zyx), patch_zyx[1] * patch_zyx[2], heads * dim_head
    shapes = {"net.0.0.weight": (dim, 2), "net.1.0.weight": (dim, dim), "net.2.weight": (heads, dim)}
    shapes |= {"net.0.0.bias": (dim,), "net.1.0.bias": (dim,), "net.2.bias": (heads,)}
    shapes = {f"spatial_rel_pos_bias.{key}": shape for key, shape in shapes.items()}
    for name, width in (("to_patch_emb", patch), ("to_patch_emb_first_frame", slice_patch)):
        shapes |= {f"{name}.1.{kind}": (width,) for kind in ("weight", "bias")}
        shapes |= {f"{name}.2.weight": (dim, width), f"{name}.2.bias": (dim,)}
        shapes |= {f"{name}.3.{kind}": (dim,) for kind in ("weight", "bias")}
    for stack in STACKS:
        for layer in (f"{stack}.layers.{number}" for number in range(depth)):
            shapes |= {f"{layer}.0.dsconv.weight": (dim, 1, 3, 3, 3), f"{layer}.0.dsconv.bias": (dim,)}
            shapes |= {f"{layer}.1.{n}.{kind}": (dim,) for n in ("norm", "context_norm") for kind in ("gamma", "beta")}
            shapes |= {f"{layer}.1.{side}_scale": (dim_head,) for side in "qk"}
            shapes |= {f"{layer}.1.to_q.weight": (inner, dim), f"{layer}.1.to_kv.weight": (2 * inner, dim)}
            shapes |= {f"{layer}.1.to_out.weight": (dim, inner), f"{layer}.1.null_kv": (heads, 0, dim_head)}
            shapes |= {f"{layer}.3.0.{kind}": (dim,) for kind in ("weight", "bias")}
            shapes |= {f"{layer}.3.1.weight": (2 * feed_forward, dim), f"{layer}.3.4.weight": (dim, feed_forward)}
        shapes |= {f"{stack}.norm_out.gamma": (dim,), f"{stack}.norm_out.beta": (dim,)}
    shapes |= {"vq._codebook.embed": (1, codes, dim), "vq._codebook.cluster_size": (1, codes)}
    for name, width in (("to_pixels", patch), ("to_pixels_first_frame", slice_patch)):
        shapes |= {f"{name}.0.weight": (width, dim), f"{name}.0.bias": (width,)}
    shapes = {f"visual_transformer.{key}": shape for key, shape in shapes.items()}
    for name in ("to_visual_latent", "to_visual_latent_extra"):
        shapes[f"{name}.weight"] = (latent, dim * grid**2)
    return shapes | {"temperature": (), "text_transformer.embeddings.position_ids": (1, 8)}


def tiny_ctclip(seed=0):
    """A state dict in which every number matters: no norm is the identity, no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of_ctclip(DIM, HEADS, DIM_HEAD, FEED_FORWARD, DEPTH, PATCH_ZYX, GRID, LATENT, CODES)
    state = {}
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 16
        scaled = key.endswith(("gamma", "_scale", "norm.weight", ".1.weight", ".3.weight")) and len(shape) == 1
        state[key] = values / max(fan_in, 1) ** 0.5 + float(scaled)
    return state


@pytest.fixture
def saved(tmp_path):
    def save(payload):
        torch.save(payload, tmp_path / "CT-CLIP_v2.pt")
        return read_checkpoint(tmp_path / "CT-CLIP_v2.pt")

    return save


def loaded(imported):
    foundation = build_foundation(imported.spec)
    load_exactly(canonical_state(foundation), imported.weights, "weights")
    return freeze(foundation)


class Naive:
    """The encoder for one volume, with the published names; arrays of tokens are (z, y, x, channels)."""

    def __init__(self, state):
        self.weights = {
            key.removeprefix("visual_transformer."): tensor.double().numpy() for key, tensor in state.items()
        }

    def hidden_layers(self, volume_zyx):
        tokens = self.embedded(volume_zyx)
        bias = self.bias(*tokens.shape[1:3])
        outputs = []
        for number in range(DEPTH):
            layer = f"{STACKS[0]}.layers.{number}"
            tokens = tokens + self.neighbourhood(tokens, f"{layer}.0.dsconv")
            tokens = np.stack([self.attend_and_feed(slab, layer, bias) for slab in tokens])
            outputs.append(tokens)
        tokens = outputs[-1] = self.norm(tokens, f"{STACKS[0]}.norm_out", "gamma", "beta")
        tokens = tokens.transpose(1, 2, 0, 3)  # y, x, z; CT-CLIP reads this as z, y, x, the same on a cube
        for number in range(DEPTH):
            layer = f"{STACKS[1]}.layers.{number}"
            tokens = tokens + self.neighbourhood(tokens, f"{layer}.0.dsconv")
            columns = [[self.attend_and_feed(column[:, None], layer) for column in row] for row in tokens]
            tokens = np.array(columns).squeeze(-2)
            outputs.append(tokens.transpose(2, 0, 1, 3))
        outputs[-1] = self.norm(outputs[-1], f"{STACKS[1]}.norm_out", "gamma", "beta")
        return outputs

    def norm(self, values, name, weight="weight", bias="bias"):
        centred = values - values.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * self.weights[f"{name}.{weight}"] + self.weights[f"{name}.{bias}"]

    def linear(self, values, name):
        return values @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def embedded(self, volume_zyx):
        grid = [size // edge for size, edge in zip(volume_zyx.shape, PATCH_ZYX)]
        tokens = np.empty((*grid, DIM))
        for index in np.ndindex(*grid):
            box = tuple(slice(i * edge, (i + 1) * edge) for i, edge in zip(index, PATCH_ZYX))
            patch = self.norm(volume_zyx[box].ravel(), "to_patch_emb.1")
            tokens[index] = self.norm(self.linear(patch, "to_patch_emb.2"), "to_patch_emb.3")
        return tokens

    def bias(self, height, width):
        """heads, query, key."""
        places = list(itertools.product(range(height), range(width)))
        bias = np.empty((HEADS, len(places), len(places)))
        for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
            offset = np.array([a[0] - b[0], a[1] - b[1]], float)
            hidden = np.sign(offset) * np.log(np.abs(offset) + 1)
            for name in ("0.0", "1.0"):
                hidden = self.linear(hidden, f"spatial_rel_pos_bias.net.{name}")
                hidden = np.where(hidden > 0, hidden, 0.1 * hidden)
            bias[:, i, j] = self.linear(hidden, "spatial_rel_pos_bias.net.2")
        return bias

    def neighbourhood(self, tokens, name):
        kernel, result = self.weights[f"{name}.weight"], np.zeros_like(tokens) + self.weights[f"{name}.bias"]
        padded = np.pad(tokens, ((2, 0), (1, 1), (1, 1), (0, 0)))
        for a, b, c in itertools.product(range(3), repeat=3):
            shifted = padded[a:, b:, c:][: tokens.shape[0], : tokens.shape[1], : tokens.shape[2]]
            result += kernel[:, 0, a, b, c] * shifted
        return result

    def attend_and_feed(self, plane, layer, bias=None):
        """Attention among all tokens of (J, K, channels), then the gated network, both residual."""
        tokens = plane.reshape(-1, plane.shape[-1])
        inner = HEADS * DIM_HEAD
        queries = self.linear(self.norm(tokens, f"{layer}.1.norm", "gamma", "beta"), f"{layer}.1.to_q")
        both = self.linear(tokens, f"{layer}.1.to_kv")
        mixed = np.empty((len(tokens), inner))
        for head in range(HEADS):
            part = slice(head * DIM_HEAD, (head + 1) * DIM_HEAD)
            q, k, v = queries[:, part], both[:, :inner][:, part], both[:, inner:][:, part]
            q = q / np.linalg.norm(q, axis=1, keepdims=True) * self.weights[f"{layer}.1.q_scale"]
            k = k / np.linalg.norm(k, axis=1, keepdims=True) * self.weights[f"{layer}.1.k_scale"]
            logits = 8.0 * q @ k.T + (0.0 if bias is None else bias[head])
            shares = np.exp(logits - logits.max(1, keepdims=True))
            mixed[:, part] = shares / shares.sum(1, keepdims=True) @ v
        tokens = tokens + self.linear(mixed, f"{layer}.1.to_out")
        wide = self.linear(self.norm(tokens, f"{layer}.3.0"), f"{layer}.3.1")
        values, gate = np.split(wide, 2, axis=-1)
        gelu = np.array([[g * 0.5 * (1 + math.erf(g / math.sqrt(2))) for g in row] for row in gate])
        return (tokens + self.linear(values * gelu, f"{layer}.3.4")).reshape(plane.shape)


def maps_as_zyxc(maps, case):
    return [level[case].permute(1, 2, 3, 0).double().numpy() for level in maps]


@pytest.mark.parametrize("grid", [(3, 3, 3), (2, 3, 4), (1, 1, 2)])
def test_every_hidden_layer_agrees_with_the_naive_reading(saved, grid):
    state = tiny_ctclip()
    foundation = loaded(convert(saved(state), ImportOptions()))
    shape = [tokens * edge for tokens, edge in zip(grid, PATCH_ZYX)]
    volumes = torch.rand((2, 1, *shape), generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        maps = foundation(volumes, None, None)
    assert [level.shape for level in maps] == [(2, DIM, *grid)] * 4
    for case, volume in enumerate(volumes[:, 0].double().numpy()):
        for ours, expected in zip(maps_as_zyxc(maps, case), Naive(state).hidden_layers(volume), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_the_projection_is_the_patch_embedding(saved):
    state = tiny_ctclip()
    foundation = loaded(convert(saved(state), ImportOptions()))
    volume = torch.rand((1, 1, 4, 8, 12), generator=torch.Generator().manual_seed(2))
    (projected,) = maps_as_zyxc([foundation.project(volume)], 0)
    np.testing.assert_allclose(projected, Naive(state).embedded(volume[0, 0].double().numpy()), rtol=0, atol=1e-5)


def test_autocast_in_bfloat16_stays_close(saved):
    foundation = loaded(convert(saved(tiny_ctclip()), ImportOptions()))
    volume = torch.rand((1, 1, 6, 12, 12), generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        exact = foundation(volume, None, None)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = foundation(volume, None, None)[-1]
    assert 0 < (rounded.float() - exact).norm() / exact.norm() < 0.05


def test_every_parameter_gets_a_gradient():
    foundation = build_foundation(tiny_spec())
    foundation(torch.rand(1, 1, 4, 8, 8), None, None)[-1].square().sum().backward()
    assert not [name for name, parameter in foundation.named_parameters() if parameter.grad is None]


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


WRAPPERS = {
    "bare": lambda state: state,
    "data parallel": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("module._orig_mod.", state),
    "compiled within": lambda state: {key.replace("former.", "former._orig_mod.", 1): t for key, t in state.items()},
    "in a training file": lambda state: {"state_dict": state, "epoch": 3},
    "under a classifier": lambda state: prefixed("trained_model.", state) | {"classifier.weight": torch.zeros(2, 3)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_gives_the_same_foundation(saved, wrapper):
    state = tiny_ctclip()
    checkpoint = saved(WRAPPERS[wrapper](state))
    assert recognises(checkpoint)
    imported = convert(checkpoint, ImportOptions())
    assert imported.spec.arch_kwargs == ARCH_KWARGS
    published = {key.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor for key, tensor in state.items()}
    assert imported.weights.keys() == canonical_state(build_foundation(imported.spec)).keys()
    for key, tensor in imported.weights.items():
        assert torch.equal(tensor, published[f"visual_transformer.{key}"])


def test_the_declaration_says_what_it_is_and_what_was_left_out(saved):
    checkpoint = saved(tiny_ctclip())
    spec = convert(checkpoint, ImportOptions()).spec
    assert (spec.architecture, spec.kind, spec.licence) == ("ctvit", "tokens", "CC-BY-NC-SA-4.0")
    assert spec.input == tiny_spec().input
    assert spec.projection.stride_zyx == PATCH_ZYX
    assert [(level.stride_zyx, level.channels) for level in spec.pyramid] == [(PATCH_ZYX, DIM)] * 4
    assert spec.provenance["sha256"] == checkpoint.sha256
    assert spec.provenance["own_task"].startswith("left out")
    assert spec.load_report["tensors"] == len(canonical_state(build_foundation(spec)))
    assert spec.load_report["left_out"] == {
        "temperature": 1,
        "text_transformer": 1,
        "to_visual_latent": 1,
        "to_visual_latent_extra": 1,
        "visual_transformer.context_norm": 8,
        "visual_transformer.null_kv": 4,
        "visual_transformer.to_patch_emb_first_frame": 6,
        "visual_transformer.to_pixels": 2,
        "visual_transformer.to_pixels_first_frame": 2,
        "visual_transformer.vq": 2,
    }


def test_options_win_over_what_is_known(saved, tmp_path):
    options = ImportOptions(orientation="RAS", licence="ours", origin="here", findings=tmp_path)
    spec = convert(saved(tiny_ctclip()), options).spec
    assert (spec.input.orientation, spec.licence, spec.provenance["source"]) == ("RAS", "ours", "here")
    assert "own_task" not in spec.provenance


def test_the_published_sizes_are_read_off_the_shapes(saved):
    shapes = shapes_of_ctclip(512, 8, 32, 1365, 4, (10, 20, 20), 24, 4, 8192)
    spec = convert(saved({key: torch.zeros(shape) for key, shape in shapes.items()}), ImportOptions()).spec
    assert spec.arch_kwargs == {
        "dim": 512,
        "spatial_depth": 4,
        "temporal_depth": 4,
        "heads": 8,
        "dim_head": 32,
        "feed_forward": 1365,
        "patch_zyx": [10, 20, 20],
        "hidden_layers": [2, 4, 6, 8],
    }
    assert spec.load_report["parameters"] == 23_426_888  # counted in the published class
    assert spec.input.divisible_by_zyx == (10, 20, 20)
    assert 5000 < spec.encoder_macs_per_voxel < 7000


def test_number_types_are_kept(saved):
    imported = convert(saved({key: tensor.half() for key, tensor in tiny_ctclip().items()}), ImportOptions())
    assert {tensor.dtype for tensor in imported.weights.values()} == {torch.float16}
    assert imported.spec.load_report["number_types"] == ["float16"]


@pytest.mark.parametrize("stored_as", ["LPS", "RAS", "ASL"])
def test_an_asymmetric_volume_arrives_as_in_training(saved, stored_as):
    spec = convert(saved(tiny_ctclip()), ImportOptions()).spec
    hu_zyx = np.random.default_rng(4).uniform(-1500, 1500, (3, 4, 5)).astype(np.float32)
    lps = Volume(hu_zyx, Grid(hu_zyx.shape, (1.5, 0.75, 0.75), (0.0, 0.0, 0.0), (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    ours = normalise(orient(orient(lps, stored_as), spec.input.orientation).array_zyx, spec.input.intensity["CT"])
    # The published loader, on a training file: stored axes i, j, k (L, P, S) to k, i, j; clipped HU by 1000.
    stored_ijk = hu_zyx.transpose(2, 1, 0)
    np.testing.assert_allclose(ours, np.clip(stored_ijk, -1000, 1000).transpose(2, 0, 1) / 1000, atol=1e-6)


def changed(key, change):
    def damage(state):
        name = f"visual_transformer.{key}"
        tensor = state.pop(name, None)
        return state | ({} if change is None else {name: change(tensor)})

    return damage


LAYER = "enc_temporal_transformer.layers.1"
DAMAGES = {
    "missing key": (changed(f"{LAYER}.1.to_q.weight", None), f"missing, such as {LAYER}.1.to_q.weight"),
    "missing size": (changed("to_patch_emb.1.weight", None), "to_patch_emb.1.weight is missing"),
    "missing layer": (
        lambda state: {key: tensor for key, tensor in state.items() if f"{STACKS[1]}.layers.0." not in key},
        "missing, such as enc_temporal_transformer.layers.0",
    ),
    "wrong size": (changed(f"{LAYER}.3.4.weight", lambda t: t[:, :-1]), f"another shape, such as {LAYER}.3.4.weight"),
    "no size": (changed("enc_spatial_transformer.layers.0.1.to_q.weight", lambda t: t[0]), "impossible shapes"),
    "no patch": (changed("to_patch_emb_first_frame.1.weight", lambda t: t[:0]), "impossible shapes"),
    "unknown part": (changed("registers", lambda _: torch.zeros(3)), "unknown, such as registers"),
    "null keys": (changed(f"{LAYER}.1.null_kv", lambda _: torch.zeros(3, 2, 4)), f"such as {LAYER}.1.null_kv"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_encoder_is_refused_in_one_sentence(saved, damage):
    damaging, message = DAMAGES[damage]
    checkpoint = saved(damaging(tiny_ctclip()))
    with pytest.raises(CheckpointError, match="CT-CLIP_v2.pt") as refusal:
        convert(checkpoint, ImportOptions())
    assert message in str(refusal.value)


@pytest.mark.parametrize("payload", [{"encoder.weight": torch.zeros(2)}, {"epoch": 3}, {"state_dict": {}}])
def test_another_family_is_not_recognised(saved, payload):
    checkpoint = saved(payload)
    assert not recognises(checkpoint)
    with pytest.raises(CheckpointError):
        convert(checkpoint, ImportOptions())


@pytest.mark.parametrize(
    "hostile",
    [
        {"dim": 0},
        {"dim": "12"},
        {"dim": 1 << 40},
        {"spatial_depth": 10**9},
        {"temporal_depth": 0},
        {"heads": -1},
        {"patch_zyx": [2, 4]},
        {"patch_zyx": [2, 4, 0]},
        {"hidden_layers": []},
        {"hidden_layers": [1, 2]},
        {"hidden_layers": [0, 4]},
        {"class": "os.system"},
    ],
    ids=str,
)
def test_hostile_arguments_are_refused(hostile):
    with pytest.raises(CheckpointError):
        tiny_spec(**hostile)
