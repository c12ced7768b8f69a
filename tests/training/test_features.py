"""The feature cache: the bytes of a run are those without it, lower blocks run once, nothing of the user's is left."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from edgetune import errors
from edgetune.adapters.lora import LoraConfig
from edgetune.data import Row, Window, pack, read_rows, split_eval, stack
from edgetune.models.decoder import Block, Decoder, load_decoder
from edgetune.planner.plans import Plan
from edgetune.tokenizer import load_tokenizer
from edgetune.training import conduct, features, torch_trainer, trainer
from edgetune.training.blocks import BlockPass
from edgetune.training.features import FeatureCache
from edgetune.training.forward import below, lower_blocks
from edgetune.training.loop import Run, train
from edgetune.training.progress import Progress
from edgetune.training.stop import Stopped
from tests.training.conftest import make_base, make_plan, random_batch, write_rows

UPPER = LoraConfig(r=3, layers_to_transform=(2, 3))
LOTS = 1 << 30


class Job(NamedTuple):
    base: Path
    data: Path

    def plan(self, **settings: Any) -> Plan:
        """Several epochs, three windows in a micro-batch."""
        return make_plan(self.base, **{"adapter": UPPER, "batch_size": 3, "feature_cache_bytes": LOTS} | settings)

    def train(self, out: Path, plan: Plan | None = None, **options: Any) -> Run:
        return train(plan or self.plan(), self.base, data=self.data, out=out, **options)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    return Job(make_base(folder, num_hidden_layers=4), write_rows(folder / "rows.jsonl", 40))


@pytest.fixture(scope="module")
def uncached(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return job.train(tmp_path_factory.mktemp("uncached") / "run", job.plan(feature_cache_bytes=0))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each block ran forward."""
    counted: Counter[str] = Counter()
    forward = BlockPass.forward

    def count(self: BlockPass, block: Block, *rest: Any) -> Any:
        layer = getattr(block.mlp.up_proj, "base_layer", block.mlp.up_proj)
        counted[layer.name.split(".")[2]] += 1
        return forward(self, block, *rest)

    monkeypatch.setattr(BlockPass, "forward", count)
    return counted


def losses(run: Run) -> list[tuple[float | None, float | None]]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [(line.get("loss"), line.get("eval_loss")) for line in lines]


def same(run: Run, other: Run) -> bool:
    """Every loss, every evaluation and the adapter, to the bit."""
    return losses(run) == losses(other) and run.summary["adapter_sha256"] == other.summary["adapter_sha256"]


def once(when: Callable[[Progress], bool], action: Callable[[], object]) -> Callable[[Progress], None]:
    done = False

    def callback(progress: Progress) -> None:
        nonlocal done
        if not done and when(progress):
            done = True
            action()

    return callback


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def after_step(step: int) -> Callable[[Progress], None]:
    return once(lambda progress: progress.step == step, interrupt)


def windows_of(run: Run) -> int:
    """How many windows are in the cache that a run left."""
    return sum(len(features.open_tensors(path)) for path in (run.folder / "features").glob("*.safetensors"))


