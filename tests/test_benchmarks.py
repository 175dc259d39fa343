"""Benchmarks, tools and ``main.py`` run: each in its quick form, with what it is asked to show or write."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import stable_diffusion
from benchmarks import loading, serving, startup, training_step
from stable_diffusion import config, images
from stable_diffusion.data.coco import coco_splits
from tests.evaluation.drawings import OBJECTS, UNSEEN, write_drawings
from tests.evaluation.test_tasks import entries
from tests.tiny import TEXT, TINY, shapes, tiny_model
from tools import attention_maps, board, make_text_weights, screenshots, train_detector

ROOT = Path(__file__).parents[1]
WEIGHTS = Path(stable_diffusion.__file__).parent / "weights"


def test_every_script_is_here() -> None:
    """One that is added has to be run below, too."""
    found = {path.stem for folder in ("benchmarks", "tools") for path in (ROOT / folder).glob("*.py")}
    assert found == {
        module.__name__.split(".")[-1]
        for module in (
            *(loading, serving, startup, training_step),
            *(attention_maps, board, make_text_weights, screenshots, train_detector),
        )
    }


def test_startup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(WEIGHTS.parents[1]))
    startup.main(["--quick"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("1 runs")
    assert [line[:26].strip() for line in lines] == list(startup.ROWS)


def test_serving(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(WEIGHTS.parents[1]))
    serving.main(["--quick"])
    _, *lines = capsys.readouterr().out.splitlines()
    starts = ["start", "bare loop", "4 askers at once", "/health", "lead of the luckiest"]
    assert [line[:20].strip() for line in lines] == starts


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loading(capsys: pytest.CaptureFixture[str]) -> None:
    loading.main(["--quick"])
    _, size, *lines = capsys.readouterr().out.splitlines()
    assert float(size.split()[-2]) < 0.1, "a small model"
    assert [line[:24].strip() for line in lines] == list(loading.LOADERS)


def test_loading_measures_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The form that the benchmark calls itself in."""
    loading.write_folder(tmp_path / "small", loading.SMALL)
    loading.main(["--measure", "stable_diffusion", str(tmp_path / "small")])
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and found["bytes"] >= 0


@pytest.mark.filterwarnings("ignore:.*16 bits")
def test_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    training_step.main(["--quick"])
    first, line = capsys.readouterr().out.splitlines()
    assert first.endswith("GFLOP/s")
    assert line.startswith("batch    2 ") and line.endswith("% of the product's")


def write_scenes(folder: Path) -> Path:
    """The scenes of the benchmark's own tests, in COCO's layout."""
    found = defaultdict(list)
    for split, caption, fields, picture in entries():
        found[split].append((caption, fields, picture))
    (folder / "annotations").mkdir(parents=True)
    for split, rows in found.items():
        (folder / split).mkdir()
        captions: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        for id, (caption, fields, picture) in enumerate(rows):
            picture.save(folder / split / f"{id}.png")
            captions["images"].append({"id": id, "file_name": f"{id}.png", **fields})
            captions["annotations"].append({"id": id, "image_id": id, "caption": caption})
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(captions))
    return folder


