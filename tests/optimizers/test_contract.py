"""Every optimizer against a second implementation: torch's, a few lines of its formula, or bitsandbytes' 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.optimizers import OPTIMIZERS, TILE
from edgetune.optimizers.blockwise import BLOCK, dynamic_map
from edgetune.training.moments import BlockwiseMoment
from edgetune.training.optimizer import Optimizer

# Less than a block, some blocks and a part of one, a whole number of blocks, more than a tile.
SHAPES = {"a": (7, 5), "b": (3,), "c": (33, 41), "d": (16, 64), "e": (130, 150)}
QUANTIZED = [name for name, info in OPTIMIZERS.items() if info.quantized]


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_gradients(group: dict[str, nn.Parameter], step: int) -> None:
    """Of very different sizes, from step to step and within a tensor."""
    generator = torch.Generator().manual_seed(1000 + step)
    for value in group.values():
        sizes = torch.exp(2 * torch.randn(value.shape, generator=generator))
        value.grad = 10 ** (step % 5 - 3) * sizes * torch.randn(value.shape, generator=generator)


def sizes(group: dict[str, nn.Parameter]) -> list[int]:
    return [value.numel() for value in group.values()]


def copied(group: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.detach().clone()) for name, value in group.items()}


def test_names_say_the_rule_and_the_storage() -> None:
    for name, info in OPTIMIZERS.items():
        assert name == info.rule.NAME + ("_8bit" if info.quantized else "")
        assert info.learning_rate == info.rule.LEARNING_RATE > 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_bits_of_torch(name: str, kind: Any, weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(name, ours, weight_decay=weight_decay)
    reference = kind(theirs.values(), weight_decay=weight_decay, foreach=False)
    for step in range(30):
        rate = 0.01 / (1 + step)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        reference.param_groups[0]["lr"] = rate
        optimizer.step(rate)
        reference.step()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(value.grad is None for value in ours.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_follows_its_formula(weight_decay: float) -> None:
    ours = parameters()
    theirs = {name: value.detach().double() for name, value in ours.items()}
    momentum = {name: torch.zeros_like(value) for name, value in theirs.items()}
    optimizer = Optimizer("lion", ours, weight_decay=weight_decay)
    for step in range(100):
        set_gradients(ours, step)
        for name, value in theirs.items():
            gradient = ours[name].grad.double()
            direction = torch.sign(0.9 * momentum[name] + 0.1 * gradient)
            value -= 0.01 * (direction + weight_decay * value)
            momentum[name] = 0.99 * momentum[name] + 0.01 * gradient
        optimizer.step(0.01)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].detach().double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed: bool) -> None:
    ours, theirs = dynamic_map(signed=signed), create_dynamic_map(signed=signed).numpy()
    assert ours.dtype == np.float32 and len(np.unique(ours)) == 256
    assert (ours[0], ours[-1]) == (theirs[0], 1.0) if not signed else ours[-1] == 1.0
    assert np.abs(ours.view(np.int32).astype(int) - theirs.view(np.int32)).max() <= 2  # units in the last place


def nearest(values: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' codes and absmax. float64 takes its exact search: its float32 kernel for CPUs rounds small values
    to a grid of 2^-16 before it looks them up."""
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, BLOCK)
    return codes, absmax.float()


def blockwise(sizes: list[int], signed: bool) -> BlockwiseMoment:
    scratch = torch.empty(-(-max(sizes) // BLOCK), BLOCK)
    return BlockwiseMoment(sizes, signed, torch.empty(scratch.shape, dtype=torch.int32), scratch)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, BLOCK - 1, 4 * BLOCK, 20 * BLOCK + 37])
@pytest.mark.parametrize("scale", [1.0, 2.0**-50])
def test_blocks_are_those_of_bitsandbytes(count: int, signed: bool, scale: float) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.exp(3 * torch.randn(count, generator=generator)) * torch.randn(count, generator=generator) * scale
    values = values if signed else values.square()
    moment = blockwise([5, count], signed)
    tile = slice(0, count)
    moment.read(1, tile).copy_(values)
    moment.write(1, tile)
    codes, absmax = nearest(values, moment.map)
    if not signed:
        codes.clamp_(min=1)
    assert torch.equal(moment.stored[1:].view(-1)[:count], codes)
    assert torch.equal(moment.absmax[1:], absmax)
    assert not moment.stored[0].any() and moment.absmax[0] == 0, "the tensor beside it was touched"
    back = dequantize_blockwise(codes, absmax=absmax, code=moment.map, blocksize=BLOCK)
    assert torch.equal(moment.read(1, tile), back)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_beside_every_bound_are_those_of_a_search(signed: bool) -> None:
    bounds = blockwise([1], signed).bounds[:-1]
    beside = [bounds, *(torch.nextafter(bounds, torch.tensor(towards)) for towards in (-2.0, 2.0))]
    values = torch.cat(beside).clamp(min=-1.0 if signed else 0.0).view(-1, BLOCK - 1)
    values = torch.cat([torch.ones(len(values), 1), values], dim=1)  # the absmax of every block is 1
    moment = blockwise([values.numel()], signed)
    moment.read(0, slice(0, values.numel())).copy_(values.view(-1))
    moment.write(0, slice(0, values.numel()))
    assert torch.equal(moment.stored.long(), torch.bucketize(values, bounds))


