"""The Model Context Protocol: tools that generate images and list models, for programs with a language model inside."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from stable_diffusion.errors import InputError
from stable_diffusion.runtime import version
from stable_diffusion.serve.door import Models
from stable_diffusion.serve.jobs import Jobs
from stable_diffusion.serve.replies import encoded, job_of, problem

MOST = 4
"""Pictures a call: each goes into the language model's context."""


def mcp_server(models: Models, jobs: Jobs) -> MCPServer:
    """The server, for ``run()`` on standard input and output.

    Args:
        models: those that clients may choose among.
        jobs: the queue.
    """
    server = MCPServer("minisd", version=version(), log_level="WARNING")

    @server.tool(title="Generate images", structured_output=False)
    async def generate_image(
        context: Context,
        prompt: Annotated[
            str, Field(description="What to generate. list_models has example prompts and styles.")
        ],
        negative_prompt: Annotated[str, Field(description="What to steer away from.")] = "",
        model: Annotated[str | None, Field(description="One of list_models; by default the first.")] = None,
        seed: Annotated[int | None, Field(ge=0, description="Equal seeds give equal pictures.")] = None,
        count: Annotated[int, Field(ge=1, le=MOST, description="How many pictures.")] = 1,
        steps: Annotated[int | None, Field(ge=1, le=150, description="By default the model's own.")] = None,
        width: Annotated[int | None, Field(ge=16, le=2048, description="In pixels.")] = None,
        height: Annotated[int | None, Field(ge=16, le=2048, description="In pixels.")] = None,
        image: Annotated[str | None, Field(description="A picture in base64 to begin with.")] = None,
        strength: Annotated[
            float | None, Field(gt=0, le=1, description="How much to change the image.")
        ] = None,
    ) -> list[Any]:
        """Generates images from words, on this machine, and returns them as PNG with the seed of each."""
        fields = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "num_images_per_prompt": count,
            "num_inference_steps": steps,
            "width": width,
            "height": height,
            "image": image,
            "strength": strength,
        }
        try:
            served = models.named(model)
            job = jobs.add(await asyncio.to_thread(job_of, served, fields))
        except InputError as error:
            raise ToolError(str(error)) from error
        try:
            async for _ in job.changes():
                progress = job.progress
                if progress.total:
                    await context.report_progress(progress.picture + progress.step / progress.total, count)
        finally:
            jobs.cancel(job)  # nothing where it is over
        if job.status != "done":
            raise ToolError("the job was cancelled" if job.error is None else problem(job.error).message)
        seeds = ", ".join(str(picture.info["settings"]["seed"]) for picture in job.pictures)
        files = await asyncio.to_thread(lambda: [encoded(picture) for picture in job.pictures])
        return [
            *(Image(data=file, format="png") for file in files),
            f"seed: {seeds}",
            *job.notes,
        ]

    @server.tool(title="List models and styles")
    def list_models() -> list[dict[str, Any]]:
        """The models to choose among: their sizes, style words, example prompts and LoRAs."""
        return [
            {
                "model": served.name,
                "width": served.config.sample_size,
                "height": served.config.sample_size,
                "styles": list(served.config.styles.words),
                "default_style": served.config.styles.default,
                "prompts": list(served.config.prompts),
                "loras": list(served.loras),
            }
            for served in models.all.values()
        ]

    return server
