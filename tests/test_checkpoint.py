"""Checkpoints of others: what is read, and that nothing in a file runs, hangs or allocates what it claims."""

import builtins
import json
import os
import pickle
import struct
import subprocess
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from unicon_pipeline import checkpoint
from unicon_pipeline.checkpoint import read_checkpoint, tensors_under, without_wrappers
from unicon_pipeline.errors import CheckpointError
from unicon_pipeline.records import sha256_file


def saved(folder, payload, name="c.pth", **options):
    torch.save(payload, folder / name, **options)
    return folder / name


def archive(path, program: bytes, records=(b"",), compression=zipfile.ZIP_STORED, extra=()):
    """A torch archive with a pickle written by hand."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in (("data.pkl", program), ("byteorder", b"little"), ("version", b"3\n"), *extra):
            file.writestr(f"c/{name}", content)
        for key, content in enumerate(records):
            file.writestr(f"c/data/{key}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def dictionary(*items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(items) + b"u."


def tensor(stored: int, size: int, stride: int = 1) -> bytes:
    """A float32 vector over the record 0, which is said to hold `stored` numbers."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(stored) + b"tQ"
    shape = number(0) + number(size) + b"\x85" + number(stride) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + b"\x89ccollections\nOrderedDict\n)RtR"


def refused(path, *parts: str) -> str:
    """The refusal: one paragraph that names the file and ends in what to do."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith(".") and ".." not in message
    assert len(message) < len(str(path)) + 500
    assert not [part for part in parts if part not in message], message
    return message


def nnunet_like() -> dict:
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Conv3d(4, 3, 1))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
    network(torch.ones(1, 2, 4, 4, 4)).sum().backward()
    optimizer.step()
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "logging": {
            "ema_fg_dice": [np.float64(0.5), np.float32(0.25), np.float16(2.0)],
            "dice_per_class_or_region": [[np.float32(0.125), np.float64("nan")], [np.float64(1.0), np.float64(1.0)]],
            "counts": [np.int64(-3), np.int32(4), np.uint8(255), np.bool_(True), np.bool_(False), np.uint8(255)],
            "lrs": [0.01, 0.009],
        },
        "_best_ema": np.float64(0.8125),
        "current_epoch": 1000,
        "init_args": {
            "plans": {"configurations": {"3d_fullres": {"patch_size": [96, 96, 96], "spacing": (3.0, 2.0, 2.0)}}},
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": {"labels": {"background": 0, "lesion": 1}, "name": "Läsion"},
            "device": torch.device("cuda", 1),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


@pytest.mark.parametrize("numpy_names", ["numpy._core", "numpy.core"])
def test_a_checkpoint_like_those_of_nnunet(tmp_path, numpy_names):
    wanted = nnunet_like()
    path = saved(tmp_path, wanted)
    with zipfile.ZipFile(path) as file:
        parts = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    program = parts["data.pkl"].replace(b"numpy._core.multi", f"{numpy_names}.multi".encode())
    records = [parts[f"data/{key}"] for key in range(sum(name.startswith("data/") for name in parts))]
    found = read_checkpoint(archive(path, program, records))
    assert found.path == path and found.sha256 == sha256_file(path)
    payload = found.payload
    assert payload.keys() == wanted.keys()
    for key in ("grad_scaler_state", "current_epoch", "init_args", "trainer_name", "inference_allowed_mirroring_axes"):
        assert payload[key] == wanted[key]
    assert payload["_best_ema"] == 0.8125 and type(payload["_best_ema"]) is float
    assert payload["logging"]["ema_fg_dice"] == [0.5, 0.25, 2.0]
    assert payload["logging"]["counts"] == [-3, 4, 255, True, False, 255]
    assert payload["logging"]["counts"][3] is True and np.isnan(payload["logging"]["dice_per_class_or_region"][0][1])
    state = tensors_under(payload, "network_weights")
    assert list(state) == list(wanted["network_weights"])
    assert all(torch.equal(state[name], wanted["network_weights"][name]) for name in state)


def test_kinds_of_tensors_that_weights_have(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    wanted = {
        "parameter": nn.Parameter(weight),
        "half": weight.bfloat16(),
        "transposed": weight.T,
        "tied": weight,
        "of no size": torch.zeros(8, 0, 32),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "part": torch.arange(10)[3:5],
    }
    state = tensors_under(read_checkpoint(saved(tmp_path, {"model": wanted})).payload, "state_dict", "model")
    assert all(torch.equal(state[name], wanted[name]) and state[name].dtype == wanted[name].dtype for name in wanted)
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_tensors_stay_on_disk_and_writing_to_one_leaves_the_file(tmp_path, kind):
    wanted = {"a": torch.zeros(100_000), "b": torch.zeros(100_000)}
    if kind == "torch":
        path = saved(tmp_path, wanted)
    else:
        path = tmp_path / "c.safetensors"
        safetensors.torch.save_file(wanted, path)
    found = read_checkpoint(path)
    state = tensors_under(found.payload, "state_dict", "")
    state["a"].fill_(1.0)
    assert sha256_file(path) == found.sha256
    with path.open("rb+") as file:  # b was not looked at yet: it is what the file holds by then
        file.seek(-200_000, os.SEEK_END)
        file.write(b"\x3f" * 4000)
    assert state["b"].any()


def test_safetensors_and_the_hugging_face_layout(tmp_path):
    wanted = {"encoder.weight": torch.arange(6.0).reshape(2, 3)}
    safetensors.torch.save_file(wanted, tmp_path / "model.safetensors", {"format": "pt"})
    found = read_checkpoint(tmp_path / "model.safetensors")
    assert found.payload["metadata"] == {"format": "pt"}
    assert torch.equal(found.payload["state_dict"]["encoder.weight"], wanted["encoder.weight"])
    refused(tmp_path, "no checkpoint folder", "this one holds 'model.safetensors'")
    (tmp_path / "config.json").write_text(json.dumps({"init_filters": 32}))
    folder = read_checkpoint(tmp_path)
    assert folder.path == tmp_path and folder.sha256 == found.sha256
    assert folder.payload["config"] == {"init_filters": 32}
    assert torch.equal(tensors_under(folder.payload, "state_dict")["encoder.weight"], wanted["encoder.weight"])
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected an object, found list"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "blob")  # as in a cache: told by its content
    assert read_checkpoint(tmp_path / "blob").sha256 == found.sha256


class Runs:
    """Its pickle calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "posix.system": lambda mark: Runs(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    "builtins.exec": lambda mark: Runs(exec, f"open({str(mark)!r}, 'w')"),
    "subprocess.Popen": lambda mark: Runs(subprocess.Popen, ["touch", str(mark)]),
    "builtins.getattr": lambda mark: Runs(builtins.getattr, torch.device("cpu"), "type"),
    "builtins.bytearray": lambda mark: Runs(bytearray, 1 << 40),
    "torch.hub.load": lambda mark: Runs(torch.hub.load, str(mark.parent), "x"),
    "torch.serialization.load": lambda mark: Runs(torch.load, str(mark)),
    "torch._utils._rebuild_sparse_tensor": lambda mark: torch.eye(2).to_sparse(),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda mark: torch.empty(1 << 40, device="meta"),
    "torch.nn.modules.linear.Linear": lambda mark: nn.Linear(1, 1),
}


