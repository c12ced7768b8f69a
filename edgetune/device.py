"""Device profiles: what one phone, watch or board can give, read from a TOML and checked strictly.

A profile is data, so a new device is one file in `devices/` and no line of code. A user's own TOML works wherever an
id does and may extend a shipped profile or another file. Each key is described once, on its field below: meaning,
range, and the unit in its name. All problems of a profile come in one error that names the path of each key.

`host` is this machine: a key that says "auto" there is read when the profile is loaded, and in no other profile.

Left out: nothing here is measured on a device. The numbers are proposals with a source and a confidence.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import stat
import string
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edgetune import host
from edgetune.errors import DeviceError
from edgetune.schema import Key, Reader

SCHEMA = 1
# A shipped profile has 2 KiB. Without both limits a single key of a million dots would take the parser gigabytes.
MAX_FILE_BYTES, MAX_LINE_BYTES = 1 << 16, 500
MAX_EXTENDS = 3
INT4_NEEDS = {"aarch64": "dotprod", "x86_64": "avx2"}
WEIGHTS = ("int4", "nf4", "int8", "int8-dynamic", "fp16", "fp32", "standard")
NBITS = ("int4", "int8", "standard")  # of these, what onnxruntime multiplies by MatMulNBits, the kernel of int4_kernel
ISA = (
    "neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sme",
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni",
)  # fmt: skip
_MOST_MIB = 1 << 24


def _host_isa() -> list[str]:
    return [name for name in ISA if name in host.isa()]


def _host_int4_kernel() -> bool:
    return INT4_NEEDS.get(host.arch()) in host.isa()


@dataclass(frozen=True)
class Os:
    """The operating system that the limits hold for."""

    name: Annotated[
        str,
        Key(
            "operating system",
            choices=("android", "wearos", "ios", "watchos", "linux", "macos", "windows"),
            auto=host.os_name,
        ),
    ]
    min: Annotated[str, Key("first version this profile is valid for; empty = any")] = ""
    max: Annotated[str, Key("last version this profile is valid for; empty = open")] = ""


@dataclass(frozen=True)
class Memory:
    """What the device has, and what one app may use of it."""

    total_mib: Annotated[int, Key("RAM of the device", 1, _MOST_MIB, auto=host.total_mib)]
    budget_mib: Annotated[int, Key("anonymous + swap of an app in front", 1, _MOST_MIB, auto=host.half_available_mib)]
    budget_background_mib: Annotated[int, Key("the same, in background", 1, _MOST_MIB, auto=host.half_available_mib)]
    metric: Annotated[str, Key("what the device's killer counts", choices=("anon_swap", "footprint", "rss"))]
    file_backed_mib: Annotated[int, Key("page cache for the mapped base", 0, _MOST_MIB, auto=host.half_available_mib)]
    swap_mib: Annotated[int, Key("swap or zram an app may use", 0, _MOST_MIB)]
    kill: Annotated[
        str, Key("who ends an app above its budget", choices=("memory_limiter", "lmkd", "jetsam", "oom", "none"))
    ]


@dataclass(frozen=True)
class Cluster:
    """Cores of one kind."""

    cores: Annotated[int, Key("how many", 1, 1024)]
    khz: Annotated[int, Key("highest clock", 1000, 10_000_000)]
    big: Annotated[bool, Key("whether training is pinned to these")]


@dataclass(frozen=True)
class Cpu:
    """The processor as user space sees it."""

    arch: Annotated[str, Key("instruction set", choices=("aarch64", "armv7", "x86_64"), auto=host.arch)]
    isa: Annotated[tuple[str, ...], Key("extensions", choices=ISA, auto=_host_isa)]
    cluster: Annotated[tuple[Cluster, ...], Key("kinds of cores", auto=host.cluster)]

    @property
    def cores(self) -> int:
        return sum(cluster.cores for cluster in self.cluster)

    @property
    def clock_hz(self) -> float:
        """Of the fastest kind of core."""
        return 1e3 * max(cluster.khz for cluster in self.cluster)


@dataclass(frozen=True)
class Compute:
    """What the CPU does per second: the roofline of the planner."""

    threads: Annotated[int, Key("threads for training and inference", 1, 1024, auto=host.threads)]
    gflops_fp32_burst: Annotated[float, Key("fp32 GFLOP/s of these threads, cold", 0.01, 1e6)]
    gflops_fp32_sustained: Annotated[float, Key("the same after thermal.soak_s", 0.01, 1e6)]
    mem_bw_mb_s: Annotated[int, Key("memory bandwidth a program reaches; MB = 1e6 bytes", 10, 10_000_000)]


@dataclass(frozen=True)
class Storage:
    """Where base, checkpoints and caches lie."""

    read_mb_s: Annotated[int, Key("sequential read", 1, 1_000_000)]
    write_mb_s: Annotated[int, Key("sequential write", 1, 1_000_000)]
    fsync_ms: Annotated[float, Key("one fsync", 0, 100_000)]
    free_mib: Annotated[int, Key("free space an app may expect", 0, 1 << 30, auto=host.free_mib)]


@dataclass(frozen=True)
class Power:
    """Energy."""

    battery_mwh: Annotated[int, Key("battery; 0 = mains", 0, 10_000_000)]
    train_only_when_charging: Annotated[bool, Key("whether training waits for the charger")]
    max_avg_mw: Annotated[int, Key("average power while training", 1, 10_000_000)]


@dataclass(frozen=True)
class Thermal:
    """What heat leaves of the speed."""

    sustained_ratio: Annotated[float, Key("sustained over burst speed", 0.01, 1.0)]
    soak_s: Annotated[int, Key("seconds of load until it is reached", 0, 86_400)]


@dataclass(frozen=True)
class Duty:
    """When the system lets a program train."""

    slice_s: Annotated[int, Key("longest uninterrupted run", 1, 86_400)]
    daily_s: Annotated[int, Key("training window: seconds per day", 1, 86_400)]
    grace_s: Annotated[float, Key("from the warning to the kill", 0, 3600)]


@dataclass(frozen=True)
class Runtime:
    """What runs the exported model."""

    ort: Annotated[str, Key("onnxruntime with an official package for this system; empty = none")]
    eps: Annotated[tuple[str, ...], Key("execution providers, the preferred one first")]
    max_file_mib: Annotated[int, Key("largest single protobuf", 1, 2047)]
    external_data: Annotated[bool, Key("whether weights may lie beside model.onnx")]
    int4_kernel: Annotated[bool, Key("fast MatMulNBits: aarch64 dotprod, x86_64 avx2", auto=_host_int4_kernel)]
    grid: Annotated[str, Key("grid of the base by default", choices=("int4", "nf4"))]
    weights: Annotated[str, Key("export form by default", choices=WEIGHTS)]

    def slow_reason(self, weights: str) -> str | None:
        """Why this device's kernels run such weights slowly, with the factor measured; None where they do not.

        The factors are those of onnxruntime 1.31 on x86-64 with AVX2, one thread and one token, over 100 M weights out
        of the cache; for kernels that are missing, and for int8-dynamic, over one matrix in the cache.
        """
        if weights in NBITS and not self.int4_kernel:
            return "it has no kernel for MatMulNBits, which then dequantizes on every call: 40 times slower than fp32"
        if weights == "nf4":
            others = "16 times slower than int4" if self.int4_kernel else "3.7 times slower than fp32"
            return f"MatMulBnb4 dequantizes every weight on every call: {others}"
        if weights in ("fp16", "fp32"):
            why = "fp16 is widened to fp32 when it is loaded, and " if weights == "fp16" else ""
            others = "4.3 times slower than int4" if self.int4_kernel else "3.4 times slower than int8-dynamic"
            return f"{why}every token reads 4 bytes of each weight: {others}"
        return None


@dataclass(frozen=True)
class Targets:
    """What bench judges; each is optional."""

    time_to_first_token_ms: Annotated[float | None, Key("from prompt to first token", 1, 1e7)] = None
    generation_tokens_per_second: Annotated[float | None, Key("after the first token", 0.001, 1e6)] = None
    load_ms: Annotated[float | None, Key("opening the bundle", 1, 1e7)] = None
    bundle_mib: Annotated[float | None, Key("size on disk", 0.001, 1e6)] = None


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from. Never inherited: whoever overrides a number answers for it."""

    source: Annotated[tuple[str, ...], Key("addresses or names of sources")] = ()
    confidence: Annotated[str, Key("how far to trust them", choices=("measured", "high", "medium", "low"))] = "low"
    checked: Annotated[datetime.date | None, Key("when they were last looked at")] = None
    calibration: Annotated[str, Key("calibration file beside the profile; `measured` needs it")] = ""


