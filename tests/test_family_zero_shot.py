"""CT-CLIP's zero-shot classification against a plain reading of it, and the ways its text latents come in."""

import json
import sys

import numpy as np
import pytest
import torch
from test_family_ctvit import CODES, DIM, GRID, LATENT, Naive, saved, tiny_ctclip, tiny_spec

from unicon_pipeline.dataset import prediction_cases
from unicon_pipeline.errors import CheckpointError, PredictionError, UniconError
from unicon_pipeline.families import build_foundation, build_native, ctvit
from unicon_pipeline.families.zero_shot import (
    CT_RATE_FINDINGS,
    TASK_NAME,
    ZeroShotHead,
    convert,
    zero_shot_parts,
)
from unicon_pipeline.foundation import freeze
from unicon_pipeline.imported import ImportOptions
from unicon_pipeline.importer import import_checkpoint
from unicon_pipeline.intensity import read_in_units
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.model_record import NativePlan
from unicon_pipeline.phantoms import write_phantom_task
from unicon_pipeline.predict import predict_folder
from unicon_pipeline.prepare import prepare_case
from unicon_pipeline.tables import read_table
from unicon_pipeline.verify import verify
from unicon_pipeline.weights import canonical_state, load_exactly

__all__ = ["saved"]  # a fixture

OPTIONS = {"findings": ["Emphysema", "Lung nodule"], "grid": [GRID] * 3, "dim": DIM, "latent": LATENT, "codes": CODES}


def made_up_latents(seed=5):
    """Not of unit length, as a file may hold them."""
    values = np.random.default_rng(seed).normal(0, 3, (2, 2, LATENT))
    return {
        name: {"present": present.tolist(), "absent": absent.tolist()}
        for name, (present, absent) in zip(OPTIONS["findings"], values)
    }


@pytest.fixture
def findings(tmp_path):
    def write(payload):
        path = tmp_path / "findings.json"
        path.write_text(json.dumps(payload), encoding="utf-8")
        return ImportOptions(findings=path)

    return write


def naive_probabilities(state, tokens_zyxc, latents):
    """One volume's, token by token in float64, from the published names."""
    codebook = state["visual_transformer.vq._codebook.embed"][0].double().numpy()
    plane = np.zeros(tokens_zyxc.shape[1:])
    for z, y, x in np.ndindex(tokens_zyxc.shape[:3]):
        token = tokens_zyxc[z, y, x]
        cosines = [token @ code / np.linalg.norm(token) / np.linalg.norm(code) for code in codebook]
        plane[y, x] += codebook[np.argmax(cosines)] / len(tokens_zyxc)
    image = state["to_visual_latent.weight"].double().numpy() @ plane.ravel()
    probabilities = []
    for sides in latents.values():
        texts = (np.array(sides[side]) for side in ("present", "absent"))
        cosines = (text @ image / np.linalg.norm(text) / np.linalg.norm(image) for text in texts)
        present, absent = (np.exp(np.exp(state["temperature"].item()) * cosine) for cosine in cosines)
        probabilities.append(present / (present + absent))
    return np.array(probabilities)


def native_task(checkpoint, options):
    imported = ctvit.convert(checkpoint, options)
    foundation = build_foundation(imported.spec)
    load_exactly(canonical_state(foundation), imported.weights, "the foundation")
    parts, weights = zero_shot_parts(checkpoint, options)
    network = build_native(NativePlan("zero_shot", parts, tuple(parts["findings"]), "a test"), foundation)
    load_exactly(network.own_state(), weights, "the task")
    return freeze(network), parts, weights


