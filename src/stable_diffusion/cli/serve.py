"""``minisd serve``: the page and the HTTP surfaces."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stable_diffusion.cli.show import say, tell
from stable_diffusion.errors import InputError, shown
from stable_diffusion.generation.given import split_file
from stable_diffusion.generation.request import parse
from stable_diffusion.runtime import one_thread, stop_signals, watched

if TYPE_CHECKING:
    from stable_diffusion import DiffusionModel
    from stable_diffusion.serve.door import Served

NEEDED = ("starlette", "uvicorn", "python_multipart")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that stand for all, and one of them."""
KEY = "MINISD_API_KEY"

Several = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def serve(
    model: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    api_key: str | None = None,
    lora: Several = (),
    embedding: Several = (),
    vae: str | None = None,
    device: str | None = None,
    prompt_syntax: Literal["a1111", "plain"] = "a1111",
    allow_origin: Several = (),
    allow_host: Several = (),
    open_: Annotated[bool, tyro.conf.arg(name="open")] = False,
) -> None:
    """Serve a page that generates pictures, and the HTTP interfaces of OpenAI and AUTOMATIC1111, until it is stopped.

    Args:
        model: Models that the page and programs choose among: folders, single files or hub names (owner/name). By
            default the model that the package carries.
        host: Address to listen at. One that other machines can reach needs a key.
        port: Port to listen on; 0 takes a free one.
        api_key: What programs must know, as a Bearer token, and the page as a password. Other users of this machine
            see the words of a command: the environment variable MINISD_API_KEY takes the key too.
        lora: A LoRA that requests can use, FILE or FILE:WEIGHT, by the file's name; may be repeated.
        embedding: A textual inversion, FILE or FILE:TOKEN; may be repeated.
        vae: Another autoencoder for the models: a folder or file of Stable Diffusion's, or TAESD's.
        device: cuda, mps or cpu. By default the first of these that is there.
        prompt_syntax: How the page and AUTOMATIC1111's interface read prompts: a1111 takes (word:1.3) for a weight,
            plain takes all for words.
        allow_origin: Another web site, such as https://example.org, whose pages may ask; may be repeated.
        allow_host: Another name of this server, such as a proxy's; may be repeated. What a proxy on this machine says
            of its clients' addresses is then believed.
        open_: Open the page in a browser.
    """
    key = _key(api_key)
    origins = frozenset(map(_origin, allow_origin))
    names = frozenset((*LOOPBACK, host.lower(), *map(_host, allow_host)))
    if not all(map(importlib.util.find_spec, NEEDED)):
        raise InputError("minisd serve needs the extra: pip install 'mini-stable-diffusion[serve]'")
    from stable_diffusion.serve.listen import bound, is_loopback

    listening = bound(host, port)  # first: reading a model takes a while, and the port may be taken
    with listening:
        if key is None and not is_loopback(listening):
            raise InputError(
                f"--host {host} lets other machines in: give --api-key KEY or set {KEY}, or leave --host out"
            )
        from stable_diffusion.serve.app import application
        from stable_diffusion.serve.door import Models
        from stable_diffusion.serve.guard import Rules
        from stable_diffusion.serve.jobs import Jobs
        from stable_diffusion.serve.listen import Listener
        from stable_diffusion.serve.replies import Server

        server = Server(
            models=Models(loaded(model, lora, embedding, vae, device)),
            jobs=Jobs(),
            prompt_syntax=prompt_syntax,
        )
        address = _address(listening.getsockname())

        def ready() -> None:
            everywhere = " and at this machine's other addresses" if host in EVERYWHERE else ""
            say(f"minisd serves {', '.join(server.models.all)} at {address}{everywhere}")
            if watched():
                tell("minisd: Ctrl-C stops it")
            if open_:
                import webbrowser

                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

        rules = Rules(hosts=names, key=key, origins=origins)
        listener = Listener(application(server, rules), server.jobs, ready, proxied=bool(allow_host))

        def stop(number: int, _: object) -> None:
            if (
                listener.should_exit
            ):  # asked twice: nothing is waited for, and nothing is on the disk to be tidied
                tell("minisd: stopped")
                os._exit(128 + number)
            listener.should_exit = True

        with stop_signals(stop):
            listener.run([listening])
    # To be stopped is how a server ends: no failure, which 143 would be to systemd and others.
    tell("minisd: stopped")


