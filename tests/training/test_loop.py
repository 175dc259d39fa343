"""The training loop on a network of one matrix: what is sampled, averaged, skipped, saved and resumed."""

from __future__ import annotations

import errno
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stable_diffusion.checkpoints import files
from stable_diffusion.errors import InputError
from stable_diffusion.training import loop
from stable_diffusion.training.compute import Computer
from stable_diffusion.training.draw import Draw, Samples
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.loop import MOST_SKIPPED, make_batches, train_stage
from stable_diffusion.training.pace import Pace
from stable_diffusion.training.stage import OptimizerSettings, Player, Stage, StageSettings
from tests.training.record import copied, differing

SETTINGS = StageSettings(kind="toy", batch_size=6, learning_rate=0.1, warmup_steps=2, ema_decay=0.5)
COUNT = 7  # samples; no multiple of the batch
SAMPLES = Samples(COUNT)


class Toy(Stage):
    """Learns a linear map; ``poisoned`` steps have NaN in their batch."""

    share = 1.0

    def __init__(
        self, settings: StageSettings = SETTINGS, poisoned: frozenset[int] = frozenset(), count: int = COUNT
    ) -> None:
        super().__init__(settings)
        self.samples = Samples(count)
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(6.0).view(2, 3) / 6)
            self.layer.bias.zero_()
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.poisoned = poisoned
        self.seen: list[int] = []
        self.history: list[dict[str, Tensor]] = []

    def batch(self, draw: Draw) -> tuple[Tensor, ...]:
        self.history.append(copied(self.state_dict()))
        indices = draw.indices(self.samples)
        self.seen += indices
        noise = draw.share(torch.randn(draw.batch_size, 3, generator=draw.generator()))
        x = torch.tensor(indices).float()[:, None] / COUNT + noise
        return (x * math.nan if draw.step in self.poisoned else x,)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        errors = (self.layer(x) * self.frozen - x[:, :2]).square().mean(dim=0)
        return {"first": errors[0] / 2, "second": errors[1] / 2}

    def prepare(self, workspace: object) -> Iterator[TrainStep]:
        yield from ()

    def example(self, count: int) -> tuple[Tensor, ...]:
        return (torch.ones(count, 3),)