def test_probabilities_agree_with_the_naive_reading(saved, findings):
    state = tiny_ctclip()
    network, parts, _ = native_task(saved(state), findings({"findings": made_up_latents()}))
    assert parts == OPTIONS
    volumes = torch.rand((2, 1, 6, 12, 12), generator=torch.Generator().manual_seed(6)) * 2 - 1
    present = torch.ones((2, 1), dtype=torch.bool)
    with torch.no_grad():
        probabilities = network.head(network.foundation(volumes, None, None))
        (logits,) = network(volumes, present)
    assert torch.equal(logits.sigmoid(), probabilities)
    for case, volume in enumerate(volumes[:, 0].double().numpy()):
        tokens = Naive(state).hidden_layers(volume)[-1]
        expected = naive_probabilities(state, tokens, made_up_latents())
        assert np.ptp(expected) > 0.05  # the findings differ
        np.testing.assert_allclose(probabilities[case].numpy(), expected, rtol=0, atol=1e-5)


def test_the_head_computes_in_float32_under_autocast(saved, findings):
    network, _, _ = native_task(saved(tiny_ctclip()), findings({"findings": made_up_latents()}))
    pyramid = [torch.randn((1, DIM, *[GRID] * 3), generator=torch.Generator().manual_seed(7))]
    exact = network.head(pyramid)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.head(pyramid), exact)


def test_number_types_are_kept_but_for_the_text_latents(saved, findings):
    state = {key: tensor.half() for key, tensor in tiny_ctclip().items()}
    _, weights = zero_shot_parts(saved(state), findings({"findings": made_up_latents()}))
    kinds = {key: tensor.dtype for key, tensor in weights.items()}
    assert kinds.pop("head.text_latents") == torch.float32
    assert set(kinds.values()) == {torch.float16}


def test_another_token_grid_is_refused():
    with pytest.raises(PredictionError, match=r"works on \(3, 3, 3\) tokens .* got \(3, 3, 4\)"):
        ZeroShotHead(**OPTIONS)([torch.zeros(1, DIM, 3, 3, 4)])


@pytest.mark.parametrize(
    "hostile",
    [
        {"findings": []},
        {"findings": "Emphysema"},
        {"grid": [3, 3]},
        {"grid": [3, 0, 3]},
        {"dim": "12"},
        {"latent": 1 << 40},
        {"grid": [60000, 60000, 60000]},
        {"codes": 0},
        {"class": "os.system"},
    ],
    ids=str,
)
def test_hostile_options_are_refused(hostile):
    plan = NativePlan("zero_shot", OPTIONS | hostile, (), "a test")
    with pytest.raises(UniconError):
        build_native(plan, build_foundation(tiny_spec()))


def test_without_latents_the_task_is_left_out_and_said_so(saved, caplog):
    assert convert(saved(tiny_ctclip()), ImportOptions()).tasks == ()
    assert "zero-shot classification is left out" in caplog.text


def test_two_sources_of_latents_are_one_too_many(saved, findings, tmp_path):
    options = ImportOptions(findings=findings({}).findings, text_encoder=tmp_path)
    with pytest.raises(CheckpointError, match="not both"):
        convert(saved(tiny_ctclip()), options)


def test_imported_it_predicts_findings_of_whole_volumes(saved, findings, tmp_path):
    checkpoint = saved(tiny_ctclip())
    options = findings({"findings": made_up_latents()})
    import_checkpoint(checkpoint.path, tmp_path / "model", options=options)
    assert verify(tmp_path / "model").ok
    write_phantom_task(tmp_path / "raw", "lesions", 2, 5, shape_zyx=(24, 40, 40), spacing_zyx_mm=(12.0, 10.0, 10.0))
    report = predict_folder(tmp_path / "raw" / "imagesTr", tmp_path / "out", tmp_path / "model", device="cpu")
    assert report.exit_code == 0
    table = read_table(tmp_path / "out" / TASK_NAME / "predictions.csv")
    assert table.case_ids == tuple(case.case_id for case in report.cases)
    assert list(table.columns) == OPTIONS["findings"]
    network, _, _ = native_task(checkpoint, options)
    plan = ModelFolder(tmp_path / "model").task_plan(TASK_NAME).data
    case = prediction_cases(tmp_path / "raw" / "imagesTr", {0: "CT"})[0]
    image = torch.from_numpy(prepare_case(read_in_units(case), plan).array_czyx)[None]
    expected = network(image, torch.ones((1, 1), dtype=torch.bool))[0].sigmoid()[0]
    found = [table.columns[name][0] for name in OPTIONS["findings"]]
    assert found == pytest.approx(expected.tolist(), abs=5e-3)  # predicted in bfloat16 where there is hardware for it


