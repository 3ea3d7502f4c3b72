"""The training loop: budgets, schedule, resuming, and what it says when the loss is no number."""

import itertools
import time

import pytest
import torch

from unicon_pipeline.errors import UniconError
from unicon_pipeline.extension_plan import Schedule
from unicon_pipeline.training import Score, Trainer, drop_modalities


class Batches:
    """Stands in for the loader: the batch of a step is a function of the step."""

    def __init__(self, first_step=0, cut_at=None, seconds=0.0):
        self.steps, self.cut_at, self.seconds = itertools.count(first_step), cut_at, seconds

    def __next__(self):
        step = next(self.steps)
        if step == self.cut_at:
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        return {"x": torch.randn(8, 3, generator=torch.Generator().manual_seed(step)), "case_ids": ["a", "b"]}


def trainer(tmp_path, steps=20, minutes=None, fingerprint="same", poison=None):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3))
    rates = []

    def step_loss(batch):
        rates.append(made.optimizer.param_groups[0]["lr"])
        error = (batch["x"] @ weight - batch["x"].sum(1)).square().mean()
        return (error * float("nan") if batch["step"] == poison else error), torch.ones(2)

    made = Trainer(
        {"weight": weight}, step_loss, Score("share", lambda counts: float(counts[0] / counts[1])),
        Schedule(steps=steps, minutes=minutes, learning_rate=0.05, warmup_steps=4), torch.device("cpu"),
        torch.float32, tmp_path / "checkpoint.safetensors", fingerprint,
    )  # fmt: skip
    made.rates = rates
    return made


def test_the_rate_warms_up_then_falls_towards_zero_at_the_end(tmp_path):
    made = trainer(tmp_path)
    result = made.run(Batches())
    assert result.steps == 20 == len(made.rates)
    assert made.rates[:4] == sorted(made.rates[:4])
    assert made.rates[4:] == sorted(made.rates[4:], reverse=True)
    assert made.rates[-1] == pytest.approx(0.05 * (1 - 19 / 20) ** 0.9)
    assert result.history[-1]["step"] == 20


def test_a_score_that_is_undefined_is_none_and_no_nan_that_json_would_refuse(tmp_path):
    made = trainer(tmp_path, steps=3)
    real = made.step_loss
    made.step_loss = lambda batch: (real(batch)[0], torch.zeros(2))
    assert made.run(Batches()).history[-1]["score"] is None


def test_training_without_a_score_says_none(tmp_path):
    made = trainer(tmp_path, steps=3)
    made.score = None
    assert made.run(Batches()).history[-1]["score"] is None


def test_the_clock_ends_training_and_the_rate_follows_it(tmp_path):
    made = trainer(tmp_path, steps=10**6, minutes=0.5 / 60)
    started = time.monotonic()
    result = made.run(Batches(seconds=0.02))
    assert 0.4 < time.monotonic() - started < 5
    assert 2 <= result.steps <= 30
    assert made.rates[-1] < 0.6 * max(made.rates) or result.steps < 5


def test_a_cut_run_goes_on_and_ends_with_the_same_weights(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.run(Batches())
    cut = trainer(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        cut.run(Batches(cut_at=11))
    again = trainer(tmp_path / "cut")
    first_step = again.resume()
    assert first_step == 11
    result = again.run(Batches(first_step))
    assert result.steps == 20
    assert torch.equal(again.trained["weight"], whole.trained["weight"])


def test_a_finished_training_is_kept_until_its_result_is_written(tmp_path):
    finished = trainer(tmp_path)
    finished.run(Batches())
    again = trainer(tmp_path)
    assert again.resume() == 20
    assert again.run(Batches(cut_at=0)).steps == 20, "nothing is trained a second time"
    assert torch.equal(again.trained["weight"], finished.trained["weight"])


def test_a_checkpoint_of_another_plan_is_left_aside(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path).run(Batches(cut_at=5))
    other = trainer(tmp_path, fingerprint="other")
    assert other.resume() == 0
    assert "starts anew" in caplog.text


def test_a_loss_that_is_no_number_names_step_and_cases(tmp_path):
    with pytest.raises(UniconError, match=r"nan at step 3 \(cases a, b\).*--precision fp32"):
        trainer(tmp_path, poison=3).run(Batches())


def test_modality_dropout_keeps_at_least_one_and_zeroes_the_rest():
    data, present = torch.ones(64, 2, 1, 1, 1), torch.ones(64, 2, dtype=torch.bool)
    present[:8, 1] = False
    batch, again = (drop_modalities({"data": data, "present": present, "step": 4}, 0.5, seed=1) for _ in range(2))
    assert torch.equal(batch["present"], again["present"]), "a resumed run drops the same"
    assert batch["present"].any(dim=1).all()
    assert torch.equal(batch["data"][:, :, 0, 0, 0] > 0, batch["present"])
    assert batch["present"][:8].tolist() == [[True, False]] * 8
    both = batch["present"][8:].all(dim=1).float().mean()
    assert 0.3 < both < 0.7
    assert present[8:].all(), "the loader's own batch is left as it was"