def test_zeros_stay_zeros() -> None:
    moment = blockwise([300], False)
    for _ in range(2):
        assert not moment.read(0, slice(0, 300)).any()
        moment.write(0, slice(0, 300))


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_step_is_the_rule_between_bitsandbytes_blocks(name: str) -> None:
    """The rule itself is tested above; here it is applied to whole tensors, and to moments that bitsandbytes stores."""
    info, ours, theirs = OPTIMIZERS[name], parameters(), parameters()
    optimizer = Optimizer(name, ours, weight_decay=0.1)
    maps = {kind: torch.from_numpy(dynamic_map(signed=signed)) for kind, signed in info.rule.MOMENTS.items()}
    kept = {(key, kind): torch.zeros(value.numel()) for key, value in theirs.items() for kind in maps}
    for step in range(12):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(0.01)
        for key, value in theirs.items():
            moments = [kept[key, kind] for kind in maps]
            gradient = value.grad.view(-1)
            info.rule.update(
                value.data.view(-1), gradient, *moments, learning_rate=0.01, weight_decay=0.1, updates=step + 1
            )
            for kind, code in maps.items():
                codes, absmax = nearest(kept[key, kind], code)
                if not info.rule.MOMENTS[kind]:
                    codes.clamp_(min=1)
                kept[key, kind] = dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=BLOCK)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)


def test_small_gradients_beside_large_ones_make_no_large_step() -> None:
    """The second moment of the small ones is below the smallest code of their block."""
    group = {"a": nn.Parameter(torch.zeros(BLOCK))}
    optimizer = Optimizer("adamw_8bit", group, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        gradient = 1e-5 * (torch.randn(BLOCK, generator=generator) + 0.3)
        gradient[0] = 1e-2
        before = group["a"].detach().clone()
        group["a"].grad = gradient
        optimizer.step(1e-3)
        assert (group["a"] - before).abs().max() < 3e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_out_and_back_in(name: str) -> None:
    group = parameters()
    first = Optimizer(name, group, weight_decay=0.1)
    for step in range(3):
        set_gradients(group, step)
        first.step(0.01)
    saved = {key: value.copy() for key, value in first.tensors().items()}
    copies = copied(group)
    second = Optimizer(name, copies, weight_decay=0.1)
    second.load(saved, first.updates)
    for optimizer, values in ((first, group), (second, copies)):
        set_gradients(values, 9)
        optimizer.step(0.01)
    assert all(torch.equal(group[key], copies[key]) for key in group)
    assert all(np.array_equal(value, second.tensors()[key]) for key, value in first.tensors().items())


def held(value: Any) -> dict[int, int]:
    """Storage -> bytes of every tensor that an object keeps, its parameters apart."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    if isinstance(value, dict):
        return {at: size for one in value.values() for at, size in held(one).items()}
    named = getattr(value, "__dict__", {})
    return held({key: one for key, one in named.items() if key != "parameters"})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_bytes_are_counted(name: str) -> None:
    for group in (parameters(), {"c": parameters()["c"]}):
        info, optimizer = OPTIMIZERS[name], Optimizer(name, group, weight_decay=0.0)
        set_gradients(group, 0)
        optimizer.step(0.01)
        state = sum(value.nbytes for value in optimizer.tensors().values())
        assert state == info.state_bytes(sizes(group))
        assert sum(held(optimizer).values()) == state + info.scratch_bytes(sizes(group))


def test_bytes_per_parameter() -> None:
    per_parameter = {name: info.state_bytes([1 << 20]) / (1 << 20) for name, info in OPTIMIZERS.items()}
    assert per_parameter == {"adamw": 8, "adamw_8bit": 2.03125, "lion": 4, "lion_8bit": 1.015625, "sgd": 0}


class Allocations(TorchDispatchMode):
    """The bytes of every result that lies in none of the operation's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {x.untyped_storage().data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        result = operation(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in before:
            self.sizes.append(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_allocates_next_to_nothing(name: str) -> None:
    group = parameters()
    optimizer = Optimizer(name, group, weight_decay=0.1)
    for step in range(2):
        set_gradients(group, step)
        with Allocations() as made:
            optimizer.step(0.01)
    assert max(made.sizes, default=0) <= 4 * TILE // BLOCK
