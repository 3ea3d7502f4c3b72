"""Reduced precision: measured against float32, kept on the card, used only where the card speaks for it."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from test_prepare import plan as data_plan

from unicon_pipeline import evidence
from unicon_pipeline.contract import InputContract
from unicon_pipeline.evidence import (
    FastEvidence,
    PrecisionEvidence,
    fast_window,
    measure_shortcuts,
    trusted_precision,
)

CPU = torch.device("cpu")
PLAN = dataclasses.replace(data_plan((1.0, 1.0, 1.0), shape=(16, 16, 16)), modalities=("CT", "PET"))


CONTRACT = InputContract(("CT", "PET"), None, None, None, (8, 8, 8), {})


class Threshold(torch.nn.Module):
    """Three channels: 0, the first image, the second; in bfloat16 the images are rounded."""

    def forward(self, images, present):
        if torch.is_autocast_enabled("cpu"):
            images = images.bfloat16().float()
        return [torch.cat((torch.zeros_like(images[:, :1]), images - 0.5), dim=1)]


@pytest.fixture
def bfloat16(monkeypatch):
    monkeypatch.setattr(evidence, "choose_precision", lambda name, device: torch.bfloat16)


def measured(arrays):
    return measure_shortcuts(Threshold(), PLAN, CONTRACT, ((array, (True, True)) for array in arrays), CPU)


def test_dice_and_changed_voxels_are_those_of_the_labels(bfloat16):
    array = np.zeros((2, 16, 16, 20), np.float32)
    array[0, :4], array[1, 8:12] = 0.9, 0.8
    array[0, 5, 0, :10] = 0.5009  # rounds to 0.5 and is lost
    found = measured([array])["reduced_precision"]
    labelled = 8 * 16 * 20
    assert found["precision"] == "bfloat16"
    assert found["dice"] == [round(2 * labelled / (2 * labelled + 10), 6)]
    assert found["changed"] == pytest.approx(10 / array[0].size)


def test_the_first_cases_count_and_those_without_a_finding_do_not(bfloat16):
    array = np.zeros((2, 16, 16, 16), np.float32)
    array[0, :4] = 0.9
    card = measured([array, np.zeros_like(array), array, np.full_like(array, np.nan)])
    assert card["reduced_precision"]["dice"] == [1.0, 1.0]


@pytest.mark.parametrize(
    "card, expected",
    [
        ({}, torch.float32),
        ({"precision": "bfloat16", "dice": [0.999, 0.996], "changed": 0.0}, torch.bfloat16),
        ({"precision": "bfloat16", "dice": [0.999, 0.99], "changed": 0.0}, torch.float32),
        ({"precision": "bfloat16", "dice": [], "changed": 0.0}, torch.float32),
        ({"precision": "float16", "dice": [1.0], "changed": 0.0}, torch.float32),
    ],
)
def test_only_what_was_measured_well_is_trusted(card, expected, bfloat16):
    assert trusted_precision({"reduced_precision": card} if card else {}, CPU) is expected


def test_no_evidence_where_there_is_no_reduced_precision(monkeypatch):
    monkeypatch.setattr(evidence, "choose_precision", lambda name, device: torch.float32)
    assert measured([np.zeros((2, 16, 16, 16), np.float32)]) .keys() <= {"fast"}
    card = {"reduced_precision": {"precision": "bfloat16", "dice": [1.0], "changed": 0.0}}
    assert trusted_precision(card, CPU) is torch.float32


def test_what_people_are_told():
    assert "lowest Dice 0.9970" in evidence._described(PrecisionEvidence("bfloat16", (0.999, 0.997), 0.001))
    assert "only when asked for" in evidence._described(PrecisionEvidence("bfloat16", (0.9,), 0.01))
    assert "nothing was found" in evidence._described(PrecisionEvidence("bfloat16", (), 0.0))


class Slow(torch.nn.Module):
    """Finds what `Threshold` finds, but in a tile's outer voxels, where the usual window hardly looks."""

    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def forward(self, images, present):
        time.sleep(0.002)
        (logits,) = Threshold()(images, present)
        if self.margin:
            logits[:, 1:, :, :, : self.margin] = -1.0
        return [logits]


def fast(network):
    array = np.zeros((2, 16, 16, 48), np.float32)
    array[0, :, :, 8:40] = 0.9
    return fast_window(measure_shortcuts(network, PLAN, CONTRACT, [(array, (True, True))], CPU))


def test_the_fastest_window_that_finds_the_same_is_kept():
    found = fast(Slow(margin=0))
    assert found.dice == (1.0,) and found.times_faster > 1 and (found.step, found.tile_zyx) != (0.5, (16, 16, 16))


def test_a_network_that_needs_the_overlap_keeps_it():
    assert fast(Slow(margin=7)) is None
    assert fast_window({}) is None
    card = {"fast": {"tile_zyx": [8, 8, 8], "step": 0.75, "dice": [0.99], "times_faster": 3.0}}
    assert fast_window(card) == FastEvidence((8, 8, 8), 0.75, (0.99,), 3.0)