@dataclass(frozen=True)
class DeviceProfile:
    """One device. `load_device` makes it; a profile that exists has been checked."""

    schema: Annotated[int, Key("version of this schema", 1, SCHEMA)]
    id: Annotated[str, Key("what --device takes")]
    name: Annotated[str, Key("what people call it")]
    kind: Annotated[str, Key("form", choices=("phone", "watch", "board", "glasses", "host"))]
    os: Os
    memory: Memory
    cpu: Cpu
    compute: Compute
    storage: Storage
    power: Power
    thermal: Thermal
    duty: Duty
    runtime: Runtime
    targets: Targets = Targets()
    provenance: Provenance = Provenance()

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain values for JSON, without targets that are not set."""
        values = dataclasses.asdict(self)
        values["targets"] = {key: value for key, value in values["targets"].items() if value is not None}
        values["provenance"]["checked"] = str(self.provenance.checked or "")
        return values


def devices_folder() -> Path:
    """Shipped profiles: inside an installed package, or beside it in a source checkout."""
    installed = Path(__file__).parent / "devices"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "devices"


def list_devices() -> list[DeviceProfile]:
    """All shipped profiles, by id."""
    return [load_device(path) for path in sorted(devices_folder().glob("*.toml"))]


def load_device(device: str | Path) -> DeviceProfile:
    """The profile with this id, or the one in this TOML file. Raises DeviceError with every problem found."""
    path = _find(device, Path())
    values = _read_chain(path)
    reader = Reader(allow_auto=values.get("kind") == "host")
    profile = reader.read(DeviceProfile, values)
    problems = reader.problems if profile is None else _contradictions(profile, path)
    if profile is None or problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:50])
        raise DeviceError(f"{path} is not a valid device profile:\n{listed}")
    return profile


def _find(device: str | Path, folder: Path) -> Path:
    """The file behind an id, or behind a path: absolute, relative to `folder`, or else to the shipped profiles."""
    if isinstance(device, Path) or device.endswith(".toml") or "/" in device:
        own, shipped_path = folder / device, devices_folder() / device
        return own if own.exists() or not shipped_path.exists() else shipped_path
    shipped = {path.stem: path for path in devices_folder().glob("*.toml")}
    if device not in shipped:
        close = difflib.get_close_matches(device[:100], shipped, n=2, cutoff=0.6)
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        raise DeviceError(
            f"there is no device {device!r}.{meant} `edgetune devices` lists all; a path to a TOML file works too."
        )
    return shipped[device]


def _read_chain(path: Path) -> dict[str, Any]:
    """The tables of this file over those it extends. `provenance` counts only where it stands in the file itself."""
    values = _read(path)
    own = {key: values[key] for key in ("provenance",) if key in values}
    chain = [path.resolve()]
    while "extends" in values:
        parent = values.pop("extends")
        if not isinstance(parent, str):
            raise DeviceError(f"{chain[-1]}: extends: found {parent!r}; expected a device id or a file")
        file = _find(parent, chain[-1].parent).resolve()
        if file in chain:
            circle = " extends ".join(link.name for link in [*chain, file])
            raise DeviceError(f"{path}: extends: a profile cannot extend itself, but {circle}")
        chain.append(file)
        if len(chain) > MAX_EXTENDS + 1:
            raise DeviceError(f"{path}: extends: more than {MAX_EXTENDS} profiles deep; extend a nearer one")
        values = _over(_read(file), values)
    values.pop("provenance", None)
    return values | own


def _over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` laid over `base`, table by table; a list replaces the other as a whole."""
    merged = base | values
    for key in base.keys() & values.keys():
        if isinstance(base[key], dict) and isinstance(values[key], dict):
            merged[key] = base[key] | values[key]
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DeviceError(f"{path} is not a file; a device profile is a TOML file")
        if status.st_size > MAX_FILE_BYTES:
            raise DeviceError(f"{path} has {status.st_size:,} bytes; a device profile has at most {MAX_FILE_BYTES:,}")
        content = path.read_bytes()
        if max(map(len, content.split(b"\n"))) > MAX_LINE_BYTES:
            raise DeviceError(f"{path} has a line of more than {MAX_LINE_BYTES} bytes; a device profile needs none")
        values = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise DeviceError(f"{path} cannot be read as a device profile: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DeviceError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except RecursionError as error:
        raise DeviceError(f"{path} is nested too deeply for a device profile") from error
    except ValueError as error:  # TOMLDecodeError is one, and so is an integer of thousands of digits
        raise DeviceError(f"{path} is not valid TOML: {error}") from error
    schema = values.get("schema", SCHEMA)
    if type(schema) is int and schema > SCHEMA:
        raise DeviceError(f"{path}: schema: {schema} is newer than this edgetune reads ({SCHEMA}); upgrade edgetune")
    return values


def _contradictions(profile: DeviceProfile, path: Path) -> list[str]:
    """What is wrong between values that are each in range."""
    memory, cpu, compute, duty = profile.memory, profile.cpu, profile.compute, profile.duty
    problems = []
    if not 0 < len(profile.id) <= 48 or set(profile.id) - set(string.ascii_lowercase + string.digits + "-"):
        problems.append(f"id: found {profile.id!r}; expected 1 to 48 characters of a-z, 0-9 and -")
    if not cpu.cluster:
        problems.append("cpu.cluster: empty; list at least one kind of core")
    for name, value, most_name, most in (
        ("memory.budget_mib", memory.budget_mib, "memory.total_mib", memory.total_mib),
        ("memory.budget_background_mib", memory.budget_background_mib, "memory.budget_mib", memory.budget_mib),
        ("compute.threads", compute.threads, "the cores in cpu.cluster", cpu.cores),
        ("compute.gflops_fp32_sustained", compute.gflops_fp32_sustained,
         "compute.gflops_fp32_burst", compute.gflops_fp32_burst),
        ("duty.slice_s", duty.slice_s, "duty.daily_s", duty.daily_s),
    ):  # fmt: skip
        if value > most:
            problems.append(f"{name}: {value} is more than {most_name}, {most}")
    needed = INT4_NEEDS.get(cpu.arch)
    if profile.runtime.int4_kernel and needed not in cpu.isa:
        wanted = f"{needed!r} in cpu.isa" if needed else f"aarch64 or x86_64, not {cpu.arch}"
        problems.append(f"runtime.int4_kernel: true needs {wanted}; set it to false")
    file = profile.provenance.calibration
    if profile.provenance.confidence == "measured" and not (file and (path.parent / file).is_file()):
        problems.append(f"provenance.calibration: {file!r} is no file, and confidence 'measured' needs one")
    return problems