@pytest.mark.skipif(os.name != "posix", reason="the names of what runs a command differ")
@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("form", ["top", "nested", "among weights", "legacy", "pickle", "old pickle", "protocol 4"])
def test_what_a_pickle_wants_to_run_is_named_and_does_not_run(tmp_path, name, form):
    mark = tmp_path / "ran"
    item = PAYLOADS[name](mark)
    path = tmp_path / "c.pth"
    if form in ("pickle", "old pickle"):
        path.write_bytes(pickle.dumps({"posix": 1, "a": item}, protocol=0 if form == "old pickle" else None))
    else:
        weights = OrderedDict(a=torch.ones(3), score=np.float64(0.5))
        payload = {"top": item, "nested": {"hparams": [(item,)]}}.get(form, {"state_dict": {**weights, "b": item}})
        options = {"legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}}
        saved(tmp_path, payload, **options.get(form, {}))
    refused(path, f"'{name}'", "nothing of it was run", "Where you trust its source")
    assert not mark.exists()


def scalar(kind: str, value: str) -> bytes:
    content = b"c_codecs\nencode\n" + text(value) + text("latin1") + b"\x86R"
    return b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text(kind) + b"\x85R" + content + b"\x86R"


def test_codecs_that_grow_and_other_uses_of_what_is_allowed_are_refused(tmp_path):
    encode, ordered = b"c_codecs\nencode\n", b"ccollections\nOrderedDict\n"
    for call, fault in (
        (encode + text("a") + text("hex") + b"\x86R", "'_codecs.encode'"),
        (encode + encode + text("a") + text("latin1") + b"\x86R" + text("latin1") + b"\x86R", "'_codecs.encode'"),
        (encode + text("a") + b"\x85R", "'_codecs.encode'"),
        (encode + b"NR", "'_codecs.encode'"),
        (ordered + b"]\x85R", "'collections.OrderedDict'"),
        (scalar("O8", "12345678"), "type O8"),
        (scalar("V800000000", "1"), "type V800000000"),
        (scalar("f8", "12"), "damaged"),
        (b"cnumpy.core.multiarray\nscalar\n" + text("f8") + text("8") + b"\x86R", "damaged"),
        (b"(N" + b"t" * 2, "damaged"),
        (b"h\x05", "damaged"),
    ):
        refused(archive(tmp_path / "c.pth", dictionary(text("k"), call)), fault)
    refused(archive(tmp_path / "c.pth", b"\x80\x02N\x86."), "takes more from its stack")
    sound = dictionary(text("k"), encode + text("a") + text("latin1") + b"\x86R")
    assert read_checkpoint(archive(tmp_path / "c.pth", sound)).payload == {"k": b"a"}


def test_structures_that_would_hang_or_crash_are_refused(tmp_path, monkeypatch):
    deep = b")" + b"\x85" * 200_000
    refused(archive(tmp_path / "deep key", dictionary(deep, b"N")), "tuples or huge integers as keys")
    huge = b"\x8a\x09" + (1 << 70).to_bytes(9, "little")
    refused(archive(tmp_path / "huge key", dictionary(huge, b"N")), "tuples or huge integers as keys")
    refused(archive(tmp_path / "deep value", dictionary(text("k"), deep)), "recursion")
    refused(archive(tmp_path / "in itself", dictionary(text("k"), b"]q\x00h\x00a")), "recursion")
    monkeypatch.setattr(checkpoint, "MOST_VALUES", 10_000)
    monkeypatch.setattr(checkpoint, "MOST_OPERATIONS", 10_000)
    doubled = b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b"t"
    refused(archive(tmp_path / "doubled", dictionary(text("k"), doubled)), "contain each other without end")
    for many in (b"(" + b"}" * 10_001 + b"t", b"]q\x00(" + b"h\x00" * 10_001 + b"e"):
        refused(archive(tmp_path / "many", dictionary(text("k"), many)), "more than 10000 operations")


def test_an_ordered_dict_whose_methods_are_replaced_is_read_as_a_plain_one(tmp_path):
    replaced = b"ccollections\nOrderedDict\n)R" + text("a") + number(1) + b"s}" + text("items") + b"Nsb"
    payload = read_checkpoint(archive(tmp_path / "c.pth", dictionary(text("k"), replaced))).payload
    assert payload == {"k": {"a": 1}} and type(payload["k"]) is dict


def test_a_tensor_must_lie_within_what_is_stored_of_it(tmp_path):
    numbers = (struct.pack("<4f", 1, 2, 3, 4), struct.pack("<64f", *range(64)))

    def crafted(*arguments):
        return archive(tmp_path / "c.pth", dictionary(text("a"), tensor(*arguments)), numbers)

    assert read_checkpoint(crafted(4, 4)).payload["a"].tolist() == [1.0, 2.0, 3.0, 4.0]
    for arguments in ((4, 5), (4, 1 << 40), (4, 4, 1 << 40), (0, 1 << 33), (5, 5), (1 << 40, 4), (-8, 4), (4, 9, 0)):
        refused(crafted(*arguments), "is damaged or cut off")
    refused(saved(tmp_path, {"a": torch.zeros(1).expand(1 << 40)}), "larger than what is stored")


def test_archives_that_torch_does_not_write_are_refused_before_torch_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    path, plain = tmp_path / "c.pth", dictionary(text("a"), number(1))
    bomb = zipfile.ZIP_DEFLATED
    refused(archive(path, plain, [b"\0" * (64 << 20)], bomb), "compressed entries")
    refused(archive(path, plain, extra=[("code/x.py", b"")]), "TorchScript")
    refused(archive(path, plain, extra=[("constants.pkl", b"")]), "TorchScript")
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, plain, extra=[("data.pkl", plain)])
    refused(path, "names an entry twice")
    monkeypatch.setattr(checkpoint, "LARGEST_PICKLE", 1 << 20)
    refused(archive(path, plain + b"\0" * (1 << 20)), "a pickle of more than 1 MiB")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("Dataset001/plans.json", "{}")
    refused(path, "not torch's (it has no data.pkl)", "Unpack it")
    with zipfile.ZipFile(path, "w") as file:
        for number_of_entry in range(300):
            entry = zipfile.ZipInfo(f"c/data/{number_of_entry}")
            entry.comment = b" " * 65_000
            file.writestr(entry, b"")
    refused(path, "bytes of directory")


