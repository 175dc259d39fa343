"""``minisd mcp``: a tool that generates images, for programs in which a language model works."""

from __future__ import annotations

import importlib.util

import tyro

from stable_diffusion.cli.serve import Several, loaded
from stable_diffusion.errors import InputError


def mcp(
    model: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    lora: Several = (),
    embedding: Several = (),
    vae: str | None = None,
    device: str | None = None,
) -> None:
    """Speak the Model Context Protocol on standard input and output: one tool generates images, one lists models.

    Args:
        model: Models to choose among: folders, single files or hub names (owner/name). By default the model that the
            package carries.
        lora: A LoRA that acts on every picture, FILE or FILE:WEIGHT; may be repeated.
        embedding: A textual inversion, FILE or FILE:TOKEN; may be repeated.
        vae: Another autoencoder for the models: a folder or file of Stable Diffusion's, or TAESD's.
        device: cuda, mps or cpu. By default the first of these that is there.
    """
    if importlib.util.find_spec("mcp") is None:
        raise InputError("minisd mcp needs the extra: pip install 'mini-stable-diffusion[mcp]'")
    from stable_diffusion.serve.door import Models
    from stable_diffusion.serve.jobs import Jobs
    from stable_diffusion.serve.mcp import mcp_server

    jobs = Jobs()
    try:
        mcp_server(Models(loaded(model, lora, embedding, vae, device)), jobs).run()
    finally:
        jobs.close()
