"""Device profiles: every shipped TOML, and everything that a profile may not be."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgetune import device, host
from edgetune.device import DeviceProfile, devices_folder, list_devices, load_device
from edgetune.errors import DeviceError, EdgetuneError

IDS = sorted(path.stem for path in devices_folder().glob("*.toml"))
SHARE = {"phone": 0.30, "watch": 0.15}
CONFIDENCE = ("low", "medium", "high", "measured")


@pytest.mark.parametrize("name", IDS)
class TestShipped:
    def test_loads_under_its_file_name(self, name: str) -> None:
        assert load_device(name).id == name

    def test_budgets_follow_the_rule(self, name: str) -> None:
        profile = load_device(name)
        memory, total = profile.memory, profile.memory.total_mib
        if profile.kind == "host":
            assert memory.budget_mib == memory.budget_background_mib <= total
        elif profile.kind == "board":
            assert memory.budget_mib == min(total - 250, int(0.7 * total)) == memory.budget_background_mib
        else:
            share = 0.35 if profile.os.name == "ios" else SHARE[profile.kind]
            assert memory.budget_mib == int(share * total)
            assert memory.budget_background_mib == memory.budget_mib // 2

    def test_provenance_is_its_own_and_says_no_more_than_medium(self, name: str) -> None:
        text = tomllib.loads((devices_folder() / f"{name}.toml").read_text(encoding="utf-8"))
        provenance = load_device(name).provenance
        assert "provenance" in text
        assert provenance.source and provenance.checked is not None
        assert CONFIDENCE.index(provenance.confidence) <= CONFIDENCE.index("medium")

    def test_targets_and_grid(self, name: str) -> None:
        profile = load_device(name)
        assert all(value is not None for value in dataclasses.asdict(profile.targets).values())
        assert profile.runtime.grid == ("nf4" if profile.kind == "host" else "int4")
        assert (profile.runtime.weights == "int8-dynamic") == (not profile.runtime.int4_kernel)

    def test_survives_json(self, name: str) -> None:
        import json

        values = load_device(name).to_dict()
        assert json.loads(json.dumps(values))["memory"]["total_mib"] == values["memory"]["total_mib"]


def test_the_kinds_that_are_promised() -> None:
    kinds = [(p.kind, p.os.name, p.cpu.arch) for p in list_devices()]
    assert sum(kind == "phone" for kind, _, _ in kinds) >= 4
    assert {("phone", "ios", "aarch64"), ("watch", "wearos", "aarch64"), ("watch", "wearos", "armv7")} < set(kinds)
    assert ("watch", "watchos", "aarch64") in kinds
    assert {"rpi-zero-2w", "rpi-5", "jetson-orin-nano", "host", "pixel-9"} < {p.id for p in list_devices()}


def test_fragments_are_no_devices() -> None:
    fragments = list((devices_folder() / "base").glob("*.toml"))
    assert fragments
    assert not {path.stem for path in fragments} & {p.id for p in list_devices()}


def test_every_key_says_what_it_means() -> None:
    from typing import get_type_hints

    from edgetune.schema import Key

    for section in get_type_hints(DeviceProfile).values():
        if not dataclasses.is_dataclass(section):
            continue
        for name, hint in get_type_hints(section, include_extras=True).items():
            (key,) = (extra for extra in hint.__metadata__ if isinstance(extra, Key))
            assert key.doc, f"{section.__name__}.{name}"


# The whole of a valid profile, which each case below spoils in one place.
VALID = load_device("rpi-5").to_dict()


def write(path: Path, values: dict[str, Any]) -> Path:
    """A TOML of these values."""
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for table, keys in values.items():
        if isinstance(keys, dict):
            lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        return value
    return f'"{value}"' if isinstance(value, str) else str(value)


def spoiled(path: Path, key: str, value: Any) -> Path:
    """The valid profile with one value at a dotted key."""
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in VALID.items()}
    *tables, last = key.split(".")
    (values[tables[0]] if tables else values)[last] = value
    return write(path, values)


def test_a_users_own_file(tmp_path: Path) -> None:
    profile = load_device(spoiled(tmp_path / "mine.toml", "memory.budget_mib", 5800))
    assert profile.memory.budget_mib == 5800
    assert load_device(str(tmp_path / "mine.toml")) == profile


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("memory.budget_mb", 100, "memory.budget_mb: unknown key; did you mean memory.budget_mib?"),
        ("memroy", {}, "memroy: unknown key; did you mean memory?"),
        ("memory.xyzzy", 1, "memory.xyzzy: unknown key; known here: total_mib"),
        ("memory.total_mib", "8GB", "memory.total_mib: found '8GB'; expected an integer from 1"),
        ("memory.total_mib", True, "memory.total_mib: found True; expected an integer"),
        ("memory.total_mib", 8192.0, "memory.total_mib: found 8192.0; expected an integer"),
        ("memory.total_mib", -1, "memory.total_mib: found -1; expected"),
        ("memory.total_mib", 10**30, "memory.total_mib: found an integer beyond 64 bits"),
        ("memory.total_mib", "auto", "memory.total_mib: found 'auto'; expected an integer"),
        ("memory.budget_mib", 9000, "memory.budget_mib: 9000 is more than memory.total_mib, 8192"),
        ("memory.budget_background_mib", 5735, "memory.budget_background_mib: 5735 is more than memory.budget_mib"),
        ("memory.kill", "lmdk", "memory.kill: found 'lmdk'; expected one of memory_limiter, lmkd"),
        ("memory.kill", "lmdk", "did you mean 'lmkd'?"),
        ("compute.gflops_fp32_burst", "nan", "compute.gflops_fp32_burst: found 'nan'"),
        ("compute.gflops_fp32_sustained", 56.0, "compute.gflops_fp32_sustained: 56.0 is more than"),
        ("compute.threads", 5, "compute.threads: 5 is more than the cores in cpu.cluster, 4"),
        ("thermal.sustained_ratio", 1.5, "thermal.sustained_ratio: found 1.5; expected a finite number from 0.01"),
        ("duty.daily_s", 60, "duty.slice_s: 86400 is more than duty.daily_s, 60"),
        ("power.train_only_when_charging", 1, "power.train_only_when_charging: found 1; expected true or false"),
        ("cpu.isa", "dotprod", "cpu.isa: found 'dotprod'; expected a list"),
        ("cpu.isa", ["dotprot"], "cpu.isa.0: found 'dotprot'; expected one of neon"),
        ("cpu.isa", ["neon"], "runtime.int4_kernel: true needs 'dotprod' in cpu.isa"),
        ("cpu.arch", "armv7", "runtime.int4_kernel: true needs aarch64 or x86_64, not armv7"),
        ("cpu.cluster", [], "cpu.cluster: empty"),
        ("cpu.cluster", [{"cores": 4, "khz": 2_400_000}], "cpu.cluster.0.big: missing; expected true or false"),
        ("id", "Pixel 9", "id: found 'Pixel 9'; expected 1 to 48 characters"),
        ("id", "", "id: found ''"),
        ("name", "bell\\u0007", "name: found 'bell\\x07'; expected a string of printable characters"),
        ("schema", 2, "schema: 2 is newer than this edgetune reads (1); upgrade edgetune"),
        ("schema", "1", "schema: found '1'"),
        ("provenance.confidence", "measured", "provenance.calibration: '' is no file"),
        ("memory", 3, "memory: found 3; expected a table"),
        ("extends", 3, "extends: found 3; expected a device id or a file"),
        ("extends", "pixel-99", "there is no device 'pixel-99'. Did you mean pixel-9"),
    ],
)  # fmt: skip
def test_refused_with_the_path_of_the_key(tmp_path: Path, key: str, value: Any, said: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(said)):
        load_device(spoiled(tmp_path / "wrong.toml", key, value))


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = spoiled(tmp_path / "wrong.toml", "memory.total_mib", "8GB")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("threads = 4", "threads = -4\nthreeds = 4"), encoding="utf-8")
    with pytest.raises(DeviceError) as error:
        load_device(path)
    for key in ("memory.total_mib", "compute.threads", "compute.threeds"):
        assert f"  {key}: " in str(error.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_that_is_none(tmp_path: Path, value: str) -> None:
    path = tmp_path / "wrong.toml"
    text = write(path, VALID).read_text(encoding="utf-8")
    path.write_text(re.sub(r"gflops_fp32_burst = .*", f"gflops_fp32_burst = {value}", text), encoding="utf-8")
    with pytest.raises(DeviceError, match=r"compute\.gflops_fp32_burst: found"):
        load_device(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
        (b"a = ", "is not valid TOML"),
        (b"a = 1\na = 2", "is not valid TOML"),
        (b"a = [\n" * 5_000, "is nested too deeply|is not valid TOML"),
        (b"#\n" * (1 << 19) + b"#", "has 1,048,577 bytes"),
        (b"a" + b".a" * 30_000 + b" = 1", "has a line of more than 500 bytes"),
        (b"", "id: missing"),
    ],
    ids=["utf8", "cut", "twice", "deep", "large", "long", "empty"],
)
def test_files_that_are_no_profile(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_bytes(content)
    with pytest.raises(DeviceError, match=said):
        load_device(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="is not a file"):
        load_device(tmp_path)
    with pytest.raises(DeviceError, match="cannot be read"):
        load_device(tmp_path / "none.toml")


def test_an_unknown_id_names_near_ones() -> None:
    with pytest.raises(DeviceError, match=r"there is no device 'pixel9'\. Did you mean pixel-9.*edgetune devices"):
        load_device("pixel9")
    with pytest.raises(DeviceError, match=r"there is no device 'qqqqqq'\. `edgetune devices`"):
        load_device("qqqqqq")


class TestExtends:
    def test_a_shipped_profile_with_another_budget(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text('extends = "pixel-9"\nid = "mine"\n[memory]\nbudget_mib = 3000\n', encoding="utf-8")
        mine, pixel = load_device(path), load_device("pixel-9")
        assert mine.memory == dataclasses.replace(pixel.memory, budget_mib=3000)
        assert mine.cpu == pixel.cpu

    def test_does_not_inherit_provenance(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text('extends = "pixel-9"\nid = "mine"\n', encoding="utf-8")
        assert load_device("pixel-9").provenance.confidence == "medium"
        assert load_device(path).provenance == device.Provenance()

    def test_files_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        write(tmp_path / "base.toml", VALID)
        path = tmp_path / "sub" / "mine.toml"
        path.write_text('extends = "../base.toml"\n[compute]\nthreads = 1\n', encoding="utf-8")
        assert load_device(path).compute.threads == 1

    def test_a_copy_of_a_shipped_profile(self, tmp_path: Path) -> None:
        """Its `extends` names a file that lies beside the original, not beside the copy."""
        path = tmp_path / "mine.toml"
        path.write_text((device.devices_folder() / "pixel-9.toml").read_text(encoding="utf-8"), encoding="utf-8")
        assert load_device(path).memory == load_device("pixel-9").memory
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "android-phone.toml").write_text('extends = "rpi-5"\n', encoding="utf-8")
        assert load_device(path).duty == load_device("rpi-5").duty != load_device("pixel-9").duty

    def test_a_list_is_replaced_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text('extends = "rpi-5"\n[cpu]\nisa = ["dotprod"]\n', encoding="utf-8")
        assert load_device(path).cpu.isa == ("dotprod",)

    def test_no_cycle(self, tmp_path: Path) -> None:
        (tmp_path / "a.toml").write_text('extends = "b.toml"', encoding="utf-8")
        (tmp_path / "b.toml").write_text('extends = "a.toml"', encoding="utf-8")
        with pytest.raises(DeviceError, match=r"cannot extend itself, but a.toml extends b.toml extends a.toml"):
            load_device(tmp_path / "a.toml")

    @pytest.mark.parametrize("depth", [3, 4])
    def test_three_deep_and_no_more(self, tmp_path: Path, depth: int) -> None:
        write(tmp_path / "0.toml", VALID)
        for i in range(depth):
            (tmp_path / f"{i + 1}.toml").write_text(f'extends = "{i}.toml"', encoding="utf-8")
        if depth == 3:
            assert load_device(tmp_path / "3.toml").id == "rpi-5"
        else:
            with pytest.raises(DeviceError, match="more than 3 profiles deep"):
                load_device(tmp_path / "4.toml")


class TestHost:
    def test_is_this_machine(self) -> None:
        profile = load_device("host")
        assert profile.memory.total_mib == host.total_mib()
        assert profile.compute.threads == profile.cpu.cores == host.threads()
        assert profile.cpu.arch == host.arch()
        assert set(profile.cpu.isa) <= set(host.isa())

    def test_half_of_what_is_available(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Virtual:
            total, available = 8 << 30, 3 << 30

        monkeypatch.setattr(host.psutil, "virtual_memory", Virtual)
        assert load_device("host").memory.budget_mib == 1536

    def test_readings_of_one_load_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Available memory changes while a profile is read; budget and background budget must not differ for that."""
        available = iter(range(4 << 30, 0, -(100 << 20)))

        class Virtual:
            total = 8 << 30

            @property
            def available(self) -> int:
                return next(available)

        monkeypatch.setattr(host.psutil, "virtual_memory", Virtual)
        memory = load_device("host").memory
        assert memory.budget_mib == memory.budget_background_mib

    def test_names_of_arm_features(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes asimdhp asimddp i8mm bf16\nCPU part\t: 0xd0b\n"
        monkeypatch.setattr(host.Path, "read_text", lambda self, **_: text)
        assert {"neon", "fp16", "dotprod", "i8mm", "bf16"} <= set(host.isa())


scalars = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.datetimes(), st.just("auto")
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
PATHS = [f"{table}.{key}" for table, keys in VALID.items() if isinstance(keys, dict) for key in keys] + list(VALID)


@given(st.sampled_from(PATHS), values)
@example("memory.total_mib", -0.0)
@example("cpu.cluster", [{"cores": 1}])
def test_any_value_anywhere_is_read_or_refused(path: str, value: Any) -> None:
    """Through the dataclasses, without a file: nothing but a list of problems may come out."""
    from edgetune.schema import Reader

    changed = {name: dict(v) if isinstance(v, dict) else v for name, v in VALID.items()}
    changed["provenance"].pop("checked")
    *tables, last = path.split(".")
    (changed[tables[0]] if tables else changed)[last] = value
    reader = Reader()
    profile = reader.read(DeviceProfile, changed)
    assert (profile is None) == bool(reader.problems)
    if profile is None:
        assert all(problem.startswith(path) for problem in reader.problems)
    else:
        assert dataclasses.asdict(profile) is not None


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass"))))
@example(b"[memory]\n[memory.total_mib]\n")
@example(b"[[cpu]]\n")
@example(b'extends = "extends"')
@example(b"extends = 1979-05-27")
def test_any_bytes_are_refused_with_our_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "any.toml"
    path.write_bytes(content)
    with pytest.raises(EdgetuneError):
        load_device(path)


@pytest.mark.parametrize(
    ("device", "weights", "reason"),
    [
        ("pixel-9", "int4", None),
        ("pixel-9", "int8", None),
        ("pixel-9", "standard", None),
        ("pixel-9", "int8-dynamic", None),
        ("pixel-9", "nf4", "MatMulBnb4 .* 16 times slower than int4"),
        ("pixel-9", "fp32", "^every token reads 4 bytes .* 4.3 times slower than int4"),
        ("pixel-9", "fp16", "widened to fp32 when it is loaded, .* 4.3 times slower than int4"),
        ("rpi-4", "int8-dynamic", None),
        ("rpi-4", "int4", "no kernel for MatMulNBits, .* 40 times slower than fp32"),
        ("rpi-4", "int8", "no kernel for MatMulNBits"),
        ("rpi-4", "standard", "no kernel for MatMulNBits"),
        ("rpi-4", "nf4", "MatMulBnb4 .* 3.7 times slower than fp32"),
        ("rpi-4", "fp32", "3.4 times slower than int8-dynamic"),
    ],
)
def test_which_weights_are_slow_and_why(device: str, weights: str, reason: str | None) -> None:
    found = load_device(device).runtime.slow_reason(weights)
    assert (found is None) if reason is None else re.search(reason, found or "")