def _key(given: str | None) -> str | None:
    """The key, of the command or of the environment. Raises InputError for one that no header can hold."""
    key = (os.environ.get(KEY) or None) if given is None else given
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise InputError(
            "the key must be of letters, digits and signs of ASCII, without spaces: give another --api-key"
        )
    return key


def _origin(text: str) -> str:
    origin = text.rstrip("/").lower()
    if not re.fullmatch(r"https?://[^\s/*@]+", origin):
        raise InputError(f"--allow-origin must be one site, such as https://example.org, got {shown(text)}")
    return origin


def _host(text: str) -> str:
    name = text.lower().removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"[\w.-]+|[0-9a-f:.]*:[0-9a-f:.]*:[0-9a-f:.]*", name):  # the second is IPv6
        raise InputError(
            f"--allow-host must be a name without a port, such as example.org, got {shown(text)}"
        )
    return name


def _address(socket_name: Sequence[Any]) -> str:
    host, port = EVERYWHERE.get(socket_name[0], socket_name[0]), socket_name[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def loaded(
    paths: Sequence[str], lora: Sequence[str], embedding: Sequence[str], vae: str | None, device: str | None
) -> list[Served]:
    """The models under their names, with what was named for them."""
    with one_thread():  # it is another one that generates
        return _loaded(paths, lora, embedding, vae, device)


def _loaded(
    paths: Sequence[str], lora: Sequence[str], embedding: Sequence[str], vae: str | None, device: str | None
) -> list[Served]:
    from stable_diffusion import Config, DiffusionModel
    from stable_diffusion.serve.door import Served

    where = Config(device).DEVICE
    models: dict[str, DiffusionModel] = {}
    for path in paths or (None,):
        model = DiffusionModel.from_pretrained(path, vae=vae)
        for note in model.notes:
            warnings.warn(note, stacklevel=1)
        name = model.config.name if path is None else _name(path)
        if name in models:
            raise InputError(f"two models are called {name}: give one of them another name on the disk")
        models[name] = model
    for file, weight in parse({"lora": [*lora]})["lora"].items():
        _give(models, file, partial(_add_lora, file=file, weight=weight))
    for text in embedding:
        _give(models, text, partial(_add_embedding, text=text))
    created = int(time.time())
    return [Served(name=name, model=model.to(where), created=created) for name, model in models.items()]


def _name(path: str) -> str:
    """What a model is called: as its folder or file; training calls all of them "model" and puts them into a folder."""
    place = Path(path)
    if place.exists():
        place = place.resolve()
    if place.name == "model" and place.parent.name:
        place = place.parent
    return place.stem if place.suffix in (".safetensors", ".ckpt") else place.name


def _add_lora(model: DiffusionModel, file: str, weight: float) -> None:
    tell(model.load_lora(file, weight))


def _add_embedding(model: DiffusionModel, text: str) -> None:
    tell(f"prompts can have {', '.join(model.load_textual_inversion(*split_file(text)))}")


def _give(models: Mapping[str, DiffusionModel], what: str, give: Callable[[DiffusionModel], object]) -> None:
    """Gives a file to the models that it is for. Raises InputError where it is for none."""
    refusals: list[InputError] = []
    for model in models.values():
        try:
            give(model)
        except InputError as error:
            refusals.append(error)
    if len(refusals) == len(models):
        raise refusals[0]
    for refusal in refusals:
        tell(f"minisd: note: {what} is not for every model: {refusal}")
