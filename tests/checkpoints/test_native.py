"""Our model folders: what is saved is what is loaded, and nothing of the user's is ever lost."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints import files as weight_files
from stable_diffusion.checkpoints import native
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.config import MINILM, PRESETS, ModelConfig, TextEncoderConfig, from_dict, to_dict
from stable_diffusion.files import _computer
from tests.lively import lively
from tests.test_files import reachable, refusal, without_rights
from tests.tiny import FINE, KL, TEXT, TINY, UNCONDITIONAL, VQ, tiny_model

TRAINED = replace(TINY, text_encoders=(replace(TEXT, trainable=True),))
TWO = replace(
    TINY,
    text_encoders=(replace(TEXT, trainable=True), replace(MINILM, context_length=8)),
    unet=replace(TINY.unet, pooled_projection_dim=TEXT.hidden_size + MINILM.hidden_size),
)
TWO_TRAINED = replace(TWO, text_encoders=tuple(replace(text, trainable=True) for text in TWO.text_encoders))
CONFIGS = {
    "tiny": TINY,
    "kl": replace(TINY, vae=KL),
    "vq": replace(TINY, vae=VQ),
    "without text": UNCONDITIONAL,
    "larger, with opacity": FINE,
    "trained": TRAINED,
    "projected": replace(TRAINED, unet=replace(TINY.unet, cross_attention_dim=24)),
    "clip and bert": TWO,
    "clip and bert, both trained": TWO_TRAINED,
    "clip and bert, pooled alone": replace(TWO, unet=replace(TWO.unet, cross_attention_dim=None)),
}


def model(config: ModelConfig = TRAINED, seed: int = 0) -> DiffusionModel:
    network = tiny_model(config)
    lively(network.unet, seed)
    lively(network.vae, seed + 1)
    for i, text in enumerate(config.text_encoders):
        if text.trainable:
            lively(network.text_encoder.encoders[i], seed + 2 + i)
    return network


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one: DiffusionModel, other: DiffusionModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_load_save_is_identical(name: str, tmp_path: Path) -> None:
    first = model(CONFIGS[name])
    first.save_pretrained(tmp_path / "one")
    second = DiffusionModel.from_pretrained(tmp_path / "one")
    assert second.config == first.config
    assert same(first, second)
    second.save_pretrained(tmp_path / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert all(native.OURS.fullmatch(file) for file in one), "so that the next model takes its place"
    assert json.loads(one.pop("config.json")) == json.loads(two.pop("config.json"))
    assert one == two
    prompt = "a red circle" if first.config.text_encoders else ""
    pictures = [network.generate(prompt, seed=0)[0].tobytes() for network in (first, second)]
    assert pictures[0] == pictures[1]


def test_the_parts_have_published_names_and_a_carried_encoder_is_not_written(tmp_path: Path) -> None:
    model(TWO).save_pretrained(tmp_path / "two")
    written = files(tmp_path / "two")
    assert sorted(written) == [
        "config.json",
        "text_encoder/model.safetensors",
        "text_projection/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    clip = load_file(tmp_path / "two" / "text_encoder" / "model.safetensors")
    assert "text_model.embeddings.token_embedding.weight" in clip
    model(TWO_TRAINED).save_pretrained(tmp_path / "trained")
    bert = load_file(tmp_path / "trained" / "text_encoder_2" / "model.safetensors")
    assert "embeddings.word_embeddings.weight" in bert
    assert (tmp_path / "trained" / "tokenizer_2" / "vocab.txt").is_file()


def test_a_carried_encoder_with_other_weights_is_written(tmp_path: Path) -> None:
    changed = model(TWO)
    lively(changed.text_encoder.encoders[1])
    changed.save_pretrained(tmp_path / "changed")
    assert same(changed, DiffusionModel.from_pretrained(tmp_path / "changed"))


def test_what_is_trainable_stays_trainable(tmp_path: Path) -> None:
    model(TWO).save_pretrained(tmp_path / "two")
    again = DiffusionModel.from_pretrained(tmp_path / "two")
    encoders = [{p.requires_grad for p in encoder.parameters()} for encoder in again.text_encoder.encoders]
    assert encoders == [{True}, {False}]
    assert all(p.requires_grad for p in again.unet.parameters())
    assert not any(part.training for part in again.modules())
    assert not any(p.is_meta for p in again.parameters())


def test_half_precision_halves_the_files(tmp_path: Path) -> None:
    network = model()
    network.save_pretrained(tmp_path / "full")
    network.save_pretrained(tmp_path / "half", dtype=torch.float16)
    for part in (native.UNET, native.VAE, "text_encoder/model.safetensors"):
        full, half = load_file(tmp_path / "full" / part), load_file(tmp_path / "half" / part)
        assert {tensor.dtype for tensor in half.values()} == {torch.float16}
        assert all(torch.equal(full[name].half(), half[name]) for name in full)
        sizes = [sum(tensor.nbytes for tensor in state.values()) for state in (full, half)]
        assert sizes[0] == 2 * sizes[1]
        assert (tmp_path / "half" / part).stat().st_size < 0.7 * (tmp_path / "full" / part).stat().st_size
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    again = DiffusionModel.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    half = DiffusionModel.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values()])
def test_a_configuration_survives_json(config: ModelConfig) -> None:
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_every_setting_is_stored() -> None:
    def names(plain: object) -> set[str]:
        return set().union(plain, *map(names, plain.values())) if isinstance(plain, dict) else set()

    wanted = {field.name for cls in (ModelConfig, *map(type, vars(TINY).values())) if dataclasses.is_dataclass(cls)
              for field in dataclasses.fields(cls)}  # fmt: skip
    assert wanted <= names(to_dict(TINY))


# Writing


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    network = model()
    others: dict[str, dict[str, str]] = {
        "notes": {"notes.txt": "mine"},
        "transformers": {"config.json": '{"model_type": "bert"}', "pytorch_model.bin": "weights"},
        "diffusers": {"model_index.json": "{}", "config.json": "{}"},
        "web": {"config.json": "[]", "index.html": "page"},
        "broken": {"config.json": "{", "thesis.tex": "years of work"},
    }
    for name, content in others.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, text in content.items():
            (folder / file).write_text(text)
        before = files(folder)
        with pytest.raises(InputError, match="choose another name"):
            network.save_pretrained(folder)
        assert files(folder) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="choose another name"):
        network.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "file"])


def test_a_new_nested_or_empty_folder_is_written(tmp_path: Path) -> None:
    network = model()
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c", "ü 北京 🦊"):
        network.save_pretrained(tmp_path / name)
        assert same(network, DiffusionModel.from_pretrained(str(tmp_path / name)))


def test_an_older_model_is_replaced(tmp_path: Path) -> None:
    model(TWO_TRAINED).save_pretrained(tmp_path / "model")
    newer = model(TINY, seed=5)
    newer.save_pretrained(tmp_path / "model")
    assert same(newer, DiffusionModel.from_pretrained(tmp_path / "model"))
    assert not (tmp_path / "model" / "text_encoder_2").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_user_put_into_a_model_folder_stays(tmp_path: Path) -> None:
    model(TWO_TRAINED).save_pretrained(tmp_path / "model")
    mine = {
        "README.md": b"mine",
        "unet/notes.txt": b"mine",
        ".git/HEAD": b"mine",
        "text_encoder_2/a": b"mine",
        "tokenizer/notes/a.txt": b"mine",
        "tokenizer_2/README.md": b"mine",
    }
    for name, text in mine.items():
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "model" / name).write_bytes(text)
    newer = model(TINY, seed=5)
    newer.save_pretrained(tmp_path / "model")
    newer.save_pretrained(tmp_path / "fresh")
    assert files(tmp_path / "model") == files(tmp_path / "fresh") | mine
    assert same(newer, DiffusionModel.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("link", [False, True])
def test_what_would_be_in_the_way_is_found_before_the_work(name: str, link: bool, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    part = tmp_path / "model" / name
    part.rename(tmp_path / "elsewhere")
    if link:
        part.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    else:
        part.write_text("mine")
    with pytest.raises(InputError, match=f"{name} is no folder of this project and would be in the way"):
        native.check_place(tmp_path / "model")


def test_a_model_whose_writer_was_killed_between_two_moves_is_found(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    newer = model(seed=5)
    newer.save_pretrained(tmp_path / "newer")
    left = tmp_path / f".model.{_computer()}-{os.getpid()}-00000000-abc.part"
    left.mkdir()
    (tmp_path / "model").rename(left / "old")
    (tmp_path / "newer").rename(left / "new")
    assert same(newer, DiffusionModel.from_pretrained(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_packaged_names_only_what_the_package_has(tmp_path: Path) -> None:
    """The configuration of a stranger's model cannot reach for other folders."""
    model(TINY).save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model/tokenizer", ignore_errors=True)
    content = json.loads((tmp_path / "model/config.json").read_text())
    for name in ("../../../../etc", "model", "", "/etc", 3):
        content["text_encoders"][0]["packaged"] = name
        (tmp_path / "model/config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"unknown packaged .*choose one of all-MiniLM-L6-v2, clip-tok"):
            DiffusionModel.from_pretrained(tmp_path / "model")
    (hint, _) = typing.get_args(typing.get_type_hints(TextEncoderConfig)["packaged"])
    carried = {path.name for path in packaged("model").parent.iterdir()} - {"model", "detector"}
    assert set(typing.get_args(hint)) == carried


def test_a_tokenizer_that_is_missing_is_named(tmp_path: Path) -> None:
    model(replace(TRAINED, text_encoders=(replace(TEXT, trainable=True),))).save_pretrained(
        tmp_path / "model"
    )
    content = json.loads((tmp_path / "model/config.json").read_text())
    content["text_encoders"][0]["packaged"] = None
    (tmp_path / "model/config.json").write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "model/tokenizer")
    with pytest.raises(InputError, match=r"model/tokenizer has no tokenizer"):
        DiffusionModel.from_pretrained(tmp_path / "model")


