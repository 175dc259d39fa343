"""A run's folder with damaged, missing or outdated files: one sentence, or made again where that loses nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from stable_diffusion import InputError, cli, config
from stable_diffusion.data.coco import CocoImageLoader
from tests.tiny import STAGES, TINY, coco_test2017, shapes, tiny_model
from tests.training.record import Record
from tests.training.test_stops import check_equal, straight

__all__ = ["straight"]  # a fixture

Damage = Callable[[Path], object]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def train(folder: Path, data: CocoImageLoader, record: Record | None = None, **settings: Any) -> None:
    observers = [record] if record else []
    tiny_model().train(data, STAGES, output_dir=folder, steps=6, observers=observers, **settings)


@pytest.fixture(scope="module")
def half_way(data: CocoImageLoader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half-way")
    train(folder, data, Record("denoiser", 2))
    return folder


@pytest.fixture
def stopped(tmp_path: Path, half_way: Path) -> Path:
    """The folder of a run that was stopped in its last stage."""
    return Path(shutil.copytree(half_way, tmp_path / "run"))


def changed(**entries: Any) -> Damage:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        empty, half, zeros, Path.unlink,
        lambda path: path.write_text("[]"),
        lambda path: path.write_bytes(b"\xff\xfe"),
        changed(plan={}), changed(plan={"autoencoder": 5}), changed(plan={"autoencoder": {"steps": 6, "seconds": 1.0}}),
        changed(asked={"minutes": "3"}), changed(spent=None), changed(data=None), changed(figures=[]),
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_sentence(stopped: Path, data: CocoImageLoader, damage: Damage) -> None:
    kept = (stopped / "denoiser.safetensors").read_bytes()
    damage(stopped / "run.json")
    with pytest.raises(InputError) as refused:
        train(stopped, data)
    said = f"{stopped} holds a training whose run.json is damaged or gone: choose another"
    assert str(refused.value) == f"{said} output_dir or resume=False to replace it"
    assert refused.value.command == f"{said} --output or --fresh to replace it"
    assert (stopped / "denoiser.safetensors").read_bytes() == kept
    if damage is empty:
        train(stopped, data, resume=False)
        assert (stopped / "model").is_dir()


def other_shapes(path: Path) -> None:
    tensors = {name: tensor[:1].contiguous() for name, tensor in load_file(path).items() if tensor.ndim}
    save_file(tensors, path, {"step": "3", "skipped": "0", "scale": "1.0"})


def no_counts(path: Path) -> None:
    save_file(load_file(path), path)


def nothing(path: Path) -> None:
    save_file({}, path)


@pytest.mark.parametrize("damage", [empty, half, zeros, other_shapes, no_counts, nothing])
def test_a_damaged_checkpoint_is_one_sentence_and_its_stage_can_begin_anew(
    stopped: Path, data: CocoImageLoader, straight: Path, damage: Damage
) -> None:
    path = stopped / "denoiser.safetensors"
    damage(path)
    with pytest.raises(
        InputError, match=rf"^the checkpoint {path} is damaged \(.+\): delete it, and its stage begins"
    ):
        train(stopped, data)
    path.unlink()
    train(stopped, data)
    check_equal(stopped, straight)


@pytest.mark.parametrize("damage", [empty, half, zeros, lambda path: np.save(path, np.zeros((2, 2)))])
@pytest.mark.parametrize("name", ["pictures", "latents", "captions-1"])
def test_damaged_caches_are_made_again(
    stopped: Path, data: CocoImageLoader, straight: Path, name: str, damage: Damage
) -> None:
    (path,) = (stopped / "cache").glob(f"{name}-*.npy")
    whole = path.read_bytes()
    damage(path)
    train(stopped, data)
    assert path.read_bytes() == whole
    check_equal(stopped, straight)


@pytest.mark.parametrize(
    "damage", [empty, half, Path.unlink, lambda path: path.write_text('{"rows": [99, "x"]}')]
)
def test_without_the_list_of_damaged_pictures_they_are_read_again(tmp_path: Path, damage: Damage) -> None:
    data = shapes(tmp_path / "large", count=8, size=64)
    half(data.image_folder / data.entries()[2].key)
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 pictures cannot be decoded and are left out"):
            train(tmp_path / "run", data, Record("autoencoder", 0))
        damage(tmp_path / "run/cache/damaged.json")


def test_lines_of_the_log_that_are_none_are_left_out(
    stopped: Path, data: CocoImageLoader, straight: Path
) -> None:
    with (stopped / "log.jsonl").open("ab") as file:
        file.write(b'[]\n{"stage": "denoiser"}\n\0\0\0\xff\n{"stage": "denoiser", "step": 3, "lo')
    train(stopped, data)
    check_equal(stopped, straight)


def test_without_a_log_the_training_is_the_same(stopped: Path, data: CocoImageLoader) -> None:
    (stopped / "log.jsonl").unlink()
    train(stopped, data)
    said = json.loads((stopped / "run.json").read_text())["figures"]
    assert said["denoiser"]["steps"] == 3 and (stopped / "model").is_dir()


def test_figures_that_a_kill_took_are_found_again(
    tmp_path: Path, data: CocoImageLoader, straight: Path
) -> None:
    """Killed between the last checkpoint and the record, a run is through once it was run again."""
    train(tmp_path, data)
    changed(figures={})(tmp_path / "run.json")
    train(tmp_path, data)
    check_equal(tmp_path, straight)


def test_pixels_that_changed_behind_size_and_time_are_seen(tmp_path: Path) -> None:
    data = shapes(tmp_path / "shapes")
    file = data.image_folder / data.entries()[3].key
    Image.new("RGB", (32, 32), "blue").save(file, "bmp")
    train(tmp_path / "run", data, Record("denoiser", 0))
    before = file.stat()
    Image.new("RGB", (32, 32), "red").save(file, "bmp")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    old = {path.name for path in (tmp_path / "run/cache").iterdir()}
    train(tmp_path / "run", data, Record("denoiser", 1))
    (pictures,) = (tmp_path / "run/cache").glob("pictures-*.npy")
    assert (np.load(pictures)[3] == (255, 0, 0)).all()
    new = {path.name for path in (tmp_path / "run/cache").iterdir()}
    assert {name.rsplit("-", 1)[0] for name in old - new} == {"pictures", "latents"}


def test_the_commands_user_reads_the_commands_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captions that changed: what to do is said with --output, --start and --fresh, and doing it works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.PRESETS, "mini", replace(TINY, name="mini"))
    coco_test2017(tmp_path)
    captions = tmp_path / "annotations/captions_test2017.json"
    command = ["train", "--images", "test2017", "--captions", str(captions), "--steps", "1", "--no-autocast"]
    cli.main([*command, "--device", "cpu"])
    content = json.loads(captions.read_text(encoding="utf-8"))
    content["annotations"][0]["caption"] = "another one"
    captions.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    run, model = Path("runs/mini"), Path("runs/mini/model")
    assert end.value.code == 2 and capsys.readouterr().err.endswith(
        f"minisd: {run} holds a training of other pictures or captions: choose another --output, with --start {model}"
        " to train its model further, or --fresh to replace it\n"
    )
    with pytest.raises(InputError) as refused:
        data = CocoImageLoader("test2017", captions)
        tiny_model(replace(TINY, name="mini")).train(data, output_dir=run, steps=1)
    assert str(refused.value) == (
        f"{run} holds a training of other pictures or captions: choose another output_dir, with"
        f" DiffusionModel.from_pretrained({str(model)!r}) to train its model further, or resume=False to replace it"
    )
    cli.main([*command, "--output", "further", "--start", str(model)])
    cli.main([*command, "--fresh"])
    assert Path("further/model").is_dir()
