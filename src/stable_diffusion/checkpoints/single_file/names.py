"""CompVis' names: how each part's blocks are called in single files of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from stable_diffusion.checkpoints.files import State
from stable_diffusion.config import AutoencoderKLConfig, TextEncoderConfig, UNetConfig

RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    **{"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
    "self_attn": "attn",
}


def unet_blocks(config: UNetConfig, *, gaps: bool = False) -> dict[str, str]:
    """Our names of the U-Net's blocks, and CompVis'.

    With `gaps` those of a compressed model that diffusers' script has written, which counts three blocks a level
    whatever there is, and leaves the names of attention at the bottom of the way up as they are.
    """
    table = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    table |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    table["mid_block.attentions.0"] = "middle_block.1"
    stride = 3 if gaps else config.layers_per_block + 1
    for i in range(len(config.block_out_channels)):
        for j in range(config.layers_per_block):
            resnets[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{stride * i + j + 1}.0"
            table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{stride * i + j + 1}.1"
        table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{stride * (i + 1)}.0.op"
        attends = i > 0 if gaps else config.attention_levels[::-1][i]
        for j in range(config.layers_per_block + 1):
            resnets[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{stride * i + j}.0"
            if attends:
                table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{stride * i + j}.1"
        last = stride * (i + 1) - 1
        table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{last}.{1 + attends}.conv"
    return table | products(resnets, RESNET)


def vae_blocks(config: AutoencoderKLConfig) -> dict[str, str]:
    """Our names of the autoencoder's blocks, and CompVis', which count the way up from its end."""
    table, last = {}, len(config.block_out_channels) - 1
    for half, way in (("encoder", "down"), ("decoder", "up")):
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnets = {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in (0, 1)}
        for i in range(last + 1):
            level = f"{half}.{way}.{i if way == 'down' else last - i}"
            table[f"{half}.{way}_blocks.{i}.{way}samplers.0"] = f"{level}.{way}sample"
            for j in range(config.layers_per_block + 1):
                resnets[f"{half}.{way}_blocks.{i}.resnets.{j}"] = f"{level}.block.{j}"
        table |= resnets | products(resnets, {"conv_shortcut": "nin_shortcut"})
        table |= products({f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}, VAE_ATTENTION)
    return table


def text_blocks(config: TextEncoderConfig) -> dict[str, str]:
    """Our names of the text encoder's blocks, and OpenCLIP's; CLIP's are the same."""
    if not in_openclip_layout(config):
        return {}
    layers = {f"encoder.layers.{k}": f"transformer.resblocks.{k}" for k in range(config.num_hidden_layers)}
    return {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
        **products(layers, OPEN_CLIP_LAYER),
    }


def rename(name: str, table: dict[str, str]) -> str:
    """The name with its longest beginning that the table has replaced."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        if (block := ".".join(parts[:i])) in table:
            return ".".join([table[block], *parts[i:]])
    return name


def renamed(state: State, table: dict[str, str], prefix: str) -> State:
    """Our tensors under CompVis' names."""
    return {prefix + rename(name, table): tensor for name, tensor in state.items()}


def products(blocks: dict[str, str], leaves: dict[str, str]) -> dict[str, str]:
    """Every leaf in every block: the pairs of names one level down."""
    return {f"{a}.{x}": f"{b}.{y}" for a, b in blocks.items() for x, y in leaves.items()}


def in_openclip_layout(config: TextEncoderConfig) -> bool:
    """Whether single files have a text encoder in OpenCLIP's layout, from which readers conclude that it has GELU.

    From CLIP's layout they conclude quick GELU; nothing else in a file tells the activation.
    """
    return config.hidden_act == "gelu"