def mapped_bytes(file: Path) -> int:
    """Resident bytes of a file's maps in this process."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(file))
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


class TestBits:
    def test_a_run_with_the_cache_is_the_run_without(self, job: Job, uncached: Run, tmp_path: Path) -> None:
        assert uncached.summary["stopped"] == "done" and uncached.summary["eval_loss"] is not None
        cached = job.train(tmp_path / "run", keep_cache=True)
        parts = split_eval(read_rows(job.data, load_tokenizer(job.base), 48), 0.2, 3)
        train_windows, eval_windows = (len(pack(rows, 48)) for rows in parts)
        assert train_windows % 3 and eval_windows % 3, (
            "an epoch ends inside a micro-batch, an evaluation with a smaller"
        )
        assert windows_of(cached) == train_windows + eval_windows
        assert same(cached, uncached)

    @pytest.mark.parametrize(
        "settings",
        [
            {"adapter": replace(UPPER, lora_dropout=0.2)},
            {"adapter": LoraConfig(r=2, layers_to_transform=(1, 3)), "recompute_layers": 0},
            {"batch_size": 1, "gradient_accumulation_steps": 5},
        ],
        ids=["dropout", "a gap", "one window"],
    )
    def test_under_other_plans(self, job: Job, tmp_path: Path, settings: dict[str, Any]) -> None:
        plan = job.plan(max_steps=6, **settings)
        cached = job.train(tmp_path / "cached", plan)
        assert same(cached, job.train(tmp_path / "plain", replace(plan, feature_cache_bytes=0)))

    @pytest.mark.parametrize("grid", ["nf4", "int4"])
    @pytest.mark.parametrize("length", [13, 64, 97])
    def test_features_do_not_depend_on_the_micro_batch(self, tmp_path: Path, grid: str, length: int) -> None:
        decoder = load_decoder(make_base(tmp_path, grid=grid, num_hidden_layers=3))
        batch = random_batch(301, 4, length)
        with torch.no_grad():
            whole = below(decoder, batch, 2, lambda: None).clone().view(4, length, -1)
            for chosen in ([2], [3, 0], [1, 2, 0]):
                part = {key: value[chosen] for key, value in batch.items()}
                assert torch.equal(below(decoder, part, 2, lambda: None).view(len(chosen), length, -1), whole[chosen])

    def test_features_are_the_decoder_s_own_hidden_states(self, job: Job) -> None:
        decoder, batch = load_decoder(job.base), random_batch(301, 1, 31)
        ids, positions, segments = (torch.from_numpy(batch[k]) for k in ("input_ids", "position_ids", "segment_ids"))
        with torch.no_grad():
            expected, contexts = decoder.embed(ids), decoder.context(31, positions, segments)
            for block in decoder.blocks[:2]:
                expected = block(expected, contexts)
            found = lower_blocks(decoder, batch, 2, lambda: None)
        torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


class TestOnce:
    def test_lower_blocks_run_once_for_each_window(self, job: Job, tmp_path: Path, passes: Counter[str]) -> None:
        at_first_step: list[Counter[str]] = []
        run = job.train(
            tmp_path / "run",
            keep_cache=True,
            on_progress=once(lambda progress: progress.step == 1, lambda: at_first_step.append(Counter(passes))),
        )
        assert passes["0"] == passes["1"] == windows_of(run) > 20
        assert at_first_step[0]["0"] == passes["0"] and passes["2"] > at_first_step[0]["2"] > 0

    def test_lower_blocks_run_once_with_mezo_too(self, job: Job, tmp_path: Path, passes: Counter[str]) -> None:
        plan = job.plan(max_steps=4, step_rule="mezo", optimizer="sgd")
        run = job.train(tmp_path / "run", plan, keep_cache=True)
        assert passes["0"] == passes["1"] == windows_of(run)
        assert same(run, job.train(tmp_path / "plain", replace(plan, feature_cache_bytes=0)))

    def test_their_codes_are_not_read_again(self, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def spoil(self: torch_trainer.TorchTrainer, *args: Any) -> None:
            fill(self, *args)
            for block in self.decoder.blocks[:2]:
                for module in block.modules():
                    vars(module).pop("codes", None)
                    vars(module).pop("flat", None)

        fill = torch_trainer.TorchTrainer.fill_cache
        monkeypatch.setattr(torch_trainer.TorchTrainer, "fill_cache", spoil)
        assert job.train(tmp_path / "run", job.plan(max_steps=3)).stopped == "done"
        with pytest.raises(AttributeError, match="flat"):
            job.train(tmp_path / "plain", job.plan(max_steps=3, feature_cache_bytes=0))

    @pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="reads what Linux says of its maps")
    def test_their_codes_are_not_mapped_again(self, tmp_path: Path) -> None:
        base = make_base(tmp_path, grid="int4", num_hidden_layers=8, hidden_size=256, intermediate_size=512)
        data = write_rows(tmp_path / "rows.jsonl", 20)
        resident: list[int] = []
        plan = make_plan(
            base, adapter=LoraConfig(r=3, layers_to_transform=(7,)), max_steps=4, tile_weights=1 << 17,
            feature_cache_bytes=LOTS,
        )  # fmt: skip
        for cached in (plan, replace(plan, feature_cache_bytes=0)):
            note = once(lambda p: p.step == 3, lambda: resident.append(mapped_bytes(base / "model.safetensors")))
            train(cached, base, data=data, out=tmp_path / f"run{cached.feature_cache_bytes}", on_progress=note)
        size = (base / "model.safetensors").stat().st_size
        assert resident[0] < size / 2 < 0.9 * size < resident[1]

    def test_the_workspace_is_the_one_that_the_planner_counts(self, job: Job) -> None:
        decoder = load_decoder(job.base)
        below(decoder, random_batch(301, 3, 20), 2, lambda: None)
        assert {"input.0", "input.1", "d", "slot.0.q"} <= set(decoder.workspace.sizes)
        assert not {"input.2", "slot.1.q"} & set(decoder.workspace.sizes)


class TestResume:
    @pytest.mark.parametrize("step", [1, 7])
    def test_stopped_in_training(
        self, job: Job, uncached: Run, tmp_path: Path, passes: Counter[str], step: int
    ) -> None:
        out = tmp_path / "run"
        assert job.train(out, on_progress=after_step(step)).stopped == "signal"
        folder = out / "features"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        passes.clear()
        assert same(job.train(out, resume=True), uncached)
        assert passes["0"] == 0 < passes["2"]
        assert not folder.exists()

    def test_stopped_while_it_is_filled(
        self, job: Job, uncached: Run, tmp_path: Path, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, size = tmp_path / "run", 48 * 72 * 4
        monkeypatch.setattr(features, "FILE_BYTES", 4 * size)
        stopped = job.train(out, on_progress=once(lambda p: "8 of" in (p.note or ""), interrupt))
        assert (stopped.stopped, stopped.summary["steps"]) == ("signal", 0)
        assert windows_of(stopped) == 8 and passes["0"] == 9 and passes["1"] == 8
        assert not list((out / "features").glob(".*")), "the unfinished file is gone"
        passes.clear()
        kept = job.train(out, resume=True, keep_cache=True)
        assert same(kept, uncached)
        assert passes["0"] == passes["1"] == windows_of(kept) - 8

    def test_slices_that_only_fill_it_get_on(
        self, job: Job, uncached: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a clock that goes by a second at every look."""
        monkeypatch.setattr(features, "FILE_BYTES", 1)
        clock = itertools.count()
        monkeypatch.setattr(conduct, "Pace", functools.partial(conduct.Pace, clock=functools.partial(next, clock)))
        plan, out = job.plan(slice_seconds=60), tmp_path / "run"
        run = job.train(out, plan, one_slice=True)
        assert (run.stopped, run.summary["steps"]) == ("slice", 0) and windows_of(run) > 5
        slices = 1
        while run.stopped == "slice":
            run = job.train(out, replace(plan, slice_seconds=60 * slices), one_slice=True, resume=True)
            slices += 1
        assert slices > 2 and same(run, uncached)

    def test_with_and_without_the_cache_by_turns(self, job: Job, uncached: Run, tmp_path: Path) -> None:
        out, plain = tmp_path / "run", job.plan(feature_cache_bytes=0)
        job.train(out, on_progress=after_step(4))
        assert job.train(out, plain, resume=True, on_progress=after_step(8)).stopped == "signal"
        assert same(job.train(out, resume=True), uncached)
        assert not (out / "features").exists()

    def test_a_run_without_the_cache_removes_what_one_with_it_left(self, job: Job, tmp_path: Path) -> None:
        job.train(tmp_path / "run", on_progress=after_step(4))
        assert (tmp_path / "run" / "features").is_dir()
        job.train(tmp_path / "run", job.plan(feature_cache_bytes=0), resume=True)
        assert not (tmp_path / "run" / "features").exists()

    @pytest.mark.parametrize("damage", ["byte", "cut", "manifest", "key", "version", "mode", "link", "stranger"])
    def test_what_does_not_verify_is_computed_again(
        self, job: Job, uncached: Run, tmp_path: Path, passes: Counter[str], damage: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(features, "FILE_BYTES", 8 * 48 * 72 * 4)
        out = tmp_path / "run"
        left = windows_of(job.train(out, on_progress=after_step(4)))
        folder = out / "features"
        file, manifest = folder / "features-00001.safetensors", folder / "manifest.json"
        again = left
        if damage in ("byte", "cut"):
            content = file.read_bytes()
            file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "byte" else b""))
            again = 8
        elif damage == "manifest":
            manifest.write_text("{")
        elif damage == "key":
            manifest.write_text(manifest.read_text().replace('"first_block": 2', '"first_block": 1'))
        elif damage == "version":
            manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
        elif damage == "mode":
            folder.chmod(0o750)
        elif damage == "link":
            folder.rename(tmp_path / "elsewhere")
            folder.symlink_to(tmp_path / "elsewhere")
        else:
            shutil.copy(file, folder / "features-00077.safetensors")
            again = 0
        passes.clear()
        kept = job.train(out, resume=True, keep_cache=True)
        assert same(kept, uncached)
        assert passes["0"] == again and windows_of(kept) == left
        assert not folder.is_symlink() and folder.stat().st_mode & 0o777 == 0o700
        assert not (folder / "features-00077.safetensors").exists()


