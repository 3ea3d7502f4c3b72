"""Weights: each tensor once, exact fits only, damaged files in one sentence."""

import struct

import pytest
import torch
from torch import nn

from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.families import build_foundation
from unicon_pipeline.families.dna_encoders import new_residual_encoder_spec
from unicon_pipeline.weights import canonical_state, load_exactly, load_weights, read_metadata, save_weights


def test_aliases_count_once():
    foundation = build_foundation(new_residual_encoder_spec("none", {}))
    state = canonical_state(foundation)
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state) < len(foundation.state_dict())
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in foundation.parameters())


def test_state_is_parameters_and_stored_buffers_themselves():
    network = nn.Sequential(nn.BatchNorm3d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    network[2].weight = network[1].weight
    network.register_buffer("derived", torch.ones(1), persistent=False)
    state = canonical_state(network)
    assert set(state) == {
        "0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias", "2.bias"
    }  # fmt: skip
    assert state["1.weight"] is network[1].weight and state["0.running_mean"] is network[0].running_mean


def test_what_was_saved_loads_into_a_network_with_tied_weights(tmp_path):
    def tied():
        network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        network[1].weight = network[0].weight
        return network

    one, other = tied(), tied()
    save_weights(tmp_path / "w", canonical_state(one))
    load_exactly(canonical_state(other), load_weights(tmp_path / "w"), "w")
    assert other[1].weight is other[0].weight
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_round_trip_and_the_same_bytes_each_time(tmp_path):
    state = {"b": torch.randn(3, 4).T, "a": torch.arange(5), "n": nn.Parameter(torch.ones(2))}
    save_weights(tmp_path / "one", state, {"note": "x"})
    save_weights(tmp_path / "two", dict(reversed(state.items())), {"note": "x"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_weights(tmp_path / "one")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert read_metadata(tmp_path / "one") == {"note": "x"}


def test_only_an_exact_fit_is_loaded():
    wanted = {"a": torch.zeros(2), "b": torch.zeros(3)}
    load_exactly(wanted, {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(3)}, "w")
    assert wanted["a"].tolist() == [1.0, 1.0] and wanted["a"].dtype is torch.float32
    for found, message in (
        ({"a": torch.ones(2)}, "1 missing, such as b"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "1 unknown, such as c"),
        ({"a": torch.ones(2), "b": torch.ones(4)}, "1 of another shape, such as b"),
    ):
        before = {name: tensor.clone() for name, tensor in wanted.items()}
        with pytest.raises(CheckpointError, match=message):
            load_exactly(wanted, found, "w")
        assert all(torch.equal(before[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a zip",
        struct.pack("<Q", 50 << 30) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        b"\x80\x04\x95pickle",
    ],
    ids=["empty", "zip", "header of 50 GB", "wrong header", "pickle"],
)
def test_damaged_and_foreign_files_get_one_sentence(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.safetensors cannot be read as safetensors"):
        load_weights(tmp_path / "w.safetensors")


def test_a_truncated_file_is_refused(tmp_path):
    save_weights(tmp_path / "w", {"a": torch.ones(1000)})
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(tmp_path / "w")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_weights(path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_metadata(path)


def test_a_failed_write_leaves_the_old_weights(tmp_path):
    save_weights(tmp_path / "w", {"a": torch.ones(2)})
    with pytest.raises(AttributeError):
        save_weights(tmp_path / "w", {"a": torch.zeros(2), "b": None})
    assert load_weights(tmp_path / "w")["a"].tolist() == [1.0, 1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
