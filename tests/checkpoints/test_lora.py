"""LoRA files: the change is the formula's, diffusers' pipeline gives the same latents, and misfits change nothing."""

from __future__ import annotations

import itertools
import json
import logging
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stable_diffusion import DiffusionModel, InputError, cli
from stable_diffusion.checkpoints import lora
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.checkpoints.files import read_weights
from stable_diffusion.checkpoints.info import describe
from stable_diffusion.checkpoints.single_file.names import unet_blocks
from stable_diffusion.config import SD15, SD21, TAESD, ModelConfig
from stable_diffusion.generation.metadata import read_settings
from stable_diffusion.nn import tokenizer
from stable_diffusion.nn.text import TextEncoder
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderTiny
from tests.checkpoints import sd
from tests.lively import lively
from tests.nn.reference import normal, quietly

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LDM = {
    # Of a U-Net of three levels with two blocks each, the last without attention.
    "conv_in": "input_blocks_0_0",
    "time_embedding.linear_1": "time_embed_0",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": "input_blocks_2_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.2.resnets.1.conv1": "input_blocks_8_0_in_layers_2",
    "mid_block.attentions.0.proj_out": "middle_block_1_proj_out",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_1_conv",
    "up_blocks.1.resnets.0.time_emb_proj": "output_blocks_3_0_emb_layers_1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.attentions.2.transformer_blocks.0.ff.net.2": "output_blocks_8_1_transformer_blocks_0_ff_net_2",
    "conv_out": "out_2",
}

