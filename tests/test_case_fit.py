"""Fitting a head on kept features: the same logits, the linear model first, nothing from the held-out cases."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_heads import skips_of
from test_model import SPECS, build, images_for
from torch.nn import functional

from unicon_pipeline.baselines import RidgeCox
from unicon_pipeline.case_fit import (
    CaseRows,
    ClassLoss,
    FeatureCache,
    FitOptions,
    Fitted,
    case_features,
    choose_epochs,
    fit_ensemble,
    fit_head,
    of_survival,
    predict_rows,
    stratified_batches,
)
from unicon_pipeline.case_head import FusionEnsemble, FusionHead
from unicon_pipeline.errors import PlanError
from unicon_pipeline.extension_plan import HeadPlan
from unicon_pipeline.foundation import freeze
from unicon_pipeline.losses import MultiLabelLoss

OPTIONS = {"columns": 4, "units": 6}


def task_model(name="anisotropic", **options):
    model = build(SPECS[name], adapter=None, head=HeadPlan("fusion", 3, {**OPTIONS, **options})).eval()
    for stem in model.stems.values():
        torch.nn.init.normal_(stem.gate)
        freeze(stem)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class TestFeatureCache:
    @pytest.mark.parametrize("attention", [0, 1])
    @pytest.mark.parametrize("name", ["anisotropic", "coarse", "tokens"])
    def test_kept_features_give_the_logits_of_the_whole_model(self, name, attention, tmp_path):
        model, rows = task_model(name, attention=attention), torch.randn(3, 4)
        images = images_for(SPECS[name], batch=3)
        present = torch.tensor([[True, True], [True, False], [False, True]])
        images *= present[:, :, None, None, None]
        region = torch.zeros(3, *images.shape[2:], dtype=torch.uint8)
        region[:2, : images.shape[2] // 2] = 1
        cache = FeatureCache(model, tmp_path)
        with torch.no_grad():
            expected = model(images, present, tabular_bd=rows, region_bzyx=region)
            for _ in range(2):  # computed, then read
                kept = [cache(*case) for case in zip(images, present, region, strict=True)]
                collated = CaseRows.collate(kept, rows, torch.zeros(3), torch.zeros(3))
                torch.testing.assert_close(predict_rows(model.head, collated), expected, atol=1e-6, rtol=1e-6)
        assert len(list(tmp_path.iterdir())) == 3
        assert set(kept[1]) == {"foundation", "foundation.prior"}

    def test_what_was_kept_is_found_by_content(self, tmp_path, monkeypatch):
        model = task_model()
        image, present = images_for(SPECS["anisotropic"])[0], torch.tensor([True, True])
        first = FeatureCache(model, tmp_path)(image, present)
        torch.nn.init.normal_(model.head.logits.weight)  # the head is learned: no part of the name
        with monkeypatch.context() as patch:
            patch.setattr(model, "features", lambda *_: pytest.fail("it was kept"))
            again = FeatureCache(model, tmp_path)(image, present)
        assert all(torch.equal(first[name], again[name]) for name in first)
        FeatureCache(model, tmp_path)(image, present, torch.ones(image.shape[1:]))
        FeatureCache(model, tmp_path)(image, torch.tensor([True, False]))
        FeatureCache(model, tmp_path)(image + 1e-6, present)
        with torch.no_grad():
            next(iter(model.foundation.parameters())).add_(1e-3)
        FeatureCache(model, tmp_path)(image, present)
        assert len(list(tmp_path.iterdir())) == 5

    def test_a_damaged_file_is_computed_again(self, tmp_path, caplog):
        model, image = task_model(), images_for(SPECS["anisotropic"])[0]
        first = FeatureCache(model, tmp_path)(image, torch.tensor([True, True]))
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:100])
        again = FeatureCache(model, tmp_path)(image, torch.tensor([True, True]))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert "computed again" in caplog.text

    def test_features_that_will_change_are_not_kept(self, tmp_path):
        model = build(SPECS["anisotropic"], head=HeadPlan("fusion", 3, OPTIONS))
        with pytest.raises(PlanError, match="only of a frozen encoder"):
            FeatureCache(model, tmp_path)


def test_maps_of_several_sizes_fit_together():
    model, present = task_model(), torch.tensor([True, True])
    images = [images_for(SPECS["anisotropic"], batch=1, multiple=m)[0] for m in ((1, 1, 2), (2, 2, 1))]
    found = [case_features(model, image, present) for image in images]
    rows = torch.randn(2, 4)
    together = CaseRows.collate(found, rows, torch.zeros(2), torch.zeros(2))
    for case in range(2):
        alone = CaseRows.collate(found[case : case + 1], rows[case : case + 1], torch.zeros(1), torch.zeros(1))
        torch.testing.assert_close(predict_rows(model.head, together)[case : case + 1], predict_rows(model.head, alone))


def breslow(logits, time_days, event):
    """Written for these times without ties; of the mean log likelihood, as the baselines'."""
    order = time_days.argsort(descending=True)
    score, event = logits[order, 0], event[order]
    return ((score.logcumsumexp(0) - score) * event).sum() / len(score)