def with_latent(values, side="present"):
    latents = made_up_latents()
    latents["Emphysema"][side] = values
    return {"findings": latents}


BAD_FINDINGS = {
    "no object": ([], "expected"),
    "no findings": ({"findings": {}}, "expected"),
    "names alone": ({"findings": ["Emphysema"]}, "expected"),
    "more than findings": ({"findings": made_up_latents(), "threshold": 0.5}, "expected"),
    "no name": ({"findings": {"": made_up_latents()["Emphysema"]}}, "cannot name a finding"),
    "a name of two lines": ({"findings": {"a\nb": made_up_latents()["Emphysema"]}}, "cannot name a finding"),
    "one side": ({"findings": {"Emphysema": {"present": [1.0] * LATENT}}}, "present and absent"),
    "three sides": ({"findings": {"Emphysema": made_up_latents()["Emphysema"] | {"maybe": []}}}, "present and absent"),
    "too short": (with_latent([1.0] * (LATENT - 1)), f"Emphysema, present: expected a list of {LATENT}"),
    "text": (with_latent(["1.0"] * LATENT, "absent"), "Emphysema, absent: expected a list"),
    "booleans": (with_latent([True] * LATENT), "expected a list"),
    "not a number": (with_latent([float("nan")] * LATENT), "expected a list"),
    "infinite": (with_latent([float("inf")] * LATENT), "expected a list"),
    "beyond all floats": (with_latent([10**400] * LATENT), "expected a list"),
    "nested": (with_latent([[1.0]] * LATENT), "expected a list"),
    "zeros": (with_latent([0] * LATENT), "no direction"),
}


@pytest.mark.parametrize("fault", BAD_FINDINGS)
def test_a_bad_file_of_findings_is_refused(saved, findings, fault):
    payload, message = BAD_FINDINGS[fault]
    with pytest.raises(CheckpointError, match=r"findings\.json") as refusal:
        zero_shot_parts(saved(tiny_ctclip()), findings(payload))
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_file_of_findings_that_is_no_json_is_refused(saved, tmp_path, text):
    path = tmp_path / "findings.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"findings\.json"):
        zero_shot_parts(saved(tiny_ctclip()), ImportOptions(findings=path))