CLIP = tokenizer._clip(packaged("clip-tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write(tmp_path_factory.mktemp("stable-diffusion") / "sd", "1.5")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> DiffusionModel:
    return DiffusionModel.from_pretrained(folder)


@pytest.fixture
def model(loaded: DiffusionModel) -> Iterator[DiffusionModel]:
    """The tiny Stable Diffusion 1.5, whose weights are put back after each test."""
    before = weights(loaded)
    yield loaded
    loaded.unfuse_lora()
    for name in list(loaded.adapters.weights):
        loaded.unload_lora(name)
    loaded.float().load_state_dict(before)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    names = ("diffusers", "transformers", "peft")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def weights(model: DiffusionModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: DiffusionModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def targets(network: nn.Module, *, convolutions: bool = False) -> dict[str, Tensor]:
    """What kohya's scripts change: the linear layers and 1x1 convolutions of transformer blocks, or everything."""
    kinds = (nn.Linear, nn.Conv2d)
    return {
        path: module.weight
        for path, module in network.named_modules()
        if isinstance(module, kinds) and (convolutions or "attentions" in path or "encoder.layers" in path)
    }


def pair(weight: Tensor, rank: int, seed: int, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """Matrices up and down whose product changes the weight by about `size` of its standard deviation."""
    draw = partial(normal, dtype=torch.float32)
    down = draw(rank, *weight.shape[1:], seed=2 * seed)
    up = draw(len(weight), rank, *([1] * (weight.ndim - 2)), seed=2 * seed + 1)
    return up * (size / math.sqrt(rank * weight[0].numel())), down


def kohya(
    model: DiffusionModel, *, convolutions: bool = False, seed: int = 0, rank: int = 0
) -> dict[str, Tensor]:
    """All modules in kohya's diffusers spelling, each of another rank and alpha unless a rank is given."""
    tensors = {}
    text = {f"text_model.{path}": weight for path, weight in targets(model.text_encoder.encoders[0]).items()}
    for prefix, found in (("unet", targets(model.unet, convolutions=convolutions)), ("te", text)):
        for i, (path, weight) in enumerate(found.items()):
            r = rank or 1 + i % 4
            up, down = pair(weight, r, seed + i)
            name = f"lora_{prefix}_{path.replace('.', '_')}"
            tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
            tensors[f"{name}.alpha"] = torch.tensor(3.0 if rank else r + 1.0 + i % 3)
    return tensors


def written(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def fused(model: DiffusionModel, path: Path, weight: float = 1.0) -> str:
    """Loads a file and puts it into the weights."""
    count = model.load_lora(path, weight)
    model.fuse_lora()
    return count


def pipeline(folder: Path) -> Any:
    pytest.importorskip("peft")
    pipe = quietly(diffusers.StableDiffusionPipeline.from_pretrained, folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def theirs(pipe: Any, **arguments: Any) -> Tensor:
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    return pipe(prompt="a red fox", negative_prompt="", **settings, **arguments).images


def ours(model: DiffusionModel, prompt: str = "a red fox", lora: dict[str, float] | None = None) -> Tensor:
    noise, last = normal(1, 4, 8, 8, dtype=torch.float32), []
    fields = {
        "sampler": "ddim",
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "latents": noise,
        "lora": lora,
    }
    model.generate(prompt, **fields, callback=last.append)
    return last[-1].x


def error(one: Tensor, other: Tensor) -> float:
    assert 0.01 < other.std() < 1e4, "latents that died or exploded show nothing"
    return float((one - other).abs().amax() / other.abs().amax())


# Parity with diffusers


def test_kohya_files_give_the_latents_of_diffusers(
    model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    """One rank and alpha throughout: where they differ diffusers 0.42 ignores most alphas, as it warns itself."""
    path = written(kohya(model, rank=4), tmp_path / "style.safetensors")
    pipe, plain = pipeline(folder), ours(model)
    quietly(pipe.load_lora_weights, path)
    wanted = theirs(pipe)
    assert error(plain, wanted) > 1e-2
    count = len(load_file(path)) // 3
    assert model.load_lora(path) == f"style.safetensors: {count} of {count} modules applied"
    assert error(ours(model), wanted) < 1e-4
    model.fuse_lora()
    assert error(ours(model), wanted) < 1e-4


def test_several_with_weights_give_the_latents_of_diffusers(
    model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    pipe, files = pipeline(folder), []
    for i, name in enumerate("ab"):
        files.append(written(kohya(model, seed=1000 * i, rank=2 + i), tmp_path / f"{name}.safetensors"))
        quietly(pipe.load_lora_weights, files[i], adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.8, -0.5])
    for path, weight in zip(files, (0.8, -0.5), strict=True):
        model.load_lora(path, weight)
    assert error(ours(model), theirs(pipe)) < 1e-4
    pipe.set_adapters(["a", "b"], [1.5, 0.25])
    assert error(ours(model, lora={"b": 0.25, "a": 1.5}), theirs(pipe)) < 1e-4
    model.fuse_lora({"a": 1.5, "b": 0.25})
    assert error(ours(model), theirs(pipe)) < 1e-4


@pytest.mark.parametrize("kind", ["unet", "dora", "rslora"])
def test_files_of_peft_give_the_latents_of_diffusers(
    kind: str, model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    """With alpha in the header alone."""
    peft = pytest.importorskip("peft")
    pipe = pipeline(folder)
    modules = ["to_q", "to_k", "to_out.0", "ff.net.2", "conv1", "proj_in"]
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=modules, init_lora_weights=False,
        alpha_pattern={"to_k": 7}, use_dora=kind == "dora", use_rslora=kind == "rslora",
    )  # fmt: skip
    torch.manual_seed(0)
    quietly(pipe.unet.add_adapter, config, "default")
    state = peft.utils.get_peft_model_state_dict(pipe.unet)
    state = {name: tensor.detach() for name, tensor in state.items()}
    metadata = {"unet": pipe.unet.peft_config["default"].to_dict()}
    arguments = {"unet_lora_layers": state, "unet_lora_adapter_metadata": metadata["unet"]}
    quietly(pipe.save_lora_weights, tmp_path, **arguments)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    plain = ours(model)
    model.load_lora(path)
    wanted = theirs(pipe)
    assert error(plain, wanted) > 1e-2
    assert error(ours(model), wanted) < 1e-4
    model.fuse_lora()
    assert error(ours(model), wanted) < 1e-4


# The formula


def test_every_change_is_the_formula(model: DiffusionModel, tmp_path: Path) -> None:
    """In float64, over every linear layer and convolution, each of its own rank and alpha."""
    model.double()
    before, tensors = weights(model), kohya(model, convolutions=True)
    fused(model, written(tensors, tmp_path / "a.safetensors"), 0.7)
    modules = {
        f"lora_unet_{p.replace('.', '_')}": f"unet.{p}" for p in targets(model.unet, convolutions=True)
    }
    for path in targets(model.text_encoder.encoders[0]):
        modules[f"lora_te_text_model_{path.replace('.', '_')}"] = f"text_encoder.encoders.0.{path}"
    assert changed(model, before) == {f"{path}.weight" for path in modules.values()}
    after = model.state_dict()
    for name, path in modules.items():
        up, down = (tensors[f"{name}.lora_{part}.weight"].double() for part in ("up", "down"))
        scale = 0.7 * float(tensors[f"{name}.alpha"]) / len(down)
        change = scale * torch.einsum("or,r...->o...", up.flatten(1), down)
        wanted = before[f"{path}.weight"] + change
        torch.testing.assert_close(after[f"{path}.weight"], wanted, rtol=0, atol=1e-14)


def test_without_alpha_the_scale_is_one(model: DiffusionModel, tmp_path: Path) -> None:
    weight = model.unet.get_parameter(f"{BLOCK}.attn1.to_q.weight").detach().clone()
    up, down = pair(weight, 4, 0)
    name = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
    fused(model, written({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a"))
    torch.testing.assert_close(model.unet.get_parameter(f"{BLOCK}.attn1.to_q.weight"), weight + up @ down)


def test_a_kernel_in_the_middle(model: DiffusionModel, tmp_path: Path) -> None:
    model.double()
    weight = model.unet.get_parameter("mid_block.resnets.0.conv1.weight").detach().clone()
    up, mid, down = normal(64, 3, 1, 1), normal(3, 3, 3, 3, seed=1), normal(3, 64, 1, 1, seed=2)
    name = "lora_unet_mid_block_resnets_0_conv1"
    parts = {
        "lora_up.weight": up,
        "lora_mid.weight": mid,
        "lora_down.weight": down,
        "alpha": torch.tensor(1.5),
    }
    path = written({f"{name}.{key}": tensor for key, tensor in parts.items()}, tmp_path / "a.safetensors")
    fused(model, path)
    # One convolution after the other, as LyCORIS runs it.
    x = normal(1, 64, 5, 5, seed=3)
    steps = nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1)
    wanted = nn.functional.conv2d(x, weight, padding=1) + 0.5 * nn.functional.conv2d(steps, up)
    found = nn.functional.conv2d(x, model.unet.get_parameter("mid_block.resnets.0.conv1.weight"), padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("target", [f"{BLOCK}.ff.net.2", "mid_block.resnets.0.conv1"])
def test_magnitudes(axis: int, target: str, model: DiffusionModel, tmp_path: Path) -> None:
    model.double()
    weight = model.unet.get_parameter(f"{target}.weight").detach().clone()
    up, down = (tensor.double() for tensor in pair(weight, 2, 0))
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    magnitude = normal(*shape, seed=5).abs() + 1
    name = f"lora_unet_{target.replace('.', '_')}"
    parts = {
        "lora_up.weight": up,
        "lora_down.weight": down,
        "dora_scale": magnitude,
        "alpha": torch.tensor(4.0),
    }
    path = written({f"{name}.{key}": tensor for key, tensor in parts.items()}, tmp_path / "a.safetensors")
    full = weight + 2 * torch.einsum("or,r...->o...", up.flatten(1), down)
    norm = full.transpose(0, axis).flatten(1).norm(dim=1).reshape(shape)
    fused(model, path)
    found = model.unet.get_parameter(f"{target}.weight").detach().clone()
    torch.testing.assert_close(found, full * magnitude / norm, rtol=1e-12, atol=1e-12)
    model.fuse_lora({"a": 0.25})
    part = model.unet.get_parameter(f"{target}.weight")
    torch.testing.assert_close(part, weight + 0.25 * (found - weight), rtol=1e-12, atol=1e-12)


def test_several_add_up_in_any_order(model: DiffusionModel, tmp_path: Path) -> None:
    files = [
        (written(kohya(model, seed=500 * i), tmp_path / f"{i}"), w) for i, w in enumerate((0.8, -0.3, 1.5))
    ]
    model.double()
    before = weights(model)
    for path, weight in files:
        model.load_lora(path, weight)
    model.fuse_lora()
    first = weights(model)
    for path, _ in files:
        model.unfuse_lora()
        model.unload_lora(path.stem)
    assert not changed(model, before)
    for path, weight in reversed(files):
        model.load_lora(path, weight)
    model.fuse_lora()
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-13)
    for path, weight in files:  # and are taken off again
        model.load_lora(path, -weight, f"minus {path.stem}")
    model.fuse_lora()
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-13)


def test_weight_zero_changes_nothing(model: DiffusionModel, tmp_path: Path) -> None:
    before = weights(model)
    fused(model, written(kohya(model), tmp_path / "a"), 0)
    assert not changed(model, before)


def test_half_precision_weights_and_files(model: DiffusionModel, tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in kohya(model).items()}
    path = written(tensors, tmp_path / "a.safetensors")
    name = f"unet.{BLOCK}.attn1.to_q.weight"
    before = model.state_dict()[name].bfloat16()
    fused(model.to(torch.bfloat16), path)
    lora_name = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
    up, down = (tensors[f"{lora_name}.lora_{part}.weight"].float() for part in ("up", "down"))
    wanted = before.float() + float(tensors[f"{lora_name}.alpha"]) / len(down) * up @ down
    assert torch.equal(model.state_dict()[name], wanted.bfloat16())


# Spellings


@pytest.mark.parametrize("config", [SD15, SD21], ids=["1.5", "2.1"])
def test_spellings_of_the_published_models_are_distinct(config: ModelConfig) -> None:
    with torch.device("meta"):
        unet, text = UNet(config.unet), TextEncoder(config.text_encoders[0])
    table: dict[str, str] = {}
    for path in targets(unet, convolutions=True):
        for name in lora.unet_spellings(path, config.unet):
            assert table.setdefault(name, path) == path
    for path in targets(text):
        for name in lora.text_spellings(path):
            assert table.setdefault(name, f"text {path}") == f"text {path}"
    layers = config.text_encoders[0].num_hidden_layers
    assert (len(targets(unet)), len(targets(text))) == (192, 6 * layers)
    assert sum(name.startswith("lora_unet_input_blocks_") for name in table) > 50
    deep = "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"
    assert table["lora_unet_output_blocks_11_1_transformer_blocks_0_attn2_to_out_0"] == deep
    assert table["lora_unet_output_blocks_8_2_conv"] == "up_blocks.2.upsamplers.0.conv"


@pytest.mark.parametrize("path", LDM)
def test_the_spelling_of_compvis(path: str, model: DiffusionModel, tmp_path: Path) -> None:
    before = weights(model)
    up, down = pair(model.unet.get_parameter(f"{path}.weight"), 2, 0)
    name = f"lora_unet_{LDM[path]}"
    fused(model, written({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a"))
    assert changed(model, before) == {f"unet.{path}.weight"}


UNET_FORMS = {
    "attn1.to_out.0": [
        ("unet.{}.attn1.to_out.0.lora_A.weight", "unet.{}.attn1.to_out.0.lora_B.weight"),
        ("unet.{}.attn1.to_out.0.lora.down.weight", "unet.{}.attn1.to_out.0.lora.up.weight"),
        ("unet.{}.attn1.processor.to_out_lora.down.weight", "unet.{}.attn1.processor.to_out_lora.up.weight"),
        ("{}.attn1.processor.to_out_lora.down.weight", "{}.attn1.processor.to_out_lora.up.weight"),
        (
            "base_model.model.{}.attn1.to_out.0.lora_A.weight",
            "base_model.model.{}.attn1.to_out.0.lora_B.weight",
        ),
        ("unet.{}.attn1.to_out.0.lora_A.default.weight", "unet.{}.attn1.to_out.0.lora_B.default.weight"),
        ("unet.{}.attn1.to_out.0.lora_A.my_style.weight", "unet.{}.attn1.to_out.0.lora_B.my_style.weight"),
        (
            "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
            "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
        ),
        *(
            (
                f"{prefix}input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.{down}.weight",
                f"{prefix}input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.{up}.weight",
            )
            for prefix in ("diffusion_model.", "model.diffusion_model.")
            for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B"))
        ),
    ],
    "attn2.to_q": [
        ("unet.{}.attn2.processor.to_q_lora.down.weight", "unet.{}.attn2.processor.to_q_lora.up.weight")
    ],
}
LAYER = "text_encoder.text_model.encoder.layers.1.self_attn"
TEXT_FORMS = {
    "out_proj": [
        (f"{LAYER}.out_proj.lora_A.weight", f"{LAYER}.out_proj.lora_B.weight"),
        (f"{LAYER}.out_proj.lora_linear_layer.down.weight", f"{LAYER}.out_proj.lora_linear_layer.up.weight"),
        (f"{LAYER}.to_out_lora.down.weight", f"{LAYER}.to_out_lora.up.weight"),
        ("text_encoder.encoder.layers.1.self_attn.out_proj.lora_A.weight",
         "text_encoder.encoder.layers.1.self_attn.out_proj.lora_B.weight"),
    ],
    "k_proj": [
        *((f"text_encoders.{clip}.transformer.text_model.encoder.layers.1.self_attn.k_proj.lora_down.weight",
           f"text_encoders.{clip}.transformer.text_model.encoder.layers.1.self_attn.k_proj.lora_up.weight")
          for clip in ("clip_l", "clip_h")),
        (f"{LAYER}.to_k_lora.down.weight", f"{LAYER}.to_k_lora.up.weight"),
        ("lora_te_text_model_encoder_layers_1_self_attn_k_proj.lora_down.weight",
         "lora_te_text_model_encoder_layers_1_self_attn_k_proj.lora_up.weight"),
    ],
}  # fmt: skip
FORMS = [
    *(
        (f"unet.{BLOCK}.{leaf}", down.format(BLOCK), up.format(BLOCK))
        for leaf, forms in UNET_FORMS.items()
        for down, up in forms
    ),
    *(
        (f"text_encoder.encoders.0.encoder.layers.1.self_attn.{leaf}", *form)
        for leaf, forms in TEXT_FORMS.items()
        for form in forms
    ),
]


@pytest.mark.parametrize(("path", "down_name", "up_name"), FORMS)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_the_spellings_of_diffusers(
    path: str, down_name: str, up_name: str, ending: str, model: DiffusionModel, tmp_path: Path
) -> None:
    weight = model.get_parameter(f"{path}.weight").detach().clone()
    before = weights(model)
    up, down = pair(weight, 2, 0)
    file = tmp_path / f"a.{ending}"
    if ending == "bin":
        torch.save({up_name: up, down_name: down}, file)
    else:
        written({up_name: up, down_name: down}, file)
    assert fused(model, file) == f"a.{ending}: 1 of 1 modules applied"
    assert changed(model, before) == {f"{path}.weight"}
    torch.testing.assert_close(model.get_parameter(f"{path}.weight"), weight + up @ down)


def test_linear_layers_and_1x1_convolutions_take_each_others_form(
    model: DiffusionModel, tmp_path: Path
) -> None:
    """Tools disagree on the shape of proj_in's matrices."""
    for path in ("down_blocks.0.attentions.0.proj_in", f"{BLOCK}.attn1.to_q"):
        weight = model.unet.get_parameter(f"{path}.weight").detach().clone()
        flat = weight.ndim == 4
        up, down = (t.flatten(1) if flat else t[:, :, None, None] for t in pair(weight, 2, 0))
        tensors = {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
        model.load_lora(written(tensors, tmp_path / "a"), name=path)
        model.fuse_lora()
        wanted = weight.flatten(1) + up.flatten(1) @ down.flatten(1)
        torch.testing.assert_close(model.unet.get_parameter(f"{path}.weight").flatten(1), wanted)


# What does not fit


def one(
    width: int = 32, out: int = 32, name: str = f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_k"
) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(out, 2)}


def strange(count: int) -> dict[str, Tensor]:
    return {key: t for i in range(count) for key, t in one(name=f"lora_unet_strange_{i}").items()}


def test_a_part_applied_is_a_warning_with_three_names(model: DiffusionModel, tmp_path: Path) -> None:
    path = written(one() | strange(5), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"1 of 6 modules applied.*strange_0, \S*strange_1, \S*strange_2, …"):
        assert model.load_lora(path) == "a.safetensors: 1 of 6 modules applied"


def _nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}


BAD: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "nothing": ({"x": torch.ones(2)}, {}, r"none of 1 modules.*\(x\)"),
    "strange": (strange(5), {}, r"none of 5 modules.*strange_0, .*strange_1, .*strange_2, …"),
    "sd1": (one(768), {}, r"this file is for SD 1.x \(768\), the model is"),
    "sd2": (one(1024), {}, r"this file is for SD 2.x \(1024\), the model is"),
    "sdxl": (one(2048), {}, r"this file is for SDXL \(2048\), the model is"),
    "sdxl text": (one(name="lora_te1_text_model_x"), {}, "this file is for SDXL"),
    "flux": (one(name="lora_unet_double_blocks_0_img_attn_qkv"), {}, "such as Flux or SD 3"),
    "sd3": (one(name="transformer.transformer_blocks.0.attn.to_q"), {}, "such as Flux or SD 3"),
    "nan": (_nan(one()), {}, "NaN"),
    "no up": (dict(list(one().items())[:1]), {}, "has no up matrix"),
    "shape": (one(out=7), {}, "do not fit the model's"),
    "rank": (one() | {list(one())[1]: torch.ones(32, 3)}, {}, "do not fit the model's"),
    "vector": ({name: torch.ones(2) for name in one()}, {}, "vector"),
    "overflow": ({name: tensor * 1e30 for name, tensor in one().items()}, {}, "infinite"),
    "twice": (one() | one(name=f"unet.{BLOCK}.attn2.to_k"), {}, "two changes"),
    "json": (one(), {"lora_adapter_metadata": "{"}, "lora_adapter_metadata"),
    "list": (one(), {"lora_adapter_metadata": "[]"}, "lora_adapter_metadata"),
    **{
        ending: ({f"lora_unet_x.{ending}": torch.ones(2)}, {}, kind)
        for ending, kind in {
            "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "oft_blocks": "OFT", "diff": "whole weights",
            "w_norm": "whole norms", "a1.weight": "GLoRA", "on_input": "IA3",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_applied_is_refused_and_changes_nothing(
    name: str, model: DiffusionModel, tmp_path: Path
) -> None:
    tensors, metadata, message = BAD[name]
    if name not in ("nothing", "strange"):  # beside modules that would fit
        other = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
        tensors = one(name=other) | tensors
    before = weights(model)
    with pytest.raises(InputError, match=message) as caught:
        model.load_lora(written(tensors, tmp_path / "a.safetensors", metadata))
    assert "\n" not in str(caught.value)
    assert not changed(model, before)


def test_shapes_or_metadata_tell_the_base_model(tmp_path: Path) -> None:
    """Self-attention has the same shapes in 1.x and 2.x."""
    name = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
    tensors, _ = read_weights(written(one(320, 320, name), tmp_path / "a"))
    modules, _ = lora.modules_in(Path("a"), tensors)
    for metadata in ({"ss_base_model_version": "sd_v2_v"}, {"modelspec.architecture": "stable-diffusion-v2-768-v"},
                     {"ss_v2": "True"}):  # fmt: skip
        lora.check_base(Path("a"), modules, metadata, SD21)
        with pytest.raises(InputError, match=r"for SD 2.x \(1024\), the model is SD 1.x \(768\)"):
            lora.check_base(Path("a"), modules, metadata, SD15)
    modules, _ = lora.modules_in(Path("a"), dict(one(768)))
    with pytest.raises(InputError, match=r"this file is for SD 1.x \(768\), the model is SD 2.x \(1024\)"):
        lora.check_base(Path("a"), modules, {"ss_v2": "True"}, SD21)
    lora.check_base(Path("a"), modules, {"ss_v2": "True"}, SD15)  # shapes cannot be wrong
    modules, _ = lora.modules_in(Path("a"), tensors)
    with pytest.raises(InputError, match=r"for SDXL \(2048\), the model is SD 2.x \(1024\)"):
        lora.check_base(Path("a"), modules, {"ss_base_model_version": "sdxl_base_v1-0"}, SD21)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x02.", b"PK\x03\x04xx", None])
def test_damaged_and_missing_files(content: bytes | None, model: DiffusionModel, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors") as caught:
        model.load_lora(path)
    assert "\n" not in str(caught.value)


def test_the_weight_is_a_number(model: DiffusionModel, tmp_path: Path) -> None:
    path = written(one(), tmp_path / "a")
    for weight in (math.nan, math.inf, "1", None):
        with pytest.raises(InputError, match="weight must be a number"):
            model.load_lora(path, weight)  # type: ignore[arg-type]


def test_the_models_own_files_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Weights are mapped from files; a change must not reach those."""
    files = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    model = DiffusionModel.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(model, written(kohya(model), tmp_path / "a"))
    assert all(path.read_bytes() == content for path, content in files.items())
    with pytest.warns(UserWarning, match=r"written with the fused LoRAs 'a' \(1.0\)"):
        model.save_pretrained(tmp_path / "merged")
    again = DiffusionModel.from_pretrained(tmp_path / "merged")
    assert not changed(again, weights(model))
    assert json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))["name"] == "sd"


def test_a_model_is_saved_without_its_loras_unless_they_are_fused(
    model: DiffusionModel, tmp_path: Path
) -> None:
    model.load_lora(written(kohya(model), tmp_path / "a.safetensors"))
    with pytest.warns(UserWarning, match="The LoRAs are not written: fuse them"):
        model.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="The LoRAs are not written: fuse them"):
        model.export(tmp_path / "plain.safetensors", format="single-file")
    for path in ("plain", "plain.safetensors"):
        again = DiffusionModel.from_pretrained(tmp_path / path)
        assert not changed(again, weights(model))
    model.unload_lora("a")
    model.save_pretrained(tmp_path / "none")  # in silence


def test_a_name_is_of_one_file(model: DiffusionModel, tmp_path: Path) -> None:
    path = written(one(), tmp_path / "style.v2.safetensors")
    model.load_lora(path)
    with pytest.raises(InputError, match=r"there is a LoRA named 'style.v2' already: give another name"):
        model.load_lora(path)
    model.load_lora(path, 0.5, "again")
    assert model.adapters.weights == {"style.v2": 1.0, "again": 0.5}
    model.unload_lora("style.v2")
    with pytest.raises(InputError, match=r"unknown LoRA 'style.v2': choose one of again"):
        model.unload_lora("style.v2")


def test_one_model_gives_several_weights_their_pictures(model: DiffusionModel, tmp_path: Path) -> None:
    """Eight threads with weights of their own get what they get one after the other."""
    before, plain = weights(model), ours(model)
    for i, name in enumerate("ab"):
        model.load_lora(written(kohya(model, seed=1000 * i, rank=2), tmp_path / name), 0.5)
    assert error(ours(model), plain) > 1e-2
    requests = [{"a": 0.3 * i} if i % 2 else {"a": 0.1 * i, "b": -0.2 * i} for i in range(8)]

    def run(request: dict[str, float]) -> Tensor:
        return ours(model, lora=request)

    serial = [run(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(run, requests))
    assert all(torch.equal(one, other) for one, other in zip(serial, parallel, strict=True))
    assert all(error(one, other) > 1e-3 for one, other in itertools.pairwise(serial))
    assert torch.equal(serial[0], plain)  # weight 0 changes no bit
    assert torch.equal(ours(model, lora={}), plain)
    for name in "ab":
        model.unload_lora(name)
    assert torch.equal(ours(model), plain)
    assert not changed(model, before)


# The command


@pytest.fixture
def minisd(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[str, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            with suppress(SystemExit):
                cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return captured.out.strip(), captured.err

    return run


def test_a_picture_with_additions_is_made_again(
    minisd: Any, model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    for i in range(2):
        written(kohya(model, seed=100 * i), tmp_path / f"{i}.safetensors")
    save_file({"<fox>": normal(2, 32, dtype=torch.float32)}, tmp_path / "fox.safetensors")
    taesd = lively(AutoencoderTiny(TAESD))
    for part, first in (("encoder", 0), ("decoder", 1)):
        state = getattr(taesd, part).layers.state_dict().items()
        renumbered = {f"{int(key.partition('.')[0]) + first}.{key.partition('.')[2]}": t for key, t in state}
        written(renumbered, tmp_path / f"taesd_{part}.safetensors")
    base = ("generate", "a <fox>", "--model", folder, "--steps", 2, "--seed", 1)
    additions: dict[str, tuple[str, ...]] = {
        "lora": ("--lora", "0.safetensors", "--lora", "1.safetensors:-0.5"),
        "embedding": ("--embedding", "fox.safetensors"),
        "vae": ("--vae", "taesd_decoder.safetensors"),
    }
    wanted = {
        "lora": {"0.safetensors": 1.0, "1.safetensors": -0.5},
        "embedding": ["fox.safetensors"],
        "vae": "taesd_decoder.safetensors",
    }
    plain = Path(minisd(*base)[0]).read_bytes()
    pictures = {plain}
    for names in (["lora"], ["embedding"], ["vae"], list(additions)):
        first, told = minisd(*base, *(word for name in names for word in additions[name]))
        stored = read_settings(first)
        assert {key: stored.get(key) for key in additions} == dict.fromkeys(additions) | {
            name: wanted[name] for name in names
        }
        assert ("modules applied" in told) == ("lora" in names)
        pictures.add(Path(first).read_bytes())
    assert len(pictures) == 5
    again, _ = minisd("generate", "--from", first)
    assert again != first
    assert Path(again).read_bytes() == Path(first).read_bytes()
    other, _ = minisd("generate", "--from", first, "--lora", "1.safetensors:1.5")
    assert read_settings(other) == read_settings(first) | {"lora": {"1.safetensors": 1.5}}


def test_a_prompt_names_a_lora_by_its_file(
    minisd: Any, model: DiffusionModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without folder and ending; each of several prompts has its own weights, as if it were made alone."""
    monkeypatch.setattr(tokenizer, "_clip", lambda folder: CLIP)  # building it takes longer than the rest
    written(kohya(model, seed=7), tmp_path / "style.v1.safetensors")
    base = ("--model", folder, "--steps", 2, "--seed", 1, "--lora", "style.v1.safetensors")
    syntax = ("--prompt-syntax", "a1111")
    prompts = ("a fox <lora:style.v1:0.5>", "a fox <lora:style.v1:0>", "a fox")
    paths = minisd("generate", *prompts, *base, *syntax)[0].splitlines()
    first, none, _ = (Path(path).read_bytes() for path in paths)
    with Image.open(paths[0]) as image:
        assert image.info["parameters"].startswith("a fox <lora:style.v1:0.5>\nSteps: 2,")
    assert read_settings(paths[0])["lora"] == {"style.v1.safetensors": 1.0}
    again, _ = minisd("generate", "--from", paths[0])
    assert Path(again).read_bytes() == first
    other, _ = minisd("generate", "--from", paths[0], "--prompt-syntax", "plain")
    assert Path(other).read_bytes() != first
    _, told = minisd("generate", "a <lora:stile:1>", *base, *syntax)
    assert told.splitlines()[-1] == "minisd: unknown LoRA 'stile': choose one of style.v1.safetensors"

    plain = Path(minisd("generate", "a fox", "--model", folder, "--steps", 2, "--seed", 2)[0])
    with Image.open(plain) as one, Image.open(paths[1]) as two, Image.open(paths[2]) as three:
        assert one.tobytes() == two.tobytes() != three.tobytes(), "at the weight 0 it does not act"
    assert none != first


def test_another_word_for_an_embedding(minisd: Any, folder: Path, tmp_path: Path) -> None:
    save_file({"<fox>": normal(2, 32, dtype=torch.float32)}, tmp_path / "a:b.safetensors")
    base = ("generate", "a my-fox", "--model", folder, "--steps", 1, "--seed", 1)
    first, told = minisd(*base, "--embedding", "a:b.safetensors:my-fox")
    assert "prompts can have my-fox" in told
    assert "prompts can have <fox>" in minisd(*base, "--embedding", "a:b.safetensors")[1]
    assert read_settings(first)["embedding"] == ["a:b.safetensors:my-fox"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
        (("--lora", "nowhere.safetensors:0.5"), "nowhere.safetensors does not exist"),
        (("--lora", "a.safetensors:much"), "NAME:WEIGHT such as a.safetensors:0.8, got 'much'"),
        (("--lora", "a.safetensors:nan"), "must be a finite number, got nan"),
        (("--lora", "a.safetensors"), "none of 5 modules"),
        (("--embedding", "a.safetensors"), "not a textual inversion"),
        (("--vae", "a.safetensors"), "a LoRA: use load_lora, or --lora"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    minisd: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer, "_clip", lambda folder: CLIP)  # building it takes longer than the rest
    written(strange(5), tmp_path / "a.safetensors")
    out, told = minisd("generate", "a", "--model", folder, *arguments)
    assert out == ""
    assert told.splitlines()[-1].startswith("minisd: ")
    assert all(line.startswith("minisd: note: ") for line in told.splitlines()[:-1])
    assert message in told.splitlines()[-1]


# Other programs' files


def comfy(model: DiffusionModel) -> dict[str, Tensor]:
    """The change of a kohya file of every attention layer, named as ComfyUI's names are: CompVis' with a prefix."""
    tensors = {}
    blocks = unet_blocks(model.config.unet)
    for i, path in enumerate(targets(model.unet)):
        block = next(b for b in blocks if path == b or (path.startswith(f"{b}.") and ".attentions." in b))
        up, down = pair(model.unet.get_parameter(f"{path}.weight"), 2, i)
        name = f"diffusion_model.{blocks[block]}{path.removeprefix(block)}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    for i, path in enumerate(targets(model.text_encoder.encoders[0])):
        up, down = pair(model.text_encoder.encoders[0].get_parameter(f"{path}.weight"), 2, 100 + i)
        name = f"text_encoders.clip_l.transformer.text_model.{path}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return tensors


@pytest.mark.parametrize("nested", [0, 1, 2])
def test_info_and_loading_agree_on_files_of_other_programs(
    nested: int, model: DiffusionModel, tmp_path: Path
) -> None:
    """ComfyUI's names, in a training program's checkpoint that keeps more than the weights."""
    content: dict[str, Any] = comfy(model)
    count = len(content) // 2
    for _ in range(nested):
        content = {"state_dict": content, "epoch": 3, "optimizer_states": [{"step": torch.ones(2)}]}
    path = tmp_path / "style.ckpt"
    torch.save(content, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.load_lora(path) == f"style.ckpt: {count} of {count} modules applied"
    text = len(targets(model.text_encoder.encoders[0]))
    assert f"  {count - text} modules of the U-Net, {text} of the text encoder" in list(describe(path))


@pytest.mark.parametrize("name", [name for name in BAD if name in ("nan", "no up", "vector")])
def test_info_says_of_a_damaged_file_what_loading_says(
    name: str, model: DiffusionModel, tmp_path: Path
) -> None:
    path = written(BAD[name][0], tmp_path / "a.safetensors")
    with pytest.raises(InputError) as loading:
        model.load_lora(path)
    with pytest.raises(InputError) as saying:
        list(describe(path))
    assert str(saying.value) == str(loading.value)


@pytest.mark.parametrize(
    ("name", "metadata", "settings"),
    [
        ("Hyper-SD15-1step-lora", {}, "--steps 1 --guidance 1 --sampler ddim --spacing trailing"),
        ("Hyper-SD15-8steps-CFG-lora", {}, "--steps 8 --guidance 5 --sampler ddim --spacing trailing"),
        ("lcm-lora-sdv1-5/pytorch_lora_weights", {}, "--steps 4 --guidance 1 --sampler lcm"),
        ("a", {"ss_output_name": "my_LCM_lora_6steps"}, "--steps 6 --guidance 1 --sampler lcm"),
        ("TCD-SD15-LoRA", {}, "--steps 4 --guidance 1 --sampler tcd"),
        ("realcmyk", {}, None),
        ("lcm/style", {}, None),
    ],
)
def test_loras_of_few_steps_are_applied_whole_and_say_their_settings(
    name: str, metadata: dict[str, str], settings: str | None, model: DiffusionModel, tmp_path: Path
) -> None:
    """They change every layer of the U-Net, convolutions and time embeddings included."""
    path = tmp_path / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = kohya(model, convolutions=True, rank=2)
    written({key: tensor for key, tensor in tensors.items() if key.startswith("lora_unet")}, path, metadata)
    layers = len(targets(model.unet, convolutions=True))
    result = f"{path.name}: {layers} of {layers} modules applied"
    end = "" if settings is None else f"; its card's settings: {settings}"
    assert model.load_lora(path) == result + end
