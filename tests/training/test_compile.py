"""The project's sample, and what ``torch.compile`` leaves working."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from stable_diffusion import DiffusionModel, cli, config
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.training import record, run
from stable_diffusion.training.compute import Computer
from stable_diffusion.training.events import Plan, TrainStep
from stable_diffusion.training.stages.autoencoder import AutoencoderStage
from stable_diffusion.training.stages.denoiser import DenoiserStage
from tests.test_cli import RECIPE
from tests.test_readme import snippet
from tests.tiny import STAGES, TINY, coco_test2017, tiny_model
from tests.training.record import differing
from tests.training.test_train import Empty

SAMPLE = snippet("m.train(")
"""The training snippet of README.md, as it stands there."""

WRAPPER = torch._dynamo.eval_frame.OptimizedModule


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Dynamo cannot trace the checks of shapes.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    monkeypatch.setitem(record.PAYS, "cpu", 0.0)  # tiny stages take no minutes
    monkeypatch.setattr(record, "LONG", 0)
    yield
    torch._dynamo.reset()


class Backend:
    """Runs graphs as they are, and counts them and their calls."""

    def __init__(self) -> None:
        self.graphs = 0
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def call(*arguments: Any) -> Any:
            self.calls += 1
            return graph.forward(*arguments)

        return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the sample's pictures, and a small ``mini`` that trains for 3 steps a stage."""
    coco_test2017(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.PRESETS, "mini", replace(TINY, name="mini"))
    monkeypatch.setattr(run, "DEFAULT", STAGES)
    return tmp_path


def check_sample(names: dict[str, Any]) -> None:
    """What the README promises of the sample's result."""
    state, wrapper = names["state_dict"], names["m"]
    assert isinstance(wrapper, WRAPPER)
    assert not [name for name in state if name.startswith("_orig_mod.")]
    fresh = DiffusionModel()
    assert differing(fresh.state_dict(), state)
    fresh.load_state_dict(state)  # strict
    assert differing(fresh.state_dict(), state) == []
    assert differing(wrapper.state_dict(), state) == []
    assert Path("runs/mini/model/config.json").is_file()


