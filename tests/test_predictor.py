"""The wanted tasks on one case: what is shared, what many classes cost, and air that is left out."""

import dataclasses

import numpy as np
import torch

from unicon_pipeline.dataset import prediction_cases
from unicon_pipeline.geometry import Volume
from unicon_pipeline.intensity import read_in_units
from unicon_pipeline.model_folder import ModelFolder
from unicon_pipeline.predictor import Options, Predictor, WantedTasks, as_one_layer

FP32 = Options("cpu", "fp32")


def images(grown):
    return read_in_units(prediction_cases(grown.raw("CTPET") / "imagesTr", {0: "CT", 1: "PET"})[0])


def predicted(predictor, volumes, folder=None):
    tasks = predictor.tasks
    return {r.run.task: r for r in predictor.predict(dict(volumes), tasks, lambda task: folder and folder / task)}


def test_tasks_that_see_a_case_alike_are_prepared_together(grown):
    wanted = WantedTasks(ModelFolder(grown.model), None)
    assert wanted.alike() == [("CT",), ("CTPET",)]
    wanted.plans["again"] = wanted.plans["CT"]
    assert wanted.alike() == [("CT", "again"), ("CTPET",)]


def test_the_last_layer_after_resizing_gives_the_same_labels(grown, monkeypatch):
    volumes, usual = images(grown), Predictor(ModelFolder(grown.model), ["CT"], FP32)
    expected = predicted(usual, volumes)["CT"].labels.array_zyx
    model = ModelFolder(grown.model)
    late = Predictor(model, ["CT"], FP32)
    network = model.task_model("CT", model.foundation()).merged()
    late._last_layers["CT"] = as_one_layer(network.last_layers())
    late._networks["CT"].drop_last_layers()
    found = predicted(late, volumes)["CT"].labels.array_zyx
    assert expected.any() and (found == expected).mean() > 0.9999


def test_air_is_left_out_and_no_label_in_the_body_changes(grown):
    volumes = images(grown)
    for name, volume in volumes.items():  # air all around, as much as two patches
        padded = np.pad(volume.array_zyx, ((0, 0), (0, 0), (80, 0)), constant_values=-1000 if name == "CT" else 0)
        volumes[name] = Volume(padded, dataclasses.replace(volume.grid, shape_zyx=padded.shape))
    model = ModelFolder(grown.model)
    runs = {}
    for everything in (True, False):
        predictor = Predictor(model, ["CT"], Options("cpu", "fp32", compute_air=everything))
        plan = predictor.plans["CT"]  # that crops the air beforehand
        whole = dataclasses.replace(plan.conventions, crop="none")
        predictor.plans["CT"] = dataclasses.replace(plan, conventions=whole)
        runs[everything] = predicted(predictor, volumes)["CT"]
    assert runs[True].run.air_tiles == 0 < runs[False].run.air_tiles
    assert runs[True].run.tiles == runs[False].run.tiles + runs[False].run.air_tiles
    body = volumes["CT"].array_zyx > -600
    assert np.array_equal(runs[True].labels.array_zyx[body], runs[False].labels.array_zyx[body])


def test_auto_is_float32_without_evidence(grown, monkeypatch):
    monkeypatch.setattr(ModelFolder, "card", lambda self, task: {})
    predictor = Predictor(ModelFolder(grown.model), None, Options("cpu"))
    assert set(predictor.precisions.values()) == {torch.float32}
    assert predictor.arithmetic().precision == "float32"


def test_fast_takes_the_cards_window_and_says_where_there_is_none(grown, monkeypatch, caplog):
    card = {"fast": {"tile_zyx": [32, 32, 32], "step": 0.75, "dice": [0.999], "times_faster": 2.0}}
    monkeypatch.setattr(ModelFolder, "card", lambda self, task: card if task == "CT" else {})
    predictor = Predictor(ModelFolder(grown.model), None, Options("cpu", fast=True))
    assert (predictor._windows["CT"].tile_zyx, predictor._windows["CT"].step) == ((32, 32, 32), 0.75)
    assert predictor._windows["CTPET"].step == 0.5
    assert "CTPET: its card knows no faster way" in caplog.text
