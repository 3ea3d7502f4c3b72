"""CT-CLIP's own task: for each finding, is the volume nearer to "X is present." or to "X is not present."?

Only the image side is computed at prediction. What the sentences become, their latents, is computed once at import, by
the checkpoint's own text encoder, or is given as a file.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unicon_pipeline.checkpoint import Checkpoint
from unicon_pipeline.contract import ZYX, Conventions, FoundationSpec
from unicon_pipeline.errors import CheckpointError, PredictionError
from unicon_pipeline.families import ctvit
from unicon_pipeline.families.ctvit import ctclip_tensors, recognises
from unicon_pipeline.foundation import Foundation
from unicon_pipeline.imported import Imported, ImportOptions, NativeTask, plan_as_trained
from unicon_pipeline.model_record import NativePlan, TaskPlan
from unicon_pipeline.native import NATIVES, NativeModel
from unicon_pipeline.plan import DataPlan
from unicon_pipeline.records import from_dict, read_json
from unicon_pipeline.weights import load_exactly

logger = logging.getLogger(__name__)

__all__ = ["convert", "recognises", "zero_shot_parts"]
TASK_NAME = "CTRATE_findings"

CT_RATE_FINDINGS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
_SENTENCES = ("{} is present.", "{} is not present.")
_SIDES = ("present", "absent")

_BERT_HEAD_CHANNELS = 64  # in every published size; the weights do not show it
_BERT_POSITION_IDS = "embeddings.position_ids"  # only old versions of transformers saved this buffer
_BERT_POOLER = "pooler."

_LARGEST = 1 << 16
_LARGEST_PROJECTION = 1 << 30


@dataclass(frozen=True)
class ZeroShotSize:
    """The options. `grid`: the tokens z, y, x that the projection was trained for; `codes`: of the codebook."""

    findings: tuple[str, ...]
    grid: ZYX
    dim: int
    latent: int
    codes: int

    def __post_init__(self) -> None:
        sizes = (*self.grid, self.dim, self.latent, self.codes, len(self.findings))
        if min(sizes) < 1 or max(sizes) > _LARGEST or self.image_channels * self.latent > _LARGEST_PROJECTION:
            raise ValueError(f"sizes from 1 to {_LARGEST} are possible, and {_LARGEST_PROJECTION} weights.")

    @property
    def image_channels(self) -> int:
        return self.grid[1] * self.grid[2] * self.dim


class ZeroShotHead(nn.Module):
    """Tokens to the probability of each finding; built from the fields of `ZeroShotSize`.

    CT-CLIP was trained on the tokens of its autoencoder, so each token is first replaced by the code nearest to it in
    angle. The codes are averaged along z and projected as a whole, which fixes the token grid. All in float32: present
    and absent differ by little.
    """

    def __init__(self, **options: Any):
        super().__init__()
        size = from_dict(ZeroShotSize, options, "options", CheckpointError)
        self.grid = size.grid
        self.codebook = nn.Parameter(torch.zeros(size.codes, size.dim))
        self.to_visual_latent = nn.Parameter(torch.zeros(size.latent, size.image_channels))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.text_latents = nn.Parameter(torch.zeros(len(size.findings), len(_SENTENCES), size.latent))

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """Maps of the foundation, of which the last one is read, to probabilities (B, findings)."""
        return self.logits(pyramid).sigmoid()

    def logits(self, pyramid: list[Tensor]) -> Tensor:
        """(B, findings); their sigmoid is the softmax over present and absent.

        Raises:
            PredictionError: the tokens are of another grid.
        """
        tokens_bczyx = pyramid[-1]
        grid = tuple(tokens_bczyx.shape[2:])
        if grid != self.grid:
            raise PredictionError(
                f"Zero-shot classification works on {self.grid} tokens (z, y, x) and got {grid}: the volume has "
                "another shape than its plan says."
            )
        with torch.autocast(tokens_bczyx.device.type, enabled=False):
            plane = self._mean_codes(tokens_bczyx.float()).to(self.to_visual_latent.dtype)
            latent = functional.normalize(functional.linear(plane, self.to_visual_latent).float(), dim=-1)
            cosines = torch.einsum("bl,fsl->bfs", latent, self.text_latents.float())
            return self.temperature.float().exp() * (cosines[..., 0] - cosines[..., 1])

    def _mean_codes(self, tokens_bczyx: Tensor) -> Tensor:
        """(B, y * x * C), channels fastest."""
        codebook = self.codebook.float()
        directions = functional.normalize(codebook, dim=-1)
        total = 0.0
        for slab_bcyx in tokens_bczyx.unbind(2):  # slab by slab: there are many codes for each token
            tokens = functional.normalize(slab_bcyx.permute(0, 2, 3, 1), dim=-1)
            total = total + codebook[(tokens @ directions.T).argmax(dim=-1)]
        return (total / tokens_bczyx.shape[2]).flatten(1)


@NATIVES.register("zero_shot")
class ZeroShot(NativeModel):
    """The image encoder with the head; options as `ZeroShotHead`."""

    def __init__(self, foundation: Foundation, options: dict[str, Any]):
        super().__init__(foundation, options)
        self.head = ZeroShotHead(**options)

    def forward(self, images_bczyx: Tensor, present_bc: Tensor) -> list[Tensor]:
        return [self.head.logits(self.foundation(images_bczyx, None, None))]


def convert(checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    """CT-CLIP: the image encoder, and its own task where text latents are to be had.

    Raises:
        CheckpointError: it is not CT-CLIP's, or not complete; or the text encoder's folder or the file of findings is
            not what it must be.
    """
    imported = ctvit.convert(checkpoint, options)
    if options.findings is None and options.text_encoder is None:
        logger.warning(
            "%s: zero-shot classification is left out. It needs a folder with the tokenizer of the text encoder "
            "(--text-encoder), or a file with ready latents of findings (--findings).",
            checkpoint.path,
        )
        return imported
    if options.findings is not None and options.text_encoder is not None:
        raise CheckpointError("Give either the text encoder's folder or the file of findings, not both.")
    arguments, weights = zero_shot_parts(checkpoint, options)
    native = NativePlan("zero_shot", arguments, tuple(arguments["findings"]), "CT-CLIP: image against text latents")
    plan = TaskPlan(_data_plan(imported.spec, tuple(arguments["grid"])), None, native)
    card = {"schema_version": 1, "task": TASK_NAME}
    return dataclasses.replace(imported, tasks=(NativeTask(plan, weights, card),))


def _data_plan(spec: FoundationSpec, grid: ZYX) -> DataPlan:
    """The whole field of view at the foundation's spacing, centred in the shape of the token grid; nothing is cropped
    before. CT-CLIP was trained without mirroring."""
    shape = tuple(positions * size for positions, size in zip(grid, spec.input.divisible_by_zyx, strict=True))
    return plan_as_trained(
        spec,
        "CT-CLIP's",
        task=TASK_NAME,
        task_type="classification",
        labels=None,
        view="volume",
        patch_shape_zyx=shape,
        batch_size=1,
        median_shape_zyx=shape,
        fingerprint_sha256="",
        conventions=Conventions("none", "air", ()),
    )


def zero_shot_parts(checkpoint: Checkpoint, options: ImportOptions) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options of `ZeroShot` and its own weights, in the file's number types.

    Raises:
        CheckpointError: the checkpoint lacks a part, or the text encoder's folder or the file of findings is not
            what it must be.
    """
    tensors, source = ctclip_tensors(checkpoint), str(checkpoint.path)
    codebook = _taken(tensors, "visual_transformer.vq._codebook.embed", 3, source)[0]
    projection = _taken(tensors, "to_visual_latent.weight", 2, source)
    (latent, image_channels), (codes, dim) = projection.shape, codebook.shape
    edge = math.isqrt(image_channels // dim)
    if edge**2 * dim != image_channels:
        raise CheckpointError(f"{source}: to_visual_latent takes {image_channels} numbers, no square x {dim} channels.")
    if options.findings is not None:
        latents = _read_latents(options.findings, latent)
    else:
        latents = _encode_findings(tensors, options.text_encoder, source)
    weights = {
        "head.codebook": codebook,
        "head.to_visual_latent": projection,
        "head.temperature": _taken(tensors, "temperature", 0, source),
        "head.text_latents": torch.stack(list(latents.values())),
    }
    grid = [edge] * 3  # the volumes it was trained on are cubes of tokens
    return {"findings": list(latents), "grid": grid, "dim": dim, "latent": latent, "codes": codes}, weights


def _taken(tensors: dict[str, Tensor], key: str, dimensions: int, source: str) -> Tensor:
    tensor = tensors.get(key)
    if tensor is None or tensor.dim() != dimensions or not tensor.numel():
        found = "is missing" if tensor is None else f"is of shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{source}: {key} {found}; zero-shot classification needs it. Use the whole CT-CLIP.")
    return tensor