def test_the_sample_verbatim(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the compiler, which takes minutes: graphs run as they are."""
    backend, compile_ = Backend(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=backend))
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*16 bits")
        exec(SAMPLE, names)
    check_sample(names)
    assert (
        backend.graphs >= 2 and backend.calls >= 6
    )  # of each stage 3 steps; each runs all graphs of its stage


def test_the_command_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler sees both stages of ``minisd train --compile``, and no model."""
    backend, compile_ = Backend(), torch.compile

    def compiler(module: torch.nn.Module) -> Any:
        assert not isinstance(module, DiffusionModel)
        return compile_(module, backend=backend)

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.chdir(tmp_path)
    Path("smallest.toml").write_text(RECIPE, encoding="utf-8")
    cli.main(["train", "smallest.toml", "--steps", "1", "--no-autocast", "--device", "cpu", "--compile"])
    assert backend.graphs >= 2 and backend.calls >= 2  # a step of each stage


def test_main_says_the_same() -> None:
    """``main.py`` is the sample with its folders as arguments."""
    script = (Path(__file__).parents[2] / "main.py").read_text(encoding="utf-8")
    for line in ("torch.set_float32_matmul_precision", "model = torch.compile(model)", "autocast=True"):
        assert line in script


def test_every_step_runs_compiled(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is one graph, whose Python does not run again, and the weights are those of eager training."""
    monkeypatch.setattr(Computer, "measure", lambda *_: 1.0)
    eager: Counter[str] = Counter()
    for stage in (AutoencoderStage, DenoiserStage):
        forward = stage.forward

        def counted(self: Any, *batch: Any, forward: Any = forward) -> Any:
            if not torch.compiler.is_compiling():
                eager[self.settings.name] += 1
            return forward(self, *batch)

        monkeypatch.setattr(stage, "forward", counted)
    backend, calls = Backend(), []

    def count(event: object) -> None:
        if isinstance(event, TrainStep) and event.loss is not None:
            calls.append(backend.calls)

    model = torch.compile(tiny_model(), backend=backend)
    state = model.train(
        data, STAGES, output_dir=tmp_path / "compiled", steps=4, callback=count, return_state_dict=True
    )
    assert calls == list(range(1, 9)) and backend.graphs == 2, "one graph a stage, called once a step"
    assert not eager
    plain = tiny_model().train(data, STAGES, output_dir=tmp_path / "eager", steps=4, return_state_dict=True)
    assert eager == {"autoencoder": 4, "denoiser": 4} and plain.keys() == state.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], state[name], rtol=1e-3, atol=1e-4)


def test_what_compiling_costs_is_said_before_it_is_paid_and_left_out_where_it_does_not_pay(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three steps of 200 seconds, three of 199, four on a busy machine; a run that goes on computes as it began."""
    monkeypatch.setitem(record.PAYS, "cpu", 600.0)
    seconds = {"autoencoder": 199.0, "denoiser": 200.0}
    monkeypatch.setattr(Computer, "measure", lambda _, stage: seconds[stage.settings.name])
    backend, lines = Backend(), []

    def train(**settings: Any) -> None:
        model = torch.compile(tiny_model(), backend=backend)
        model.train(data, STAGES, output_dir=tmp_path, observers=[observe], **settings)

    def observe(event: object) -> bool:
        if isinstance(event, Plan):
            lines.append(str(event))
            assert backend.graphs == 0 or len(lines) > 1
        return isinstance(event, TrainStep) and event.stage == "denoiser" and event.index == len(lines) - 1

    train(steps=3)
    assert backend.graphs == 1 and backend.calls == 1, "the denoiser's first step"
    assert lines[0].endswith("after reading the data and minutes of compiling (denoiser)")
    monkeypatch.setitem(record.PAYS, "cpu", 1e9)
    train()
    assert backend.calls == 2 and lines[1] == lines[0]
    monkeypatch.setitem(record.PAYS, "cpu", 600.0)
    monkeypatch.setattr(record, "LONG", 5)
    train(steps=4)
    assert backend.calls == 2
    assert lines[2].endswith("; not compiled, which takes minutes and pays only in longer stages")


def test_the_wrapper_goes_on_working(tmp_path: Path) -> None:
    inner = tiny_model()
    wrapper = torch.compile(inner, backend=Backend())
    assert (
        wrapper.train() is wrapper and inner.training and inner.unet.mid_block.training and wrapper.training
    )
    assert (
        wrapper.eval() is wrapper and not inner.training and not inner.vae.training and not wrapper.training
    )
    assert wrapper.train(True) is wrapper and inner.vae.training
    assert wrapper.train(False) is wrapper and not inner.unet.training
    assert wrapper.state_dict().keys() == inner.state_dict().keys()
    other = tiny_model(seed=1).state_dict()
    wrapper.load_state_dict(other)
    assert differing(inner.state_dict(), other) == []
    assert wrapper.to("cpu") is not None and wrapper.config is inner.config
    (picture,) = wrapper.generate("a red circle", seed=1)
    assert picture.tobytes() == inner.generate("a red circle", seed=1)[0].tobytes()
    wrapper.save_pretrained(tmp_path / "model")
    assert differing(DiffusionModel.from_pretrained(tmp_path / "model").state_dict(), other) == []


def test_other_modules_wrappers_are_left_alone() -> None:
    wrapper = torch.compile(torch.nn.Linear(2, 2), backend=Backend())
    assert list(wrapper.state_dict()) == ["_orig_mod.weight", "_orig_mod.bias"]
    assert "train" not in vars(wrapper)


@pytest.mark.parametrize("reason", ["the linker is missing\nand more", ""])
def test_where_compiling_fails_it_trains_uncompiled_after_one_warning(
    tmp_path: Path, data: CocoImageLoader, reason: str
) -> None:
    attempts = []

    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        attempts.append(graph)
        raise RuntimeError(reason)

    expected = tiny_model().train(
        data, STAGES, output_dir=tmp_path / "eager", steps=3, return_state_dict=True
    )
    model = torch.compile(tiny_model(), backend=broken)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        state = model.train(data, STAGES, output_dir=tmp_path / "broken", steps=3, return_state_dict=True)
    messages = [str(w.message) for w in seen if "uncompiled" in str(w.message)]
    cause = "the linker is missing" if reason else "RuntimeError"
    assert messages == [f"training runs uncompiled, since torch.compile failed here: {cause}"]
    assert len(attempts) == 1 and differing(state, expected) == []


def test_errors_of_the_data_are_not_taken_for_the_compilers(tmp_path: Path) -> None:
    from stable_diffusion import InputError

    with pytest.raises(InputError, match="the set is empty"):
        torch.compile(tiny_model(), backend=Backend()).train(Empty(), output_dir=tmp_path)


# With the real compiler, in a process of its own.


def script(tmp_path: Path, text: str, **environment: str) -> str:
    """What a script prints that runs in a folder with the sample's pictures."""
    root = Path(__file__).parents[2]
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "PATH", "HOME")}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=kept
        | {
            "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        }
        | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "PYTHONWARNINGS": "always"}
        | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems find compilers elsewhere")
def test_without_a_cpp_compiler(tmp_path: Path) -> None:
    coco_test2017(tmp_path)
    text = """
    from dataclasses import replace
    import torch
    from stable_diffusion import CocoImageLoader
    from stable_diffusion.training import record
    from tests.tiny import STAGES, tiny_model
    record.PAYS["cpu"], record.LONG = 0.0, 0
    model = torch.compile(tiny_model())
    data = CocoImageLoader("test2017", "annotations/captions_test2017.json")
    print("trained", len(model.train(data, STAGES, steps=2, output_dir="run", return_state_dict=True)))
    """
    output = script(tmp_path, text, PATH="")
    assert output.count("training runs uncompiled") == 1 and "C++ compiler" in output
    assert f"trained {len(tiny_model().state_dict())}" in output


@pytest.mark.slow
def test_the_sample_with_the_real_compiler(tmp_path: Path) -> None:
    coco_test2017(tmp_path)
    before = """
    import warnings
    warnings.filterwarnings("ignore", message=".*16 bits")
    warnings.filterwarnings("error", message=".*uncompiled")
    from dataclasses import replace
    from stable_diffusion import config as settings
    from stable_diffusion.training import record, run
    from tests.tiny import STAGES, TINY
    record.PAYS["cpu"], record.LONG = 0.0, 0
    settings.PRESETS["mini"] = replace(TINY, name="mini")
    run.DEFAULT = STAGES
    """
    after = """
    from tests.training.test_compile import check_sample
    check_sample(globals())
    from torch._dynamo.utils import counters
    print("graphs", counters["stats"]["unique_graphs"])
    """
    text = textwrap.dedent(before) + SAMPLE + textwrap.dedent(after)
    output = script(tmp_path, text, PATH=os.environ["PATH"])
    assert "graphs 2" in output, output