def test_sizes_in_the_directory_are_held_against_the_file(tmp_path):
    path = archive(tmp_path / "c.pth", dictionary(text("a"), number(1)), [b"\0" * 16])
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02")
    claimed = struct.pack("<2I", 1 << 31, 1 << 31)
    path.write_bytes(content[: entry + 20] + claimed + content[entry + 28 :])
    refused(path, "claims more bytes than it has")


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "TorchScript")


@pytest.mark.parametrize(
    "content, name, parts",
    [
        (b"", "c.pth", ["is empty", "again"]),
        (b"", "c.safetensors", ["is empty", "again"]),
        (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "c.bin", ["is a git-lfs pointer", "git lfs pull"]),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "c.safetensors", ["a web page", "again"]),
        (b"<html><body>Quota exceeded", "c.pth", ["a web page", "again"]),
        (b'{"error": "Repository not found"}', "c.pth", ["neither a torch nor a safetensors", "Repository not found"]),
        (b"PK\x03\x04 and no more", "c.pth", ["cut off", "again"]),
        (b"\x1f\x8b\x08 gzip", "c.pth", ["gzip archive", "Unpack it"]),
        (struct.pack("<Q", 50 << 30) + b'{"a":', "c.safetensors", ["claims more bytes than it can have", "again"]),
        (struct.pack("<Q", 40) + b'{"a":', "c.safetensors", ["claims more bytes than it can have", "again"]),
        (struct.pack("<Q", 2) + b"{]", "c.safetensors", ["as safetensors", "again"]),
        (bytes(range(200, 256)), "c.ckpt", ["neither a torch nor a safetensors", "again"]),
        (b"\x1b[2J\x07 escape", "c.ckpt", ["\\x1b[2J\\x07", "again"]),
        (pickle.dumps({"a": [1.0]}), "c.pkl", ["bare pickle"]),
        (pickle.dumps({"a": [1.0]})[:-3], "c.pkl", ["bare pickle"]),
    ],
)
def test_files_that_are_something_else(tmp_path, content, name, parts):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, *parts)