@pytest.mark.skipif(os.name != "posix", reason="processes are forked")
@pytest.mark.parametrize("part", ["", "config.json", "unet", native.VAE, "tokenizer", "tokenizer/vocab.json"])
def test_missing_rights_are_called_that(part: str, tmp_path: Path) -> None:
    """Where a model is read, and where one is replaced, which is known before the training."""
    folder, network = tmp_path / "model", model(TRAINED)
    network.save_pretrained(folder)
    reachable(tmp_path)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    (folder / part).chmod(0)
    read = refusal(without_rights(lambda: DiffusionModel.from_pretrained(folder)))
    (folder / part).chmod(0o777)
    assert f"cannot open {folder}" in read and "Permission denied" in read, read
    if (folder / part).is_dir():
        for mode in (0, 0o555):
            (folder / part).chmod(mode)
            for write in (native.check_place, network.save_pretrained):
                sentence = refusal(without_rights(lambda write=write: write(folder)))
                assert f"cannot write {folder}: Permission denied" in sentence, sentence
    (folder / part).chmod(0o777)
    assert same(DiffusionModel.from_pretrained(folder), network)


@pytest.mark.parametrize("calls", range(4))
def test_a_write_that_fails_leaves_the_older_model_and_nothing_else(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = model()
    older.save_pretrained(tmp_path / "model")
    written = 0

    def failing(*args: object, **kwargs: object) -> None:
        nonlocal written
        if written == calls:
            raise OSError(28, "No space left on device")
        written += 1
        save_file(*args, **kwargs)  # type: ignore[arg-type]

    if calls < 3:
        monkeypatch.setattr(weight_files, "save_file", failing)
    else:
        monkeypatch.setattr(native, "to_dict", lambda config: {"not JSON": {1, 2}})
    with pytest.raises((OSError, InputError, TypeError)):
        model(seed=9).save_pretrained(tmp_path / "model")
    with pytest.raises((OSError, InputError, TypeError)):
        model(seed=9).save_pretrained(tmp_path / "new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same(older, DiffusionModel.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_while_the_new_model_takes_the_place_leaves_the_older_one(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = model()
    older.save_pretrained(tmp_path / "model")
    rename = Path.replace
    calls = 0

    def replace_or_fail(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += self.is_dir()  # not the files inside, which take their places before
        if self.is_dir() and calls == failing + 1:
            raise PermissionError(13, "in use")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_fail)
    with pytest.raises((OSError, InputError)):
        model(seed=9).save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same(older, DiffusionModel.from_pretrained(tmp_path / "model"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_others_may_read_what_the_umask_lets_them(mask: int, file: int, folder: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        model(TWO).save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    for path in (tmp_path / "model", *(tmp_path / "model").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path


# Reading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model(CONFIGS["projected"]).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_nothing_and_something_else_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: give a model folder"):
        DiffusionModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config.json \(ours\) or model_index.json \(diffusers\)"):
        DiffusionModel.from_pretrained(tmp_path)
    (tmp_path / "file.safetensors").write_bytes(b"1234")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        DiffusionModel.from_pretrained(tmp_path / "file.safetensors")


FILES = [
    "config.json",
    "text_encoder/model.safetensors",
    "text_projection/model.safetensors",
    "tokenizer/merges.txt",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError) as caught:
        DiffusionModel.from_pretrained(copy)
    assert name.partition("/")[0] in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"unet": 3}', b"\xff\xfe\x00"])
def test_a_damaged_file_is_an_error(name: str, content: bytes, copy: Path) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        DiffusionModel.from_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("safetensors")])
def test_a_truncated_file_is_an_error(name: str, copy: Path) -> None:
    whole = (copy / name).read_bytes()
    for size in (7, 60, len(whole) - 1):
        (copy / name).write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"{Path(name).name} is not a whole safetensors file"):
            DiffusionModel.from_pretrained(copy)


def test_tensors_that_do_not_fit_are_counted_and_three_are_named(copy: Path) -> None:
    path = copy / native.UNET
    state = load_file(path)
    names = sorted(state)
    save_file({name: state[name] for name in names[4:]}, path)
    message = rf"unet do not fit its configuration: 4 of {len(names)} tensors \(.*\) are missing"
    with pytest.raises(InputError, match=message) as caught:
        DiffusionModel.from_pretrained(copy)
    assert f"({', '.join(names[:3])}, …)" in str(caught.value)
    assert names[3] not in str(caught.value)

    save_file(state | {"lora.up": torch.zeros(1), "lora.down": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"2 of \d+ tensors \(lora.down, lora.up\) are unexpected"):
        DiffusionModel.from_pretrained(copy)

    save_file(state | {"conv_in.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(InputError, match=r"1 of \d+ tensors \(conv_in.weight\) are of another shape"):
        DiffusionModel.from_pretrained(copy)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_configuration_that_a_windows_editor_saved(encoding: str, copy: Path) -> None:
    config = DiffusionModel.from_pretrained(copy).config
    file = copy / "config.json"
    file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    assert DiffusionModel.from_pretrained(copy).config == config


def test_a_setting_that_does_not_exist_is_named_with_the_nearest(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(settings | {"sampel_size": 3}), encoding="utf-8")
    with pytest.raises(InputError, match="'sampel_size': did you mean 'sample_size'"):
        DiffusionModel.from_pretrained(copy)
    settings["unet"]["layers_per_block"] = "one"
    (copy / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match="layers_per_block must be of type int, got 'one'"):
        DiffusionModel.from_pretrained(copy)


def test_loading_the_weights_of_another_folder(saved: Path, tmp_path: Path) -> None:
    """A state dictionary goes from model to model."""
    network = model(CONFIGS["projected"], seed=3)
    network.load_state_dict(DiffusionModel.from_pretrained(saved).state_dict())
    assert same(network, DiffusionModel.from_pretrained(saved))
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing|Unexpected"):
        network.load_state_dict(model(TINY).state_dict())


def test_the_carried_encoder_is_where_the_configuration_says() -> None:
    assert (packaged("all-MiniLM-L6-v2") / "model.safetensors").is_file()
    state = native.packaged_text_encoder(MINILM)
    fresh = DiffusionModel(replace(TWO)).text_encoder.encoders[1].state_dict()
    assert all(torch.equal(fresh[name], tensor.float()) for name, tensor in state.items())


def test_an_older_configuration_with_settings_of_training_is_read() -> None:
    older = {**to_dict(TINY), "training": {"autoencoder": {"passes": 3.0}, "seed": 0}}
    assert from_dict(ModelConfig, older) == TINY and "training" not in to_dict(TINY)
