"""What training a network takes: one step is traced on its own rows, and every byte of the peak has a name.

    floor          Python, torch and what else this process holds, after a step has loaded what steps need
    frozen         the network: codes, scales, dense weights, biases, statistics
    adapter        its tensors
    optimizer      moments and scratch
    step           the most that is alive at once between two steps: activations, gradients, dequantized weights

`step` is measured: every tensor storage that an operator of a forward and backward pass makes is counted from its
creation to its end, with batches of one and of two rows. The rest is a straight line through both. What kernels
allocate inside themselves is not seen; a share of `step` is kept free for it (`RESERVE_SHARE`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.device import DeviceProfile, load_device
from edgetune.errors import BudgetError, ConfigError, DataError
from edgetune.memory import anonymous_bytes, format_mib, trim_allocator
from edgetune.modules.attached import AttachedModule
from edgetune.modules.layers import FrozenLayer
from edgetune.optimizers import OPTIMIZERS

BATCH_SIZE = 16
RESERVE_SHARE, RESERVE_BYTES = 0.25, 8 << 20
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ModulePlan:
    """The bytes of a network's training, by part, and the batch that fits."""

    device: str
    simulated: bool
    "the device does not run torch itself; this machine stands in for it"
    budget_bytes: int
    batch_size: int
    wanted_batch_size: int
    optimizer: str
    parts: dict[str, int]
    reserve_bytes: int

    @property
    def predicted_peak_bytes(self) -> int:
        """The sum of the parts; `reserve_bytes` more are kept free."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"predicted_peak_bytes": self.predicted_peak_bytes}

    def explain(self) -> str:
        """For people: a line for each part."""
        lines = [f"{self.device}{' (simulated)' if self.simulated else ''}: batches of {self.batch_size}"]
        if self.batch_size < self.wanted_batch_size:
            lines[0] += f" rather than {self.wanted_batch_size}, which the budget does not hold"
        lines += [f"  {name:10} {format_mib(size):>12}" for name, size in self.parts.items()]
        lines.append(f"  {'peak':10} {format_mib(self.predicted_peak_bytes):>12}   of {format_mib(self.budget_bytes)}")
        return "\n".join(lines)


def plan_module(
    attached: AttachedModule,
    inputs: torch.Tensor | Sequence[torch.Tensor],
    targets: torch.Tensor,
    device: DeviceProfile | str | Path,
    *,
    loss: Loss,
    batch_size: int | None = None,
    optimizer: str = "adamw",
) -> ModulePlan:
    """Predict the peak of training on rows like these, and choose the batch.

    Args:
        attached: what `attach` gave.
        inputs: the rows, [rows, …], one tensor for each input of the network; the first two are traced.
        targets: what `loss` compares with, [rows, …].
        device: the profile, its id or its file.
        loss: of the network's output and the targets of a batch, a mean over its rows.
        batch_size: rows of a batch; None begins at 16 and takes the half of that until it fits.
        optimizer: one of `OPTIMIZERS`.

    Raises:
        BudgetError: not even a batch of one fits, or not the one that was asked for.
        DataError: inputs and targets are no rows, or the loss is no finite number with gradients.
        ConfigError, DeviceError: a setting is none.
    """
    profile = device if isinstance(device, DeviceProfile) else load_device(device)
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer = {optimizer!r}; choose from {', '.join(OPTIMIZERS)}.")
    rows = as_rows(inputs, targets)
    trim_allocator()
    step_bytes = _line(attached, rows, loss)
    frozen, adapter = attached.frozen_nbytes, attached.adapter_nbytes
    sizes = [value.numel() for value in attached.trainable().values()]
    info, limit = OPTIMIZERS[optimizer], profile.memory.budget_mib << 20
    parts = {
        "floor": max(0, anonymous_bytes() - frozen - adapter), "frozen": frozen, "adapter": adapter,
        "optimizer": info.state_bytes(sizes) + info.scratch_bytes(sizes),
    }  # fmt: skip
    wanted = min(BATCH_SIZE, len(targets)) if batch_size is None else batch_size
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(f"batch_size = {wanted!r}; an integer of at least 1 was expected.")
    for size in _sizes(wanted, fixed=batch_size is not None):
        step = step_bytes(size)
        reserve = RESERVE_BYTES + int(RESERVE_SHARE * step)
        if sum(parts.values()) + step + reserve <= limit:
            simulated = profile.kind not in ("host", "board")
            return ModulePlan(
                profile.id, simulated, limit, size, wanted, optimizer, parts | {"step": step}, reserve
            )  # fmt: skip
    raise BudgetError(
        f"a batch of {size} needs {format_mib(sum(parts.values()) + step + reserve)} with {format_mib(reserve)} of "
        f"reserve; {profile.id} allows {format_mib(limit)}. This process holds {format_mib(parts['floor'])} beside the "
        f"network, a step {format_mib(step)}. "
        + (
            "Ask for a smaller batch_size."
            if size > 1 and sum(parts.values()) + step_bytes(1) + RESERVE_BYTES < limit
            else "Train in a new process, which imports and holds nothing else."
        )
    )


def as_rows(
    inputs: torch.Tensor | Sequence[torch.Tensor], targets: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Inputs as a tuple, checked to have as many rows as the targets. Raises DataError."""
    parts = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    wrong = [value for value in (*parts, targets) if not isinstance(value, torch.Tensor) or not value.dim()]
    if wrong or not parts:
        raise DataError("inputs and targets have to be tensors [rows, …]. Make arrays tensors with torch.from_numpy.")
    counts = [len(value) for value in (*parts, targets)]
    if len(set(counts)) > 1 or not counts[0]:
        raise DataError(f"inputs and targets have {counts} rows; as many of each were expected, and at least one.")
    return parts, targets


