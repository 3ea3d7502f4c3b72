"""End-to-end training of case-level tasks: exact gradients case by case, one graph at a time, and runs that learn."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_loader import make_plan
from test_model import SPECS, build, images_for

from unicon_pipeline.case_fit import of_survival
from unicon_pipeline.case_training import CaseData, Run, backward_by_case, case_logits, predict_cases, train_end_to_end
from unicon_pipeline.device import one_thread
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.extension_plan import AdapterPlan, HeadPlan, Schedule
from unicon_pipeline.store import write_case
from unicon_pipeline.survival import SURVIVAL_LOSSES

EDGES = (100.0, 200.0, 400.0)
OPTIONS = {"columns": 2, "units": 6}
PROGNOSIS = AdapterPlan("low_rank", 2, 32.0)
CPU = torch.device("cpu")
SHAPE = (8, 16, 16)


@pytest.fixture(autouse=True)
def _one_thread():
    """Several would wait for each other longer than these small networks take."""
    with one_thread():
        yield


def run(folder, **changes):
    settings = {"device": CPU, "precision": torch.float32, "checkpoint": folder / "run.safetensors", "fingerprint": "a"}
    return Run(**{**settings, "workers": 0, **changes})


def prognosis_model(spec="strided", kind="fusion", outputs=3, **options):
    torch.manual_seed(0)
    return build(SPECS[spec], adapter=PROGNOSIS, head=HeadPlan(kind, outputs, {**OPTIONS, **options}))


def disturb(model):
    """What begins at zero hides gradients."""
    with torch.no_grad():
        for tensor in model.trained_state().values():
            if tensor.requires_grad:
                tensor.add_(0.1 * torch.randn_like(tensor))


def gradients(model):
    return {name: t.grad.clone() for name, t in model.trained_state().items() if t.grad is not None}


def cases_for(spec, n=5):
    images, present = images_for(SPECS[spec], batch=n), torch.ones(n, 2, dtype=torch.bool)
    present[1] = torch.tensor([True, False])
    present[2] = torch.tensor([False, True])
    images *= present[:, :, None, None, None]
    region = torch.zeros(n, *images.shape[2:], dtype=torch.uint8)
    region[:3, :, : images.shape[3] // 2] = 1
    whole = {"data": images, "present": present, "tabular": torch.randn(n, 2), "region": region}
    return whole, [{name: values[i : i + 1] for name, values in whole.items()} for i in range(n)]


class TestCaseByCase:
    @pytest.mark.parametrize("spec, kind", [("strided", "cox"), ("strided", "deephit"), ("tokens", "mtlr")])
    def test_the_gradients_are_those_of_one_pass(self, spec, kind, tmp_path):
        survival = SURVIVAL_LOSSES[kind](EDGES)
        model = prognosis_model(spec, outputs=survival.outputs(EDGES)).double().train()
        disturb(model)
        whole, cases = cases_for(spec)
        for batch in (whole, *cases):
            batch |= {"data": batch["data"].double(), "tabular": batch["tabular"].double()}
        days, event = torch.tensor([50.0, 150, 150, 300, 500]), torch.tensor([1.0, 1, 0, 1, 0])

        def loss(logits):
            return survival(logits.double(), days, event)

        settings = run(tmp_path)
        expected = loss(case_logits(model, whole, True, settings))
        expected.backward()
        wanted = gradients(model)
        model.zero_grad(set_to_none=True)
        value = backward_by_case(lambda case: case_logits(model, case, True, settings), cases, loss)
        found = gradients(model)
        torch.testing.assert_close(value, expected.detach(), atol=1e-6, rtol=1e-6)
        assert found.keys() == wanted.keys() and any("adapter" in name and g.any() for name, g in wanted.items())
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)

    def test_a_scaled_loss_gives_scaled_gradients_and_one_case_is_enough(self):
        weight = torch.nn.Parameter(torch.tensor([[2.0]]))
        value = backward_by_case(lambda x: x @ weight, [torch.ones(1, 1)], lambda y: y.square().sum(), lambda v: 8 * v)
        assert value == 4 and weight.grad == 32 and not value.requires_grad

    def test_half_precision_leaves_no_gradient_out(self, tmp_path):
        """Weights cast without a graph, and kept, would have none in the second pass."""
        model = prognosis_model().train()
        disturb(model)
        _, cases = cases_for("strided")
        settings = run(tmp_path, precision=torch.bfloat16)
        backward_by_case(lambda case: case_logits(model, case, True, settings), cases, lambda y: y.square().sum())
        learning = [name for name, tensor in model.trained_state().items() if tensor.requires_grad]
        assert gradients(model).keys() == set(learning)

    def test_only_one_case_has_a_graph_at_a_time(self, tmp_path):
        model = prognosis_model().train()
        kept, most = weakref.WeakSet(), []  # what graphs hold on to

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor

        def keep(tensor):
            held = Held(tensor)
            kept.add(held)
            return held

        def watched(case):
            before = len(kept)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
                logits = case_logits(model, case, True, run(tmp_path))
            most.append((before, len(kept) - before))
            return logits

        _, cases = cases_for("strided")
        backward_by_case(watched, cases, lambda logits: logits.square().sum())
        before, added = zip(*most, strict=True)
        assert before == (0,) * 9 and added[:4] == (0,) * 4 and min(added[4:]) > 50


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """32 cases; a bright region means an early event, the first column as well; a quarter is censored."""
    folder, generator = tmp_path_factory.mktemp("cases"), np.random.default_rng(0)
    targets, tabular, strata = {}, {}, {}
    for number in range(32):
        case_id, brightness, figure = f"case{number:02}", *generator.normal(size=2)
        image = generator.normal(scale=0.3, size=(2, *SHAPE)).astype(np.float32)
        mask = np.zeros(SHAPE, np.uint8)
        mask[0:4, 0:8, 0:8] = 1
        image[:, mask == 1] += brightness
        days = 300 * np.exp(-brightness - 0.7 * figure) * generator.exponential()
        censored = number % 4 == 0
        targets[case_id] = np.array([max(days * (0.5 if censored else 1), 1.0), not censored], np.float32)
        tabular[case_id] = np.array([figure, generator.normal()], np.float32)
        strata[case_id] = int(not censored)
        has_pet = number % 5 != 1
        image[1] *= has_pet
        meta = {"present": ["CT", "PET"][: 1 + has_pet], "foreground": {}}
        write_case(folder, case_id, image, mask if number % 7 else None, meta)
    plan = replace(make_plan(SHAPE, view="volume"), task_type="prognosis", labels=None, region="Dataset002_Tumour")
    return CaseData(folder, plan, targets, tabular, strata, region=True)


def concordance(model, data, settings):
    """Share of the comparable pairs in which the case with the earlier event has the higher risk."""
    risk = predict_cases(model, data, tuple(data.targets), settings)[:, 0].numpy()
    days, event = np.stack(list(data.targets.values())).T
    pairs = (days[:, None] < days) & (event[:, None] == 1)
    return ((risk[:, None] > risk) & pairs).sum() / pairs.sum()


class TestTraining:
    def test_it_begins_as_the_linear_model_and_learns_from_the_image(self, cohort, tmp_path):
        loss, settings = of_survival(SURVIVAL_LOSSES["cox"](EDGES)), run(tmp_path)
        ids = tuple(cohort.targets)
        model = prognosis_model(outputs=1, attention=0)
        begun = train_end_to_end(model, cohort, ids, loss, Schedule(1, None, learning_rate=0.0, accumulate=2), settings)
        assert begun.steps == 1
        linear = concordance(model, cohort, settings)
        before = {name: tensor.clone() for name, tensor in model.foundation.state_dict().items()}
        model = prognosis_model(outputs=1, attention=0)
        schedule = Schedule(40, None, learning_rate=1e-2, warmup_steps=3, modality_dropout=0.1, accumulate=8)
        result = train_end_to_end(model, cohort, ids, loss, schedule, run(tmp_path, fingerprint="b"))
        learned = concordance(model, cohort, settings)
        assert result.history[-1]["score"] is None and result.steps == 40
        assert 0.55 < linear < learned - 0.05, (linear, learned)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.foundation.state_dict().items())
        assert any(bool(up.any()) for up in model.adapter.up)

    def test_a_cut_run_goes_on_and_ends_with_the_same_weights(self, cohort, tmp_path, monkeypatch):
        loss, schedule = of_survival(SURVIVAL_LOSSES["mtlr"](EDGES)), Schedule(4, None, warmup_steps=1, accumulate=3)
        ids = tuple(cohort.targets)[:7]
        whole = prognosis_model(kind="fusion_ensemble", members=2)
        train_end_to_end(whole, cohort, ids, loss, schedule, run(tmp_path / "whole"))
        calls = []

        def cut(logits, targets):
            calls.append(logits)
            if len(logits) == 3 and sum(len(each) == 3 for each in calls) == 3:
                raise KeyboardInterrupt
            return loss(logits, targets)

        with pytest.raises(KeyboardInterrupt):
            model = prognosis_model(kind="fusion_ensemble", members=2)
            train_end_to_end(model, cohort, ids, cut, schedule, run(tmp_path / "cut"))
        again = prognosis_model(kind="fusion_ensemble", members=2)
        monkeypatch.setattr("unicon_pipeline.case_training._begin", lambda *_: pytest.fail("it had begun"))
        assert train_end_to_end(again, cohort, ids, loss, schedule, run(tmp_path / "cut")).steps == 4
        for name, tensor in whole.trained_state().items():
            assert torch.equal(tensor, again.trained_state()[name]), name

    def test_predictions_come_in_the_order_asked_for_and_need_no_target(self, cohort, tmp_path):
        model, settings = prognosis_model(), run(tmp_path)
        disturb(model)
        ids = ("case05", "case00", "case03")
        found = predict_cases(model, replace(cohort, targets={}), ids, settings)
        alone = torch.cat([predict_cases(model, cohort, (case_id,), settings) for case_id in ids])
        assert found.shape == (3, 3) and torch.equal(found, alone)
        without = predict_cases(model, replace(cohort, region=False), ids, settings)
        assert torch.equal(without[1], found[1]) and not torch.equal(without[0], found[0])  # case00 has no region

    def test_a_case_without_target_is_told(self, cohort, tmp_path):
        with pytest.raises(DatasetError, match="No targets for case01"):
            data = replace(cohort, targets={"case00": cohort.targets["case00"]})
            loss = of_survival(SURVIVAL_LOSSES["cox"](EDGES))
            model = prognosis_model(outputs=1)
            train_end_to_end(model, data, ("case00", "case01"), loss, Schedule(1, None), run(tmp_path))