def train(
    stage: Toy,
    path: Path,
    total: int = 20,
    pace: Pace | None = None,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Any:
    pace = pace or Pace(stage.settings, total)
    computer = Computer([stage])
    computer.process, computer.processes = process, processes
    return train_stage(stage, computer, pace=pace, seed=seed, path=path)


# What is sampled.


def draw(step: int, places: range = range(6), seed: int = 0, stage: str = "toy", batch_size: int = 6) -> Draw:
    return Draw(seed, stage, step, places, batch_size)


def test_every_sample_once_an_epoch_in_a_new_order_each_epoch() -> None:
    drawn = [index for step in range(70) for index in draw(step).indices(SAMPLES)]  # 420 = 60 epochs of 7
    epochs = [tuple(drawn[i : i + COUNT]) for i in range(0, len(drawn), COUNT)]
    assert all(sorted(one) == list(range(COUNT)) for one in epochs)
    assert len(set(epochs)) > 50


def test_a_set_smaller_than_the_batch_is_drawn_evenly() -> None:
    assert Counter(draw(0).indices(Samples(3))) == {0: 2, 1: 2, 2: 2}


def test_weights_are_shares_of_every_epoch() -> None:
    weights = (1.0, 0.5, 4.0, 1.0, 0.25, 2.0, 1.0)  # of 9.75
    samples = Samples(COUNT, weights)
    drawn = [index for step in range(70) for index in draw(step).indices(samples)]
    for one in (Counter(drawn[i : i + COUNT]) for i in range(0, len(drawn), COUNT)):
        assert all(abs(one[i] - COUNT * weight / 9.75) < 1 for i, weight in enumerate(weights))
    assert Counter(drawn)[4] == pytest.approx(420 * 0.25 / 9.75, abs=6), "at random, not always rounded down"


def noise(given: Draw) -> list[float]:
    return given.share(torch.rand(given.batch_size, generator=given.generator())).tolist()


def test_a_draw_is_a_function_of_seed_stage_and_step() -> None:
    assert draw(3).indices(SAMPLES) == draw(3).indices(Samples(COUNT)) and noise(draw(3)) == noise(draw(3))
    many = Samples(1000)
    for other in (draw(4), draw(3, seed=1), draw(3, stage="other")):
        assert other.indices(many) != draw(3).indices(many)
        assert not set(noise(other)) & set(noise(draw(3)))
    assert len(set(noise(draw(3)))) == 6, "each place has noise of its own"


def test_processes_share_a_batch() -> None:
    whole, even, odd = draw(5), draw(5, range(0, 6, 2)), draw(5, range(1, 6, 2))
    for read in (noise, lambda given: given.indices(SAMPLES)):
        assert read(whole)[::2] == read(even) and read(whole)[1::2] == read(odd)


def test_the_global_generators_say_nothing(tmp_path: Path) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        stage = Toy()
        results.append(
            ([step.loss for step in train(stage, tmp_path / f"{seed}.safetensors")], stage.state_dict())
        )
    assert results[0][0] == results[1][0] and not differing(results[0][1], results[1][1])
    other = Toy()
    assert [step.loss for step in train(other, tmp_path / "other", seed=1)] != results[0][0]


def test_batches_made_ahead_are_those_made_in_turn() -> None:
    draws = [draw(step) for step in range(9)]
    in_turn = list(make_batches(Toy(), draws, threads=0))
    ahead = list(make_batches(Toy(), draws, threads=4))
    assert len(ahead) == 9 and all(
        torch.equal(*pair) for a, b in zip(in_turn, ahead, strict=True) for pair in zip(a, b, strict=True)
    )


def test_making_ahead_ends_with_training_and_tells_its_error() -> None:
    stage = Toy()
    batches = make_batches(stage, (draw(step) for step in range(1000)), threads=2)
    next(batches)
    batches.close()
    assert len(stage.seen) < 6 * 10
    for threads in (0, 2):
        with pytest.raises(ZeroDivisionError):  # there is none to take
            list(make_batches(Toy(count=0), [draw(0)], threads))


# How it steps.


def test_the_rate_warms_up_stays_and_falls_to_nothing() -> None:
    settings = replace(SETTINGS, learning_rate=1.0, warmup_steps=4)
    rates = [settings.rate(step, 100) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and set(rates[4:60]) == {1.0}
    assert rates[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])
    assert settings.rate(0, 5) > 0, "a short run has no warm-up that eats it"


def test_the_planned_rate_is_the_used_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: object) -> object:
        used.append({group["lr"] for group in self.param_groups})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    shown = [event.learning_rate for event in train(Toy(), tmp_path / "c")]
    assert shown == [SETTINGS.rate(step, 20) for step in range(20)]
    assert used == [{rate} for rate in shown]


def test_the_first_step_is_adam_with_decay_of_matrices_only(tmp_path: Path) -> None:
    stage = Toy(replace(SETTINGS, ema_decay=0.0, weight_decay=0.5, max_grad_norm=1e9))
    before = copied(stage.state_dict())
    gradients = torch.autograd.grad(
        sum(stage(*stage.batch(draw(0))).values()), [stage.layer.weight, stage.layer.bias]
    )
    list(train(stage, tmp_path / "c", total=1))
    rate = stage.settings.rate(0, 1)
    for name, gradient, decay in zip(("layer.weight", "layer.bias"), gradients, (0.5, 0.0), strict=True):
        # Adam's first step has the size of the rate, whatever the gradient (Kingma & Ba 2014, section 2.1).
        expected = before[name] * (1 - rate * decay) - rate * gradient.sign()
        torch.testing.assert_close(stage.state_dict()[name], expected, rtol=0, atol=1e-5)
    assert torch.equal(stage.frozen, torch.ones(2))


def test_it_learns(tmp_path: Path) -> None:
    losses = [step.loss for step in train(Toy(), tmp_path / "c", total=200)]
    assert sum(filter(None, losses[-20:])) < 0.1 * sum(filter(None, losses[:20]))


