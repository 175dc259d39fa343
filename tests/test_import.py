"""Taste: what an import costs and which way it points; and that nothing reaches for the network or prints inside."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stable_diffusion
from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS

PACKAGE = Path(stable_diffusion.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
DEFAULTS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")
"""Scheduler classes whose own defaults and forms the reader and the writer of diffusers' folders know."""

# The rooms from the top down: each may import those that stand below it in this list, and none beside it. `names` is
# the table diffusion/names.py, which has no need of torch and which configurations are checked against.
ROOMS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"serve"},
    {"__init__"},
    {"model"},
    {"parts", "progress"},
    {"training", "evaluation"},
    {"generation", "checkpoints"},
    {"nn", "diffusion", "data"},
    {"compiled", "images", "utils"},
    {"config", "files", "runtime"},
    {"fields", "names"},
    {"errors"},
]


def part(path: Path) -> str:
    """The top-level part that a module belongs to, such as ``nn``."""
    relative = path.relative_to(PACKAGE)
    if relative.parts == ("diffusion", "names.py"):
        return "names"
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """The parts of the package that a module imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    homes = stable_diffusion._HOMES
    names = [name.split(".") for name in found if name.startswith("stable_diffusion.")]
    return {
        "names" if name[1:3] == ["diffusion", "names"] else homes.get(name[1], name[1]).split(".")[0]
        for name in names
    }


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("HOME", "HF_HOME", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_imports_point_one_way(path: Path) -> None:
    assert upward(part(path), imports(path)) == set()


def upward(room: str, imported: set[str]) -> set[str]:
    """What of these a room may not import."""
    (floor,) = (i for i, rooms in enumerate(ROOMS) if room in rooms)
    below = set().union(*ROOMS[floor + 1 :])
    return imported - below - {room}


def test_the_rooms_are_all_there_is() -> None:
    assert {part(path) for path in MODULES} == set().union(*ROOMS)


def test_an_import_that_points_up_is_seen() -> None:
    """The checks above can fail: on the package's own files, were they elsewhere."""
    assert {"nn", "diffusion"} <= upward("data", imports(PACKAGE / "generation" / "pipeline.py"))
    assert upward("generation", imports(PACKAGE / "cli" / "generate.py")) >= {"config", "model"} - {"config"}
    assert upward("data", {"config", "errors"}) == set()
    assert upward("nn", {"diffusion"}) == {"diffusion"}


def test_no_file_is_too_long_to_read() -> None:
    """In lines of text: the front door 300, any other file but the settings 400."""
    most = {"model.py": 300, "config.py": 470}
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert not {name: count for name, count in lengths.items() if count > most.get(name, 400)}


def test_what_samplers_are_called_elsewhere_stands_in_one_file() -> None:
    names = [
        alias for row in SAMPLERS.values() for alias in (row.webui, row.diffusers) if alias not in DEFAULTS
    ]
    spacings = [key for row in SPACINGS.values() for key in row.diffusers if key.startswith("use_")]
    found = {
        str(path.relative_to(PACKAGE)): name
        for path in MODULES
        for name in (*names, *spacings)
        if re.search(rf"[\"'`]{re.escape(name)}[\"'`]", path.read_text("utf-8"))
    }
    assert found.keys() == {"diffusion/names.py"}, found


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion.cli", "stable_diffusion.config"])
def test_an_import_brings_no_heavy_library(name: str) -> None:
    heavy = (
        "torch",
        "transformers",
        "diffusers",
        "accelerate",
        "tokenizers",
        "safetensors",
        "PIL",
        "numpy",
        "tqdm",
        "starlette",
        "uvicorn",
    )
    done = run(f"import sys, {name}; print(*sorted(set({heavy}) & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    allowed = {"stable_diffusion.cli": {"numpy", "PIL"}}.get(name, set())
    assert set(done.stdout.split()) <= allowed


def test_the_whole_package_needs_no_library_of_the_tests() -> None:
    names = [".".join(("stable_diffusion", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in MODULES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    forbidden = ("transformers", "diffusers", "scipy", "beartype", "pytest", "huggingface_hub.hf_api")
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    done = run(code + f"print(*(set({forbidden}) & set(sys.modules)))")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize(("command", "option"), [("generate", "--guidance"), ("serve", "--api-key")])
def test_help_needs_no_torch(command: str, option: str) -> None:
    code = f"""
import sys
from stable_diffusion import cli
try:
    cli.main(["{command}", "--help"])
except SystemExit:
    print({{"torch", "starlette", "uvicorn"}} & set(sys.modules))
"""
    done = run(code)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
    assert option in done.stdout


def test_every_public_name_resolves() -> None:
    assert sorted(stable_diffusion.__all__) == sorted(stable_diffusion._HOMES)
    for name in stable_diffusion.__all__:
        assert getattr(stable_diffusion, name).__name__ == name
    assert set(stable_diffusion.__all__) <= set(dir(stable_diffusion))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        stable_diffusion.Nothing  # noqa: B018
    from stable_diffusion.utils import Config

    assert Config is stable_diffusion.Config
    assert importlib.import_module("stable_diffusion.utils").__all__ == ["Config"]


def test_only_the_doors_print() -> None:
    """With ``print`` or by writing to a standard stream."""
    for path in MODULES:
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
        ]
        assert not calls or part(path) in ("cli", "progress"), f"{path} prints in lines {calls}"


def test_no_file_is_unpickled_or_executed() -> None:
    """PyTorch's pickles are read as weights only."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "joblib", "yaml"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert settings.get("weights_only") == "True", f"{path}:{node.lineno}"


OFFLINE = """
import socket
def refuse(*arguments, **settings):
    raise OSError("the network was touched")
class Refusing(socket.socket):
    __init__ = refuse
socket.socket, socket.create_connection, socket.getaddrinfo = Refusing, refuse, refuse
import stable_diffusion
from stable_diffusion import DiffusionModel
model = DiffusionModel("mini")
(picture,) = model.generate("a red circle", seed=0, num_inference_steps=1)
assert picture.size == (128, 128)
model.save_pretrained("saved")
from stable_diffusion import cli
cli.main(["generate", "a red circle", "--model", "saved", "--steps", "1", "--seed", "1"])
"""


def test_offline_and_without_a_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "work").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'work')!r})\n{OFFLINE}"
    done = run(code, HOME=str(home), USERPROFILE=str(home), XDG_CACHE_HOME=str(home / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(Path("pictures/a-red-circle-1.png"))
    assert list(home.rglob("*")) == []
