"""edgetune: fine-tuning inside the memory and compute of a phone, a watch or a small board.

    device = load_device("pixel-9")                      what the device can give
    plan(model, device) -> Plan                          what will run, and every byte of its peak
    quantize(model, grid=plan.grid, out=) -> base/       frozen weights in 4 bits
    train(plan, base, data=, out=) -> Run                an adapter, inside the budget
    export(run, out=) -> Bundle                          ONNX that stock onnxruntime runs
    personalize(bundle, data=, out=) -> Run              on the device: an adapter from its user's own rows
    generate(bundle, prompt) · bench(bundle, device)     text, and numbers against the profile
    embed(bundle, texts)                                 embeddings, from the bundle of an encoder
    write_report(run, bundle) -> Path                    all of it on one HTML page

    attach(net, adapter)                                 any torch.nn.Module: frozen in 4 bits, with LoRA
    plan_module · train_module · budget(device)          its training inside a device's budget
    export_module(net, example, out=) · bench_module     its bundle, and numbers

Names are loaded when they are first used: `import edgetune` imports neither numpy nor torch nor onnxruntime, and a
device without the extra `[train]` has everything that it can run.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgetune.errors import (
    AdapterError,
    BudgetError,
    BundleError,
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    EdgetuneError,
    EdgetuneWarning,
    ExportError,
    GateError,
    MissingExtraError,
    ModelError,
    ParityError,
)
from edgetune.extras import missing_extra

if TYPE_CHECKING:
    from edgetune.adapters.bitfit import BitfitConfig
    from edgetune.adapters.bottleneck import BottleneckConfig
    from edgetune.adapters.dora import DoraConfig
    from edgetune.adapters.full import FullConfig
    from edgetune.adapters.ia3 import Ia3Config
    from edgetune.adapters.ln_tuning import LnTuningConfig
    from edgetune.adapters.lora import LoraConfig
    from edgetune.adapters.loreft import LoreftConfig
    from edgetune.adapters.lst import LstConfig
    from edgetune.adapters.p_tuning import PTuningConfig
    from edgetune.adapters.prefix import PrefixConfig
    from edgetune.adapters.prompt import PromptConfig
    from edgetune.adapters.vera import VeraConfig
    from edgetune.arithmetic import merge_adapters
    from edgetune.benchmark import bench
    from edgetune.bundle import Bundle, EncoderBundle
    from edgetune.data_check import check_data
    from edgetune.device import DeviceProfile, list_devices, load_device
    from edgetune.evaluation import evaluate
    from edgetune.exporter import export
    from edgetune.modules.attached import AttachedModule, attach
    from edgetune.modules.bench import bench_module
    from edgetune.modules.budget import budget
    from edgetune.modules.bundle import ModuleBundle
    from edgetune.modules.exporter import export_module
    from edgetune.modules.plan import ModulePlan, plan_module
    from edgetune.modules.trainer import train_module
    from edgetune.personalizer import personalize
    from edgetune.planner import Plan, TrainConfig, plan
    from edgetune.quantizer import quantize
    from edgetune.report import write_report
    from edgetune.runtime.adapters import (
        add_adapter,
        check_adapters,
        list_adapters,
        remove_adapter,
        set_default_adapter,
    )
    from edgetune.runtime.embedding import embed
    from edgetune.runtime.generate import generate
    from edgetune.training.loop import train
    from edgetune.training.run import Run
    from edgetune.training.sensitivity import allocate_ranks

__version__ = "0.1.0"

# From 1.29 on the official packages of onnxruntime send usage events to Microsoft, on Linux and phones too. That has to
# be switched off before it is loaded: its own `disable_telemetry_events()` comes too late. A value of yours stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "AdapterError",
    "AttachedModule",
    "BitfitConfig",
    "BottleneckConfig",
    "BudgetError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "DeviceProfile",
    "DoraConfig",
    "EdgetuneError",
    "EdgetuneWarning",
    "EncoderBundle",
    "ExportError",
    "FullConfig",
    "GateError",
    "Ia3Config",
    "LnTuningConfig",
    "LoraConfig",
    "LoreftConfig",
    "LstConfig",
    "MissingExtraError",
    "ModelError",
    "ModuleBundle",
    "ModulePlan",
    "PTuningConfig",
    "ParityError",
    "Plan",
    "PrefixConfig",
    "PromptConfig",
    "Run",
    "TrainConfig",
    "VeraConfig",
    "add_adapter",
    "allocate_ranks",
    "attach",
    "bench",
    "bench_module",
    "budget",
    "check_adapters",
    "check_data",
    "embed",
    "evaluate",
    "export",
    "export_module",
    "generate",
    "list_adapters",
    "list_devices",
    "load_device",
    "merge_adapters",
    "personalize",
    "plan",
    "plan_module",
    "quantize",
    "remove_adapter",
    "set_default_adapter",
    "train",
    "train_module",
    "write_report",
]

# Public name -> module. No module shares its name with a function here, or the second `et.plan` would be the module.
_HOME = {
    "AttachedModule": "edgetune.modules.attached",
    "BitfitConfig": "edgetune.adapters.bitfit",
    "BottleneckConfig": "edgetune.adapters.bottleneck",
    "Bundle": "edgetune.bundle",
    "DeviceProfile": "edgetune.device",
    "DoraConfig": "edgetune.adapters.dora",
    "EncoderBundle": "edgetune.bundle",
    "FullConfig": "edgetune.adapters.full",
    "Ia3Config": "edgetune.adapters.ia3",
    "LstConfig": "edgetune.adapters.lst",
    "LnTuningConfig": "edgetune.adapters.ln_tuning",
    "LoraConfig": "edgetune.adapters.lora",
    "LoreftConfig": "edgetune.adapters.loreft",
    "ModuleBundle": "edgetune.modules.bundle",
    "ModulePlan": "edgetune.modules.plan",
    "PTuningConfig": "edgetune.adapters.p_tuning",
    "Plan": "edgetune.planner",
    "PrefixConfig": "edgetune.adapters.prefix",
    "PromptConfig": "edgetune.adapters.prompt",
    "Run": "edgetune.training.run",
    "TrainConfig": "edgetune.planner",
    "VeraConfig": "edgetune.adapters.vera",
    "add_adapter": "edgetune.runtime.adapters",
    "allocate_ranks": "edgetune.training.sensitivity",
    "attach": "edgetune.modules.attached",
    "bench": "edgetune.benchmark",
    "bench_module": "edgetune.modules.bench",
    "budget": "edgetune.modules.budget",
    "check_adapters": "edgetune.runtime.adapters",
    "check_data": "edgetune.data_check",
    "embed": "edgetune.runtime.embedding",
    "evaluate": "edgetune.evaluation",
    "export": "edgetune.exporter",
    "export_module": "edgetune.modules.exporter",
    "generate": "edgetune.runtime.generate",
    "list_adapters": "edgetune.runtime.adapters",
    "list_devices": "edgetune.device",
    "load_device": "edgetune.device",
    "merge_adapters": "edgetune.arithmetic",
    "personalize": "edgetune.personalizer",
    "plan": "edgetune.planner",
    "plan_module": "edgetune.modules.plan",
    "quantize": "edgetune.quantizer",
    "remove_adapter": "edgetune.runtime.adapters",
    "set_default_adapter": "edgetune.runtime.adapters",
    "train": "edgetune.training.loop",
    "train_module": "edgetune.modules.trainer",
    "write_report": "edgetune.report",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562). Raises MissingExtraError where its module needs an extra."""
    if name not in _HOME:
        raise AttributeError(f"module 'edgetune' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        raise missing from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