def test_the_average_warms_up_and_is_what_remains(tmp_path: Path) -> None:
    stage = Toy(replace(SETTINGS, ema_decay=0.3))
    list(train(stage, tmp_path / "c", total=6))
    raw = load_file(tmp_path / "c")
    averages = stage.history[0]["layer.weight"].double()
    after = [*[state["layer.weight"] for state in stage.history[1:]], raw["weights.layer.weight"]]
    for step, weight in enumerate(after):
        decay = min(0.3, (1 + step) / (10 + step))
        averages = decay * averages + (1 - decay) * weight.double()
    torch.testing.assert_close(stage.layer.weight.detach().double(), averages, rtol=0, atol=1e-6)
    assert torch.equal(stage.layer.weight, raw["average.layer.weight"])
    assert not torch.allclose(stage.layer.weight, raw["weights.layer.weight"], atol=1e-6)
    assert (1 + 2) / (10 + 2) < 0.3 < (1 + 3) / (10 + 3), "six steps test both branches"


# Not finite.


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    stage = Toy(poisoned=frozenset({4, 9, 10}))
    steps = list(train(stage, tmp_path / "c"))
    assert [step.skipped for step in steps] == [0] * 4 + [1] * 5 + [2] + [3] * 10
    assert math.isnan(steps[4].loss or 0) and "3 skipped" in str(steps[-1])
    changed = [bool(differing(a, b)) for a, b in zip(stage.history, stage.history[1:], strict=False)]
    assert [i for i, change in enumerate(changed) if not change] == [4, 9, 10]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "c").values())


def test_a_skipped_step_leaves_the_average_alone(tmp_path: Path) -> None:
    stages = []
    for poisoned in (frozenset({19}), frozenset()):
        stage = Toy(poisoned=poisoned)
        steps = train(stage, tmp_path / str(len(poisoned)))
        for step in steps:
            if step.index == (19 if poisoned else 18):
                steps.close()  # type: ignore[attr-defined]
        stages.append(load_file(tmp_path / str(len(poisoned))))
    assert not differing(stages[0], stages[1])


def test_twenty_in_a_row_are_the_end_and_the_last_good_state_stays(tmp_path: Path) -> None:
    path = tmp_path / "c"
    steps = train(Toy(), path, total=60)
    for step in steps:
        if step.index == 9:
            steps.close()  # type: ignore[attr-defined]
    good = path.read_bytes()
    stage = Toy(poisoned=frozenset(range(20, 60)))
    seen = []
    with pytest.raises(InputError, match=r"^toy: .* 20 times in a row at step 40; lower the learning rate"):
        for step in train(stage, path, total=60):
            seen.append(step.index)
    assert MOST_SKIPPED == 20 and seen == list(range(10, 39))
    assert path.read_bytes() == good


def test_nineteen_in_a_row_are_not(tmp_path: Path) -> None:
    bad = frozenset([*range(5, 24), *range(25, 44)])
    assert list(train(Toy(poisoned=bad), tmp_path / "c", total=50))[-1].skipped == 38


# Saved and resumed.


@pytest.mark.parametrize("stopped", [0, 9, 18])
def test_resuming_is_exact(tmp_path: Path, stopped: int) -> None:
    straight = Toy(poisoned=frozenset({3}))
    expected = [
        (step.index, step.loss, step.learning_rate, step.skipped) for step in train(straight, tmp_path / "a")
    ]
    first, second = Toy(poisoned=frozenset({3})), Toy(poisoned=frozenset({3}))
    with torch.no_grad():
        second.layer.weight.fill_(99.0)  # the checkpoint decides
    events = []
    steps = train(first, tmp_path / "b")
    for step in steps:
        events.append(step)
        if step.index == stopped:
            steps.close()  # type: ignore[attr-defined]
    events += train(second, tmp_path / "b")
    assert repr([(e.index, e.loss, e.learning_rate, e.skipped) for e in events]) == repr(expected)
    assert not differing(second.state_dict(), straight.state_dict())
    assert not differing(load_file(tmp_path / "b"), load_file(tmp_path / "a"))
    kinds = Counter(name.split(".")[0] for name in load_file(tmp_path / "a"))
    assert kinds == {"weights": 2, "average": 2, "optimizer": 6}, "moments and step counts are kept"
    with safe_open(tmp_path / "a", "pt") as a, safe_open(tmp_path / "b", "pt") as b:
        counts = {"step": "20", "skipped": "1", "scale": "1.0"}
        assert a.metadata() == b.metadata() == {"format": "pt", **counts}


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    stage = Toy()
    list(train(stage, tmp_path / "c"))
    again = Toy()
    assert list(train(again, tmp_path / "c")) == [] and again.seen == []
    assert not differing(again.state_dict(), stage.state_dict())


