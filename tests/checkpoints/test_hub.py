"""Hub names: the cache on this machine first, and a clear word where neither cache nor network has the model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints import hub
from tests.checkpoints import sd

PUBLISHED = [
    *("README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors"),
    *("feature_extractor/preprocessor_config.json", "safety_checker/model.safetensors"),
    *("scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.fp16.safetensors"),
    *("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/merges.txt"),
    *("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"),
    *(
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ),
    *("unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors"),
]


def test_only_what_is_read_is_downloaded() -> None:
    wanted = hub.needed(PUBLISHED)
    assert [name for name in wanted if name.endswith((".safetensors", ".bin", ".ckpt"))] == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert {"model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json"} <= set(
        wanted
    )
    assert not any(name.startswith(("safety_checker", "feature_extractor")) for name in wanted)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.needed(PUBLISHED, "fp16")
    assert hub.needed(["README.md", "model.safetensors"]) == []


def test_half_a_snapshot_is_not_taken_for_a_whole_one() -> None:
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = [name for name in PUBLISHED if not name.startswith("unet/diffusion")]
    names.append("unet/diffusion_pytorch_model.safetensors.index.json")
    assert hub.is_whole(PUBLISHED)
    assert not hub.is_whole(names)
    assert not hub.is_whole([*names, shards[0]])
    assert hub.is_whole([*names, *shards])
    assert not hub.is_whole([name for name in PUBLISHED if "fp16" not in name], "fp16")


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("owner/some-model_1.5")
    for path in (
        "nowhere",
        "/a/b",
        "./a/b",
        "a/b/c",
        "../b",
        "a/../b",
        "owner/",
        "https://huggingface.co/a/b",
    ):
        assert not hub.is_name(path)
    (tmp_path / "runs").mkdir()
    assert not hub.is_name("runs/mini")
    with pytest.raises(InputError, match="runs/mini does not exist: give a model folder"):
        DiffusionModel.from_pretrained("runs/mini")


def test_the_cache_is_enough_and_without_it_the_message_is_clear(tmp_path: Path) -> None:
    """In the hub's own layout, in a process that is told to stay offline."""
    repository = tmp_path / "home" / "hub" / "models--owner--tiny-sd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(sd.write(tmp_path / "sd", "1.5"), repository / "snapshots" / ("0" * 40))
    code = """if True:
        from stable_diffusion.cli import main
        main(["info", "owner/tiny-sd"])
        main(["info", "owner/another"])
    """
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "diffusers folder" in ran.stdout, ran.stderr
    assert ran.returncode == 2
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith(
        "minisd: owner/another does not exist: give a model folder; as a name of the Hugging"
    )
    assert "not whole in the cache, and the network did not give it" in line


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'mini-stable-diffusion\[hub\]'"):
        DiffusionModel.from_pretrained("owner/model")