def test_the_old_torch_format_is_refused_with_the_way_out(tmp_path):
    wanted = {"a": torch.arange(3.0)}
    path = saved(tmp_path, wanted, _use_new_zipfile_serialization=False)
    command = refused(path, "old format").partition("anew: ")[2].rstrip(".")
    new = tmp_path / "new.pth"
    exec(command, {"torch": torch, "OLD": path, "NEW": new})
    assert torch.equal(read_checkpoint(new).payload["a"], wanted["a"])


def test_half_downloaded_files(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "cut off", "again")
    saved(tmp_path, {"a": torch.ones(1000)}).write_bytes(b"PK\x03\x04" + path.read_bytes()[4:])
    safetensors.torch.save_file({"a": torch.ones(1000)}, tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(whole[:-1000])
    refused(tmp_path / "c.safetensors", "as safetensors", "again")


def test_a_flipped_byte_of_the_pickle_is_found(tmp_path):
    path = archive(tmp_path / "c.pth", dictionary(text("a"), text("value")))
    path.write_bytes(path.read_bytes().replace(b"value", b"valve"))
    refused(path, "damaged", "CRC")


def test_contents_that_are_no_state_dict(tmp_path):
    refused(saved(tmp_path, torch.ones(2)), "holds a Tensor")
    refused(saved(tmp_path, [{"a": torch.ones(2)}]), "holds a list")
    refused(saved(tmp_path, {"a": torch.ones(2)}, "c.safetensors"), "Rename it to .pth")
    refused(saved(tmp_path, {"a": torch.ones(2)}, pickle_protocol=3), "unusual pickle protocol")


def test_places_without_a_checkpoint(tmp_path, monkeypatch):
    refused(tmp_path / "none.pth", "does not exist")
    refused(tmp_path / ("long" * 100), "cannot be read")
    refused(tmp_path, "this one holds nothing", "nnU-Net", "model.json", "config.json and model.safetensors")
    for index in range(10):
        (tmp_path / f"{index}.txt").touch()
    refused(tmp_path, "'7.txt', 2 more.")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "no regular file")
    path = saved(tmp_path, {"a": torch.ones(2)})

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", denied)
    refused(path, "cannot be read: Permission denied", "permissions")