def test_it_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    for step in train(Toy(), tmp_path / "c"):
        assert (tmp_path / "c").exists() is (step.index > 0)
        if step.index:  # the step before this one: who hears of a step writes it down first
            with safe_open(tmp_path / "c", "pt") as file:
                assert file.metadata()["step"] == str(step.index)


def test_other_processes_do_not_write(tmp_path: Path) -> None:
    list(train(Toy(), tmp_path / "c", process=1, processes=2))
    assert not list(tmp_path.iterdir())


def test_a_save_that_is_interrupted_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy.safetensors"
    list(train(Toy(), path, total=10))
    old = path.read_bytes()

    def half(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        assert Path(file) != path, "it must not write into the checkpoint itself"
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(InputError, match="no space"):
        list(train(Toy(), path, total=20))
    assert path.read_bytes() == old
    monkeypatch.undo()
    assert [step.index for step in train(Toy(), path, total=20)] == list(range(10, 20))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_mode_is_evaluation_again_however_it_ends(tmp_path: Path) -> None:
    stage = Toy()
    steps = train(stage, tmp_path / "c")
    next(steps)
    assert stage.training
    steps.close()  # type: ignore[attr-defined]
    assert not stage.training


# Parts of a batch.


@pytest.mark.parametrize("parts", [2, 4, 6])
def test_micro_batches_are_the_batch_up_to_rounding(tmp_path: Path, parts: int) -> None:
    """Four do not divide six: parts count by their size."""
    whole, split = Toy(), Toy(replace(SETTINGS, gradient_accumulation_steps=parts))
    expected, found = list(train(whole, tmp_path / "a")), list(train(split, tmp_path / "b"))
    assert sorted(whole.seen) == sorted(split.seen)
    for a, b in zip(expected, found, strict=True):
        assert b.losses == pytest.approx(a.losses, rel=1e-4) and a.learning_rates == b.learning_rates
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_each_player_has_its_rate_its_clip_and_its_average(tmp_path: Path) -> None:
    slow = OptimizerSettings(learning_rate=0.01, schedule="constant", warmup_steps=0, max_grad_norm=1e-12)

    class Two(Toy):
        def players(self) -> dict[str, Player]:
            return {
                "matrix": Player(self.settings, {"layer.weight": self.layer.weight}, 0.5),
                "bias": Player(slow, {"layer.bias": self.layer.bias}, None),
            }

    stage = Two()
    steps = list(train(stage, tmp_path / "c"))
    assert [step.learning_rates["bias"] for step in steps] == [0.01] * 20
    assert [step.learning_rate for step in steps] == [SETTINGS.rate(i, 20) for i in range(20)]
    kept = load_file(tmp_path / "c")
    assert "average.layer.bias" not in kept and "average.layer.weight" in kept
    assert torch.equal(stage.layer.bias, kept["weights.layer.bias"])
    # Clipped to next to nothing, its moments are too; Adam's eps then makes small steps of it.
    assert kept["optimizer.exp_avg.layer.bias"].abs().max() < 1e-11
    assert kept["optimizer.exp_avg.layer.weight"].abs().max() > 1e-6


def test_orders_are_hashed_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    order = Samples._order
    monkeypatch.setattr(Samples, "_order", lambda self, *key: calls.append(key) or order(self, *key))
    samples = Samples(1000, [1.0] * 1000)
    for step in range(300):  # of 6: 1.8 epochs
        draw(step).indices(samples)
    assert calls == [(0, "toy", 0), (0, "toy", 1)]