class TestEnd:
    def test_it_is_removed_unless_it_is_kept(self, job: Job, tmp_path: Path) -> None:
        plan = job.plan(max_steps=2)
        job.train(tmp_path / "run", plan)
        assert not (tmp_path / "run" / "features").exists()
        kept = job.train(tmp_path / "run", plan, force=True, keep_cache=True)
        assert windows_of(kept) > 20
        job.train(tmp_path / "run", job.plan(max_steps=2, feature_cache_bytes=0), force=True, keep_cache=True)
        assert not (tmp_path / "run" / "features").exists(), "--force replaces all of an earlier run"

    def test_it_is_removed_when_a_run_fails(self, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: trainer.Trainer) -> None:
            assert (self.folder / "features" / "manifest.json").is_file()
            raise ZeroDivisionError

        monkeypatch.setattr(trainer.Trainer, "one_step", fail)
        with pytest.raises(ZeroDivisionError):
            job.train(tmp_path / "run")
        assert not (tmp_path / "run" / "features").exists()

    def test_a_folder_that_cannot_be_removed_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        (tmp_path / "features").mkdir()
        monkeypatch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(errors.CheckpointError, match=r"features holds what a model .* denied\. Remove it by hand"):
            features.remove(tmp_path / "features")


class TestStorage:
    def test_too_little_is_said_and_the_run_goes_on(
        self, job: Job, uncached: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[str | None] = []
        real = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(features.shutil, "disk_usage", lambda _: real._replace(free=500_000))
        run = job.train(tmp_path / "run", on_progress=lambda progress: told.append(progress.note))
        assert same(run, uncached)
        assert any(note and "no feature cache" in note and "No space left" in note for note in told)

    def test_files_that_are_memory_are_none(
        self, job: Job, uncached: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[str | None] = []
        left = job.train(tmp_path / "run", on_progress=after_step(4))
        assert windows_of(left) > 20
        monkeypatch.setattr(torch_trainer, "memory_file_system", lambda folder: {tmp_path / "run": "tmpfs"}[folder])
        run = job.train(tmp_path / "run", resume=True, keep_cache=True, on_progress=lambda p: told.append(p.note))
        assert same(run, uncached)
        assert not (run.folder / "features").exists()
        assert any(note and "no feature cache" in note and "run lies on tmpfs, whose files" in note for note in told)

    def test_full_in_the_middle(self, job: Job, uncached: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = features.write_safetensors

        def write(path: Path, *rest: Any) -> None:
            if path.name == "features-00001.safetensors":
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            real(path, *rest)

        monkeypatch.setattr(features, "FILE_BYTES", 100_000)
        monkeypatch.setattr(features, "write_safetensors", write)
        run = job.train(tmp_path / "run", keep_cache=True)
        assert same(run, uncached)
        assert not (tmp_path / "run" / "features").exists()

    def test_no_memory_is_the_budget(self, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fill(self: FeatureCache, *_: Any) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        monkeypatch.setattr(FeatureCache, "fill", fill)
        assert job.train(tmp_path / "run").stopped == "budget"

    def test_it_takes_no_more_than_the_plan_says(
        self, job: Job, uncached: Run, tmp_path: Path, passes: Counter[str]
    ) -> None:
        plan = job.plan(feature_cache_bytes=6 * 48 * 72 * 4)
        left = job.train(tmp_path / "run", plan, on_progress=after_step(4))
        assert windows_of(left) == 6
        run = job.train(tmp_path / "run", plan, resume=True, keep_cache=True)
        assert windows_of(run) == 6 and same(run, uncached)
        assert passes["0"] > 6, "the others run in every step"


class TestCache:
    def test_equal_windows_are_one(self, job: Job, tmp_path: Path) -> None:
        decoder, cache = self.made(job, tmp_path)
        window = self.window(np.arange(20))
        cache.fill([window, window, self.window(np.arange(20, 40))], lambda: None, lambda _: None)
        assert len(features.open_tensors(tmp_path / "features" / "features-00000.safetensors")) == 2
        out = torch.empty(20, 72)
        assert cache(stack([window]), out)
        assert torch.equal(out, lower_blocks(decoder, stack([window]), 2, lambda: None))

    def test_what_it_does_not_know_it_leaves_alone(self, job: Job, tmp_path: Path) -> None:
        _, cache = self.made(job, tmp_path)
        known = self.window(np.arange(20))
        cache.fill([known], lambda: None, lambda _: None)
        batch, out = stack([known]), torch.full((20, 72), 7.0)
        for key in ("input_ids", "position_ids", "segment_ids"):
            assert not cache(batch | {key: batch[key] + 1}, out)
        assert bool((out == 7).all())
        assert cache(batch | {"labels": batch["labels"] + 1}, out), "labels are not what features depend on"

    def test_check_can_stop_it_between_blocks(self, job: Job, tmp_path: Path) -> None:
        calls = 0

        def check() -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise Stopped("signal")

        _, cache = self.made(job, tmp_path)
        with pytest.raises(Stopped):
            cache.fill([self.window(np.arange(9)), self.window(np.arange(9, 18))], check, lambda _: None)
        assert list((tmp_path / "features").iterdir()) == []

    @pytest.mark.parametrize("other", ["base", "config", "first block", "tiles", "threads", "torch"])
    def test_what_else_decides_the_bits_is_its_key(
        self, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
    ) -> None:
        decoder, cache = self.made(job, tmp_path)
        windows = [self.window(np.arange(9))]
        cache.fill(windows, lambda: None, lambda _: None)
        _, again = self.made(job, tmp_path)
        again.fill(windows, lambda: None, lambda _: None)
        assert (cache.num_written, again.num_written) == (1, 0)
        if other == "config":
            decoder.config = replace(decoder.config, rms_norm_eps=1e-3)
        elif other == "tiles":
            decoder.workspace.tile_weights += 1
        elif other == "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        elif other == "torch":
            monkeypatch.setattr(torch, "__version__", "9.9")
        block, base = (1 if other == "first block" else 2), ("1" if other == "base" else "0") * 64
        changed = FeatureCache(tmp_path / "features", decoder, block, LOTS, base)
        changed.fill(windows, lambda: None, lambda _: None)
        assert changed.num_written == 1

    def test_check_can_stop_it_while_it_is_read_again(self, job: Job, tmp_path: Path) -> None:
        """Every byte is: that may take a while."""
        windows = [self.window(np.arange(9))]
        self.made(job, tmp_path)[1].fill(windows, lambda: None, lambda _: None)

        def check() -> None:
            raise Stopped("signal")

        with pytest.raises(Stopped):
            self.made(job, tmp_path)[1].fill(windows, check, lambda _: None)

    @staticmethod
    def made(job: Job, folder: Path) -> tuple[Decoder, FeatureCache]:
        decoder = load_decoder(job.base)
        return decoder, FeatureCache(folder / "features", decoder, 2, LOTS, "0" * 64)

    @staticmethod
    def window(ids: np.ndarray) -> Window:
        return Window((Row(ids.astype(np.int32), ids.astype(np.int32), 1),), len(ids))