def test_the_first_key_with_tensors_counts():
    a, b = torch.ones(1), torch.zeros(1)
    payload = {"state_dict": {"w": a, "version": 3, 7: "x"}, "model": {"w": b}, "top": a, "epoch": 1, "ema": {}}
    assert tensors_under(payload, "net", "epoch", "ema", "state_dict", "model")["w"] is not b
    assert list(tensors_under(payload, "state_dict")) == ["w"]
    assert list(tensors_under(payload, "")) == ["top"]
    with warnings.catch_warnings():  # quantised tensors are on their way out
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(a, 0.1, 0, torch.qint8)
    left_out = {"s": a.to_sparse(), "m": a.to("meta"), "q": quantised}
    assert list(tensors_under({"": left_out, **left_out, "w": a}, "")) == ["w"]
    with pytest.raises(CheckpointError, match="no tensors under net or the top level; at its top level are 'epoch'"):
        tensors_under({"epoch": 1}, "net", "")


@pytest.mark.parametrize("name", [7, ("a",), "a" * 600, "a\x1b[2J", "a\nb"])
def test_names_of_tensors_are_short_and_printable(name):
    with pytest.raises(CheckpointError, match="names a tensor"):
        tensors_under({name: torch.ones(1)}, "")


def test_wrappers_are_removed_from_names():
    names = {
        "module.a": "a",
        "module._orig_mod.b": "b",
        "_orig_mod.module.c": "c",
        "module.module.d": "d",
        "_orig_mod._orig_mod.e": "e",
        "encoder._orig_mod.stages.0": "encoder.stages.0",
        "encoder.module.f": "encoder.module.f",
        "my_orig_mod.g": "my_orig_mod.g",
        "n_averaged": "n_averaged",
    }
    state = {name: torch.tensor(i) for i, name in enumerate(names)}
    bare = without_wrappers(state)
    assert list(bare) == list(names.values())
    assert all(bare[names[name]] is state[name] for name in names)
    with pytest.raises(CheckpointError, match="two tensors for a"):
        without_wrappers({"a": torch.ones(1), "module.a": torch.ones(1)})


def test_the_wrappers_of_torch_itself(tmp_path):
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(network))
    network[0] = torch.compile(network[0], backend="eager")
    state = without_wrappers(tensors_under(read_checkpoint(saved(tmp_path, network.state_dict())).payload, ""))
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(without_wrappers(averaged.state_dict())) == ["n_averaged", *(f"0.{name}" for name in state)]
