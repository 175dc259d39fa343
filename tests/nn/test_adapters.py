"""Adapters: what acts beside a layer is what merging gives, costs the weights nothing, and is a thread's own."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stable_diffusion.errors import InputError
from stable_diffusion.nn.adapters import Adapters, Layer, LoRA
from stable_diffusion.nn.blocks import PerPixel
from tests.nn.reference import normal

LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 8), (2, 5, 6)),
    "linear without bias": (nn.Linear(6, 8, bias=False), (2, 6)),
    "per pixel": (PerPixel(6), (2, 5, 6)),
    "3x3": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 7)),
    "strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "1x1": (nn.Conv2d(6, 8, 1), (2, 6, 5, 7)),
}


def adapter(layer: Layer, kind: str = "plain", seed: int = 0, rank: int = 3) -> LoRA:
    weight = layer.weight
    up, down = normal(len(weight), rank, seed=seed), normal(rank, *weight.shape[1:], seed=seed + 1)
    if kind == "tucker":
        kernel = weight.shape[2:] or (1, 1)
        mid, down = normal(rank, rank, *kernel, seed=seed + 2), normal(rank, weight.shape[1], 1, 1, seed=seed)
        return LoRA(up[:, :, None, None], down, mid=mid, scale=0.5)
    magnitude = None
    if kind in ("rows", "columns"):
        axis = int(kind == "columns")
        shape = [n if i == axis else 1 for i, n in enumerate(weight.shape)]
        magnitude = normal(*shape, seed=seed + 3).abs() + 1
    return LoRA(up, down, scale=0.5, magnitude=magnitude)


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)).double()


def loaded(network: nn.Sequential, *kinds: str) -> Adapters:
    """One adapter of each kind on both linear layers, called a, b and so on."""
    adapters = Adapters()
    for i, kind in enumerate(kinds):
        loras = {network[j]: adapter(network[j], kind, seed=10 * i + j) for j in (0, 2)}
        adapters.add("abcd"[i], loras)
    return adapters


@pytest.mark.parametrize(
    "kinds", [("plain",), ("tucker",), ("rows",), ("columns",), ("plain", "rows", "tucker")]
)
@pytest.mark.parametrize("name", LAYERS)
def test_acting_beside_a_layer_is_merging(name: str, kinds: tuple[str, ...]) -> None:
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double()
    x, adapters = normal(*shape), Adapters()
    plain = layer(x)
    for i, kind in enumerate(kinds):
        adapters.add("abc"[i], {layer: adapter(layer, kind, seed=10 * i)}, 0.7 - i)
    acted = layer(x)
    assert (acted - plain).abs().amax() > 0.1
    adapters.fuse()
    merged = layer(x)
    torch.testing.assert_close(acted, merged, rtol=1e-12, atol=1e-12)
    adapters.unfuse()
    assert torch.equal(layer(x), acted)
    with adapters.active({}):
        assert torch.equal(layer(x), plain)


def test_the_change_is_the_formula(network: nn.Sequential) -> None:
    layer, x = network[0], normal(3, 6)
    up, down = normal(6, 2, seed=1), normal(2, 6, seed=2)
    adapters, plain = Adapters(), layer(x)
    adapters.add("a", {layer: LoRA(up, down, scale=0.25)}, -0.5)
    torch.testing.assert_close(layer(x), plain - 0.125 * x @ down.T @ up.T, rtol=1e-12, atol=1e-12)
    with adapters.active({"a": 3}):
        torch.testing.assert_close(layer(x), plain + 0.75 * x @ down.T @ up.T, rtol=1e-12, atol=1e-12)


def test_plain_ones_add_up_and_magnitudes_see_what_came_before(network: nn.Sequential) -> None:
    x, found = normal(3, 6), {}
    for order in (("plain", "rows"), ("rows", "plain")):
        adapters = loaded(copied := copy.deepcopy(network), *order)
        found[order] = copied(x)
        assert list(adapters.weights) == ["a", "b"]
    assert (found["plain", "rows"] - found["rows", "plain"]).abs().amax() > 1e-2
    pair = [adapter(network[0], seed=seed) for seed in (0, 5)]
    outputs = []
    for order in (pair, pair[::-1]):
        adapters = Adapters()
        for i, lora in enumerate(order):
            adapters.add(str(i), {network[0]: lora})
        outputs.append(network(x))
        for name in list(adapters.weights):
            adapters.remove(name)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


def test_no_weight_ever_changes_and_nothing_is_left(network: nn.Sequential) -> None:
    x, before = normal(3, 6), copy.deepcopy(network.state_dict())
    plain = network(x)
    adapters = loaded(network, "plain", "rows")
    holder = nn.ModuleList([network, adapters])
    names = [f"0.{name}" for name in before]
    assert list(holder.state_dict()) == names
    adapters.fuse({"a": 0.5})
    adapters.fuse({"b": -0.3, "a": 0.0})
    assert adapters.fused == {"b": -0.3}
    assert list(holder.state_dict()) == names
    assert any(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(InputError, match="LoRAs fused into the weights: unfuse them"):
        network.load_state_dict(before)
    adapters.unfuse()
    network.load_state_dict(before)
    adapters.weights["a"] = 0.1
    network(x)
    adapters.remove("a")
    adapters.remove("b")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(network(x), plain)
    assert not len(adapters.places)
    assert not any(layer._forward_hooks for layer in network)


def test_what_fuse_kept_follows_the_model(network: nn.Sequential) -> None:
    """Going to float32 and back with a fused adapter gives the weights that going alone gives."""
    alone = copy.deepcopy(network).float().double()
    adapters = loaded(network, "plain")
    holder = nn.ModuleList([network, adapters])
    adapters.fuse()
    holder.float()
    assert network(normal(3, 6).float()).dtype == torch.float32
    holder.double()
    adapters.unfuse()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name])


def test_fused_ones_do_not_act_twice(network: nn.Sequential) -> None:
    x = normal(3, 6)
    adapters = loaded(network, "plain", "plain")
    wanted = network(x)
    adapters.fuse({"a": 1.0})
    torch.testing.assert_close(network(x), wanted, rtol=1e-12, atol=1e-12)
    with adapters.active({"a": 1.0, "b": 1.0}):
        torch.testing.assert_close(network(x), wanted, rtol=1e-12, atol=1e-12)


def test_weights_are_a_threads_own(network: nn.Sequential) -> None:
    x, adapters = normal(3, 6), loaded(network, "plain", "rows")
    requests = [{"a": 0.1 * i, "b": 0.5 - 0.05 * i} for i in range(8)]

    def run(weights: dict[str, float]) -> list[Tensor]:
        with adapters.active(weights):
            return [network(x) for _ in range(20)]

    serial = [run(weights) for weights in requests]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(run, requests))
    assert all(
        torch.equal(one, other)
        for ones, others in zip(serial, parallel, strict=True)
        for one, other in zip(ones, others, strict=True)
    )
    assert len({outputs[0].sum().item() for outputs in serial}) == 8


def test_active_ends_and_nests_and_is_for_its_own_model(network: nn.Sequential) -> None:
    x, adapters = normal(3, 6), loaded(network, "plain")
    other = copy.deepcopy(nn.Sequential(nn.Linear(6, 6)).double())
    others = Adapters()
    others.add("a", {other[0]: adapter(other[0])})
    default, elsewhere = network(x), other(x)
    with pytest.raises(ZeroDivisionError), adapters.active({"a": 2}):
        twice = network(x)
        assert torch.equal(other(x), elsewhere)
        with adapters.active({"a": 1}), others.active({}):
            assert torch.equal(network(x), default)
            assert not torch.equal(other(x), elsewhere)
        assert torch.equal(network(x), twice)
        raise ZeroDivisionError
    assert torch.equal(network(x), default)
    assert not torch.equal(twice, default)


def test_what_is_refused(network: nn.Sequential) -> None:
    adapters = loaded(network, "plain")
    before = copy.deepcopy(network.state_dict())
    refused: list[tuple[str, Any]] = [
        ("there is a LoRA named 'a' already", lambda: adapters.add("a", {})),
        ("unknown LoRA 'x': choose one of a", lambda: adapters.remove("x")),
        ("unknown LoRA 'x'", lambda: adapters.fuse({"x": 1})),
        ("weight must be a number, got nan for 'a'", lambda: adapters.fuse({"a": math.nan})),
        ("weight must be a number, got True for 'b'", lambda: adapters.add("b", {}, True)),
        ("would make the weights infinite", lambda: adapters.fuse({"a": 1e308})),
        ("unknown LoRA 'x'", adapters.active({"x": 1}).__enter__),
    ]
    for message, call in refused:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(adapters.weights) == ["a"]
    assert not adapters.fused
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    adapters.fuse()
    with pytest.raises(InputError, match="'a' is fused: unfuse before"):
        adapters.remove("a")
    with pytest.raises(InputError, match=r"fused with the weight 1.0: unfuse"), adapters.active({"a": 0.5}):
        pass