def _read_latents(path: Path, length: int) -> dict[str, Tensor]:
    """The file {"findings": {name: {"present": [...], "absent": [...]}}} as unit vectors (2, length) by name."""
    payload = read_json(path, CheckpointError)
    findings = payload.get("findings") if isinstance(payload, dict) else None
    if not isinstance(findings, dict) or set(payload) != {"findings"} or not 0 < len(findings) <= _LARGEST:
        raise CheckpointError(f'{path}: expected {{"findings": {{name: {{"present": [...], "absent": [...]}}}}}}.')
    latents = {}
    for name, sides in findings.items():
        if not name.isprintable() or not name or name != name.strip():
            raise CheckpointError(f"{path}: {name!r} cannot name a finding; use plain words.")
        if not isinstance(sides, dict) or set(sides) != set(_SIDES):
            raise CheckpointError(f"{path}: {name} must have present and absent, and nothing else.")
        latents[name] = torch.stack([_unit(sides[side], length, f"{path}: {name}, {side}") for side in _SIDES])
    return latents


def _unit(values: Any, length: int, where: str) -> Tensor:
    numbers = values if isinstance(values, list) else []
    # Comparisons also refuse NaN and integers beyond all floats.
    if len(numbers) != length or not all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers):
        raise CheckpointError(f"{where}: expected a list of {length} finite numbers.")
    vector = torch.tensor(numbers, dtype=torch.float64)
    if vector.norm() < 1e-6:
        raise CheckpointError(f"{where}: a latent of zeros has no direction.")
    return functional.normalize(vector, dim=0).float()