def cohort(count, image=1.0, row=1.0, seed=0):
    """Log hazard = image latent + row's first column; kept features hold the latent, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    latent, mix, tabular = normal(count), normal(8), normal(count, 4)
    maps = latent[:, None] * mix + 0.5 * normal(count, 8)
    risk = image * latent + row * tabular[:, 0]
    days = 500.0 * torch.rand(count, generator=generator).log().neg() / risk.exp()
    censored = 1000.0 * torch.rand(count, generator=generator).log().neg()
    event = (days <= censored).float()
    targets = torch.stack([torch.minimum(days, censored), event], dim=1)
    tokens = {"foundation": maps[:, None], "foundation.prior": torch.zeros(count, 1)}
    return CaseRows(tokens, tabular, targets, event), risk


def head_of(outputs=1, columns=4):
    torch.manual_seed(0)
    return FusionHead(skips_of("coarse", {}), outputs, **{**OPTIONS, "columns": columns, "attention": 0})


def c_index(risk, targets):
    days, event = targets.T
    comparable = (days[:, None] < days) & (event[:, None] > 0)
    return float((risk[:, None] > risk)[comparable].float().mean())


class TestLinearPart:
    def test_epoch_0_is_the_ridge_cox_model(self):
        rows, _ = cohort(39)
        fitted = fit_head(head_of(), rows, of_survival(breslow), FitOptions(epochs=0), held_out=rows)
        days, event = rows.targets.numpy().T
        expected = RidgeCox.fit(rows.tabular.double().numpy(), days, event).risk(rows.tabular.numpy())
        found = fitted.logits[0, :, 0].numpy()
        np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=0.02)

    def test_epoch_0_is_the_ridge_logistic_model(self):
        rows, risk = cohort(80)
        findings = (risk > 0.3).float()[:, None]
        rows = CaseRows(rows.tokens, rows.tabular, findings, findings[:, 0])
        fitted = fit_head(head_of(), rows, MultiLabelLoss(), FitOptions(epochs=0), held_out=rows)
        x = rows.tabular.double().numpy()
        x = (x - x.mean(0)) / x.std(0)
        oracle = LogisticRegression(C=1 / (80 * 0.1), tol=1e-10).fit(x, findings[:, 0].numpy())
        np.testing.assert_allclose(fitted.logits[0, :, 0].numpy(), oracle.decision_function(x), atol=0.02)

    def test_without_a_row_it_is_the_constant(self):
        rows, risk = cohort(50)
        findings = (risk > 0.5).float()[:, None]
        rows = CaseRows(rows.tokens, None, findings, findings[:, 0])
        fitted = fit_head(head_of(columns=0), rows, MultiLabelLoss(), FitOptions(epochs=0), held_out=rows)
        rate = findings.mean().expand(50)
        torch.testing.assert_close(fitted.logits[0, :, 0].sigmoid(), rate, atol=0.005, rtol=0)


class TestFitting:
    def test_it_learns_what_the_image_adds(self):
        rows, risk = cohort(400)
        training, held = rows.take(range(200)), rows.take(range(200, 400))
        fitted = fit_head(head_of(), training, of_survival(breslow), FitOptions(epochs=60), held)
        reached = [c_index(logits[:, 0], held.targets) for logits in fitted.logits]
        oracle = c_index(risk[200:], held.targets)
        assert len(fitted.losses) == 61 and min(fitted.losses) < fitted.losses[0] - 0.05
        assert reached[0] < oracle - 0.1 and reached[choose_epochs([fitted])] > oracle - 0.05

    def test_an_ensemble_is_the_mean_of_its_members(self):
        rows, _ = cohort(60)
        torch.manual_seed(0)
        head = FusionEnsemble(skips_of("coarse", {}), 1, members=2, **OPTIONS, attention=0)
        state = fit_ensemble(head, rows, of_survival(breslow), FitOptions(epochs=3))
        one, two = (predict_rows(member, rows) for member in head.members)
        assert (one - two).abs().max() > 1e-3 and set(state) == set(head.state_dict())
        torch.testing.assert_close(predict_rows(head, rows), (one + two) / 2)

    @pytest.mark.parametrize("batch", [16, 64])
    def test_a_seed_gives_the_same_bits_and_held_out_cases_change_nothing(self, batch):
        rows, _ = cohort(60)
        training, held = rows.take(range(40)), rows.take(range(40, 60))
        options = FitOptions(epochs=3, batch=batch, part_dropout=0.3, seed=4)
        one, other, without = (
            fit_head(head_of(), training, of_survival(breslow), options, held_out).state
            for held_out in (held, held, None)
        )
        assert set(one) == set(head_of().state_dict())
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]) and torch.equal(tensor, without[name])

    def test_a_stem_may_be_missing_once_it_was_left_out_in_training(self):
        rows, _ = cohort(40)
        tokens = {"PET": rows.tokens["foundation"].clone(), "PET.prior": torch.zeros(40, 1), **rows.tokens}
        tokens["PET"][:5] = 0.0
        skips = skips_of("full resolution", {"PET": (((1, 1, 1), 8),)})
        head = FusionHead(skips, 1, **OPTIONS, attention=0)
        rows = CaseRows(tokens, rows.tabular, rows.targets, rows.strata)
        seen, fuse = [], head.fuse
        head.fuse = lambda tokens, row: seen.append(tokens) or fuse(tokens, row)
        fit_head(head, rows, of_survival(breslow), FitOptions(epochs=2, part_dropout=0.5))
        assert all(2 < (batch["PET"] != 0).flatten(1).any(1).sum() < 33 for batch in seen)
        assert all(batch["foundation"].all() for batch in seen)
        without = {name: values for name, values in tokens.items() if not name.startswith("PET")}
        absent = {**tokens, "PET": torch.zeros_like(tokens["PET"])}
        assert torch.equal(head.fuse(without, rows.tabular), head.fuse(absent, rows.tabular))
        assert torch.equal(tokens["PET"][5:], rows.tokens["PET"][5:]) and tokens["PET"][5:].all()  # not in place

    def test_without_events_the_fit_is_finite(self):
        rows, _ = cohort(20)
        rows.targets[:, 1] = 0.0
        fitted = fit_head(head_of(), rows, of_survival(breslow), FitOptions(epochs=2), rows)
        assert all(map(math.isfinite, fitted.losses))


@pytest.mark.parametrize("curves, epochs", [
    (((1.0, 0.5, 0.9), (1.0, 0.6, 0.9), (1.0, 1.1, 0.9)), 1),
    (((1.0, 1.2), (1.0, 1.1)), 0),
    (((1.0, 0.9, 0.8),), 2),
    (((1.0, 1.0),), 0),
])  # fmt: skip
def test_epochs_are_those_of_the_lowest_mean_loss(curves, epochs):
    assert choose_epochs([Fitted({}, curve, None) for curve in curves]) == epochs


@pytest.mark.parametrize("count, events, size", [(39, 14, 64), (100, 7, 16), (65, 5, 64), (33, 0, 8)])
def test_every_batch_has_its_share_of_events(count, events, size):
    strata = torch.zeros(count)
    strata[torch.randperm(count, generator=torch.Generator().manual_seed(1))[:events]] = 1.0
    generator = torch.Generator().manual_seed(0)
    batches, other = stratified_batches(strata, size, generator), stratified_batches(strata, size, generator)
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert max(map(len, batches)) <= size and max(map(len, batches)) - min(map(len, batches)) <= 1
    shares = [int(strata[batch].sum()) for batch in batches]
    assert max(shares) - min(shares) <= 2 and (events < 2 * len(batches) - 1 or min(shares) > 0)
    assert not all(torch.equal(one, two) for one, two in zip(batches, other, strict=True))


class TestClassLoss:
    classes = torch.tensor([0.0, 1.0, 1.0, math.nan, 1.0, 0.0, 1.0])
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))

    def test_classes_count_the_same_and_blanks_for_nothing(self):
        loss, known = ClassLoss.balanced(self.classes, 3), ~self.classes.isnan()
        assert loss.weights.tolist() == [1.0, 0.5, 1.0]
        logits = self.logits.clone().requires_grad_()
        value = loss(logits, self.classes)
        expected = functional.cross_entropy(self.logits[known], self.classes[known].long(), loss.weights)
        torch.testing.assert_close(value, expected)
        value.backward()
        assert not logits.grad[3].any() and logits.grad[0].any()

    def test_blanks_alone_are_a_loss_of_zero(self):
        assert ClassLoss(torch.ones(3))(self.logits, torch.full((7,), math.nan)) == 0