@pytest.mark.parametrize(
    "key, value",
    [
        ("visual_transformer.vq._codebook.embed", None),
        ("visual_transformer.vq._codebook.embed", torch.zeros(CODES, DIM)),
        ("to_visual_latent.weight", None),
        ("to_visual_latent.weight", torch.zeros(LATENT, DIM * 8)),
        ("temperature", None),
        ("temperature", torch.zeros(2)),
    ],
)
def test_a_checkpoint_without_its_parts_is_refused(saved, findings, key, value):
    state = tiny_ctclip() | {key: value}
    checkpoint = saved({name: tensor for name, tensor in state.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=r"CT-CLIP_v2\.pt: ") as refusal:
        zero_shot_parts(checkpoint, findings({"findings": made_up_latents()}))
    assert key.removesuffix(".weight") in str(refusal.value)


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . is not present lung nod ##ule op ##ac ##ity em ##phy ##sema wall effusion"


class TestTextEncoder:
    """The latents from a small BERT, made and called as CT-CLIP does it."""

    transformers = None

    @pytest.fixture(autouse=True)
    def _transformers(self):
        type(self).transformers = pytest.importorskip("transformers")

    @pytest.fixture
    def vocabulary(self, tmp_path):
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n", encoding="utf-8")
        return folder

    @pytest.fixture
    def bert(self):
        torch.manual_seed(8)
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
        sizes |= {"max_position_embeddings": 32, "initializer_range": 0.3}
        config = self.transformers.BertConfig(vocab_size=len(WORDS.split()), hidden_size=128, **sizes)
        return freeze(self.transformers.BertModel(config))

    def state(self, bert):
        projection = torch.randn((LATENT, 128), generator=torch.Generator().manual_seed(9))
        text = {f"text_transformer.{key}": tensor for key, tensor in bert.state_dict().items()}
        return tiny_ctclip() | text | {"to_text_latent.weight": projection}

    def test_latents_are_those_of_the_published_way(self, saved, vocabulary, bert):
        state = self.state(bert)
        assert "text_transformer.embeddings.position_ids" in state
        assert "text_transformer.pooler.dense.weight" in state
        options, weights = zero_shot_parts(saved(state), ImportOptions(text_encoder=vocabulary))
        assert options["findings"] == list(CT_RATE_FINDINGS)
        assert weights["head.text_latents"].shape == (18, 2, LATENT)
        tokenizer = self.transformers.BertTokenizer.from_pretrained(str(vocabulary), do_lower_case=True)
        for finding, latents in zip(CT_RATE_FINDINGS, weights["head.text_latents"], strict=True):
            pair = [f"{finding} is present.", f"{finding} is not present."]
            tokens = tokenizer(pair, return_tensors="pt", padding="max_length", truncation=True, max_length=32)
            words = bert(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            expected = words[:, 0] @ state["to_text_latent.weight"].T
            expected = expected / expected.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
            assert (latents[0] - latents[1]).norm() > 0.01

    def test_the_whole_task_is_built_from_them(self, saved, vocabulary, bert):
        network, parts, _ = native_task(saved(self.state(bert)), ImportOptions(text_encoder=vocabulary))
        (logits,) = network(torch.zeros(1, 1, 6, 12, 12), torch.ones(1, 1, dtype=torch.bool))
        assert logits.shape == (1, len(parts["findings"]))

    @pytest.mark.parametrize("words", ["", WORDS + " more"])
    def test_another_vocabulary_is_refused(self, saved, vocabulary, bert, words):
        (vocabulary / "vocab.txt").write_text("\n".join(words.split()) + "\n", encoding="utf-8")
        with pytest.raises(CheckpointError, match="BiomedVLP-CXR-BERT-specialized"):
            zero_shot_parts(saved(self.state(bert)), ImportOptions(text_encoder=vocabulary))

    def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(self, saved, tmp_path, bert):
        with pytest.raises(CheckpointError, match="no such folder"):
            zero_shot_parts(saved(self.state(bert)), ImportOptions(text_encoder=tmp_path / "bert-base-uncased"))

    def test_an_incomplete_text_encoder_is_refused(self, saved, vocabulary, bert):
        state = self.state(bert)
        del state["text_transformer.encoder.layer.1.output.dense.weight"]
        with pytest.raises(CheckpointError, match=r"missing, such as encoder\.layer\.1\.output\.dense\.weight"):
            zero_shot_parts(saved(state), ImportOptions(text_encoder=vocabulary))

    def test_an_image_encoder_alone_has_no_text_latents(self, saved, vocabulary):
        state = tiny_ctclip() | {"to_text_latent.weight": torch.zeros(LATENT, 128)}
        with pytest.raises(CheckpointError, match=r"embeddings\.word_embeddings\.weight is missing"):
            zero_shot_parts(saved(state), ImportOptions(text_encoder=vocabulary))


def test_the_text_encoder_asks_for_its_package(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"unicon-pipeline\[text\]"):
        zero_shot_parts(saved(tiny_ctclip()), ImportOptions(text_encoder=tmp_path))