def _encode_findings(tensors: dict[str, Tensor], folder: Path, source: str) -> dict[str, Tensor]:
    """The latents (2, latent) of CT-RATE's findings, from the checkpoint's BERT and the tokenizer in `folder`."""
    try:
        from transformers import BertConfig, BertModel, BertTokenizer
    except ImportError as problem:
        raise CheckpointError(
            'The text encoder needs the package transformers. Install it: pip install "unicon-pipeline[text]", or '
            "give a file with ready latents of findings."
        ) from problem
    prefix = "text_transformer."
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    state = {key: t for key, t in state.items() if key != _BERT_POSITION_IDS and not key.startswith(_BERT_POOLER)}
    projection = _taken(tensors, "to_text_latent.weight", 2, source).float()
    bert = BertModel(BertConfig(**_bert_sizes(state, source)), add_pooling_layer=False).eval()
    load_exactly(bert.state_dict(keep_vars=True), state, f"{source}, text_transformer")
    tokenizer = _tokenizer(BertTokenizer, folder, bert.config.vocab_size)
    sentences = [sentence.format(finding) for finding in CT_RATE_FINDINGS for sentence in _SENTENCES]
    with torch.no_grad():
        length = bert.config.max_position_embeddings
        tokens = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True, max_length=length)
        # The first token, [CLS], stands for the sentence.
        first = bert(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state[:, 0]
        latents = functional.normalize(functional.linear(first, projection), dim=-1)
    return dict(zip(CT_RATE_FINDINGS, latents.unflatten(0, (-1, len(_SENTENCES)))))


def _bert_sizes(state: dict[str, Tensor], source: str) -> dict[str, int]:
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    words, positions, types = (_taken(state, f"embeddings.{name}.weight", 2, source) for name in names)
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.layer.")}
    inner = _taken(state, "encoder.layer.0.intermediate.dense.weight", 2, source)
    hidden = words.shape[1]
    if hidden % _BERT_HEAD_CHANNELS:
        raise CheckpointError(f"{source}: a BERT of {hidden} channels cannot have heads of {_BERT_HEAD_CHANNELS}.")
    return {
        "vocab_size": len(words),
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": hidden // _BERT_HEAD_CHANNELS,
        "intermediate_size": len(inner),
        "max_position_embeddings": len(positions),
        "type_vocab_size": len(types),
    }


def _tokenizer(tokenizer_class: Any, folder: Path, words: int) -> Any:
    try:
        # A name that is no folder here would be looked up on the network.
        if not folder.is_dir():
            raise OSError("there is no such folder")
        tokenizer = tokenizer_class.from_pretrained(str(folder), do_lower_case=True, local_files_only=True)
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise CheckpointError(
            f"{folder} cannot be read as a BERT tokenizer: {problem}. CT-CLIP's is the one of "
            "microsoft/BiomedVLP-CXR-BERT-specialized; download its vocab.txt into this folder."
        ) from problem
    if len(tokenizer) != words:
        raise CheckpointError(
            f"{folder} holds a tokenizer of {len(tokenizer)} words, and the checkpoint's text encoder knows {words}; "
            "CT-CLIP's is the one of microsoft/BiomedVLP-CXR-BERT-specialized."
        )
    return tokenizer