def mean_loss(attached: AttachedModule, inputs: Sequence[torch.Tensor], targets: torch.Tensor, loss: Loss) -> Any:
    """The loss of a batch. Raises DataError where it is no number with gradients."""
    value = loss(attached(*inputs), targets)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise DataError(
            "loss gives no single number with gradients. It takes the network's output and the targets of a batch, as "
            "torch.nn.functional.cross_entropy does; nothing in forward() may detach."
        )
    return value


def _sizes(wanted: int, *, fixed: bool) -> Iterator[int]:
    yield wanted
    while not fixed and wanted > 1:
        wanted //= 2
        yield wanted


def _line(
    attached: AttachedModule, rows: tuple[tuple[torch.Tensor, ...], torch.Tensor], loss: Loss
) -> Callable[[int], int]:
    """Bytes of a step by the rows of its batch, from steps of one and of two."""
    inputs, targets = rows
    training = attached.training
    attached.train()
    found = []
    try:
        for count in (1, 2):
            at = torch.arange(count) % len(targets)
            found.append(_traced_bytes(attached, [value[at] for value in inputs], targets[at], loss))
    finally:
        attached.train(training)
    by_row = max(0, found[1] - found[0])
    return lambda count: found[0] + (count - 1) * by_row


def _traced_bytes(attached: AttachedModule, inputs: Sequence[torch.Tensor], targets: torch.Tensor, loss: Loss) -> int:
    """The most bytes of tensors that were alive at once in a step, gradients included, beside what was there before.

    A frozen layer on a grid dequantizes outside of torch: its dense weight is added where it is the largest.
    """
    with torch.random.fork_rng(devices=[]), _Ledger() as ledger:
        mean_loss(attached, inputs, targets, loss).backward()
    for value in attached.trainable().values():
        value.grad = None
    on_grid = [
        layer.frozen.matrix for layer in attached.modules() if isinstance(layer, FrozenLayer) and layer.frozen.grid
    ]
    peak: int = ledger.peak_bytes
    return peak + 2 * max((4 * rows * columns for rows, columns in on_grid), default=0)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators made and that are still alive; `peak_bytes` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.peak_bytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(value)._cdata for value in pytree.tree_leaves((args, kwargs)) if _is_tensor(value)}
        result = func(*args, **(kwargs or {}))
        for value in filter(_is_tensor, pytree.tree_leaves(result)):
            storage = _storage(value)
            if storage._cdata not in before and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak_bytes = max(self.peak_bytes, sum(self.alive.values()))
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(value: torch.Tensor) -> Any:
    return value.untyped_storage()