def test_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One column a prompt: a picture of each model, then the real one; of each task that the set has."""
    scenes = write_scenes(tmp_path / "scenes")
    models = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(models):
        tiny_model(seed=seed).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*too long|.*left out|.*cut")
        board.main([str(tmp_path / "board.png"), str(scenes), *map(str, models)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "board.png")
    counts = {split.name: len(split.entries) for split in coco_splits(scenes)}
    tasks = {
        "two": "pair",
        "position": "position",
        "counting": "count",
        "colour": "colour",
        "single": "plain",
    }
    prompts = sum(min(board.EACH[task], counts[f"test_{split}"]) for task, split in tasks.items())
    with Image.open(tmp_path / "board.png") as picture:
        rows, each = -(-prompts // board.COLUMNS), board.SIDE + board.GAP
        assert picture.size == (board.COLUMNS * each, rows * (3 * board.SIDE + board.TEXT + board.GAP))
        cells = [picture.crop((0, i * board.SIDE, board.SIDE, (i + 1) * board.SIDE)) for i in range(3)]
    real = [images.cover(Image.open(path), 128, 128).tobytes() for path in scenes.glob("test_pair/*.png")]
    assert [cell.tobytes() in real for cell in cells] == [False, False, True], "pairs come first"
    assert cells[0].tobytes() != cells[1].tobytes(), "two models"


def test_train_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all drawings of a set, whatever their split; twice the same."""
    drawings = write_drawings(tmp_path / "drawings")
    tiny_model().save_pretrained(tmp_path / "tiny")
    for name in ("one", "two"):
        arguments = [str(drawings), "--out", str(tmp_path / name), "--steps", "2", "--batch", "6"]
        train_detector.main([*arguments, "--model", str(tmp_path / "tiny")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("drawings of 5 objects") and lines[1].startswith("step 2 of 2: centres ")
    for file in ("detector.safetensors", "names.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert json.loads((tmp_path / "one" / "names.json").read_text()) == sorted([*OBJECTS, UNSEEN])


def test_attention_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture and a map a word, in a row for each encoder."""
    two = replace(TINY, text_encoders=(TEXT, TEXT), unet=replace(TINY.unet, pooled_projection_dim=64))
    model = tiny_model(two)
    model.save_pretrained(tmp_path / "model")
    out, prompt = tmp_path / "maps.png", "a red circle, unbelievably small"
    attention_maps.main([str(out), prompt, "--model", str(tmp_path / "model")])
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as picture:
        each = attention_maps.SIDE + attention_maps.GAP
        assert picture.size == (6 * each, 2 * (each + attention_maps.TEXT))
    with pytest.raises(SystemExit):
        attention_maps.main([str(out), prompt, "--model", str(tmp_path / "model"), "--side", "16"])
    assert "has cross-attention at the sides 4: choose one" in capsys.readouterr().err


def test_attention_maps_are_what_the_network_reads() -> None:
    """Each place's shares of all tokens add up to 1, and the hooks change no picture."""
    model = tiny_model()
    plain = model.generate("a red circle", seed=0)[0]
    with attention_maps.watched(model) as maps:
        seen = model.generate("a red circle", seed=0)[0]
    assert seen.tobytes() == plain.tobytes()
    assert maps.keys() == {4} and len(maps[4]) % TINY.num_inference_steps == 0
    for weights in maps[4]:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(16))
    (tokenizer,) = model.text_encoder.tokenizers
    places = attention_maps.spans(tokenizer, ["a", "circle,", "unbelievably"])
    ids = tokenizer(["a circle, unbelievably"]).input_ids[0]
    assert places[0] == slice(1, 2) and places[1] == slice(2, 4), "a comma is a token"
    assert ids[places[-1].stop] == tokenizer.end_id


def test_text_weights_are_those_of_the_package(tmp_path: Path) -> None:
    """From files like the published ones come the package's own, byte for byte: all but licences."""
    minilm, clip, out = tmp_path / "minilm", tmp_path / "clip", tmp_path / "out"
    minilm.mkdir()
    clip.mkdir()
    ours = WEIGHTS / "all-MiniLM-L6-v2"
    published = {name: tensor.float() for name, tensor in load_file(ours / "model.safetensors").items()}
    published |= {"pooler.dense.bias": torch.zeros(384), "embeddings.position_ids": torch.arange(512)}
    save_file(published, minilm / "model.safetensors")
    for name in ("config.json", "vocab.txt"):
        (minilm / name).write_bytes((ours / name).read_bytes())
    merges = (WEIGHTS / "clip-tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    lines = "\n".join(["bpe_simple_vocab_16e6.txt#version: 0.2", *merges, "never used"])
    (clip / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(lines.encode("utf-8")))

    make_text_weights.main([str(minilm), str(clip), "--out", str(out)])

    made = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    packaged = {
        path.relative_to(WEIGHTS): path.read_bytes()
        for folder in ("all-MiniLM-L6-v2", "clip-tokenizer", "clip-tokenizer-2")
        for path in (WEIGHTS / folder).iterdir()
        if path.name != "LICENSE"
    }
    assert made == packaged


@pytest.mark.browser
def test_screenshots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many pixels as docs/ has, and the one on a phone in twice as many as it has points."""
    pytest.importorskip("playwright", reason="needs playwright")
    if screenshots.chromium() is None:
        pytest.skip("needs Chromium")
    monkeypatch.setenv("PYTHONPATH", str(WEIGHTS.parents[1]))
    screenshots.main([str(tmp_path), "--quick"])
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["page-light.png", "page-dark.png", "page-phone.png"]
    sizes = []
    for path in paths:
        with Image.open(path) as picture:
            sizes.append(picture.size)
    assert sizes == [(1240, 884), (1240, 884), (720, 1560)]


def test_main_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python main.py IMAGES CAPTIONS`` on a few drawn shapes, with a small ``mini`` and nothing compiled."""
    shapes(tmp_path / "shapes")
    captions = tmp_path / "shapes" / "annotations" / "captions_train.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.PRESETS, "mini", replace(TINY, name="mini"))
    monkeypatch.setattr(sys, "argv", ["main.py", str(tmp_path / "shapes" / "train"), str(captions)])
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*16 bits")
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    assert stable_diffusion.DiffusionModel.from_pretrained("runs/mini/model").config.name == "mini"


def test_main_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, code in (
        ([], "usage: python main.py IMAGE_FOLDER CAPTIONS_FILE"),
        (["none", "none.json"], 2),
    ):
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
        assert end.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("main.py: ") and error.count("\n") == 1
