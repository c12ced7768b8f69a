"""The parent of a process that trains: it makes its cgroup, passes signals on, and goes on with what was killed.

It runs as `python -m edgetune.cli.supervisor JOB`, in place of the process that trains (`launch.start`), and ends with
that one's exit code. It holds 9 MiB and no model, and its cgroup holds the process that trains alone: a device has to
have those 9 MiB beside the budget.

How the child ended, by its exit code and by what the kernel counted:

    ended by itself              its code: done, an error (said by the child), the budget, a signal it was sent
    killed, and we were asked    the user's stop, as is a SIGINT or SIGTERM that somebody sent to the child alone
    SIGKILL and an OOM kill      the budget, or the machine's memory: goes on where the last checkpoint stands
    SIGKILL alone                killed from outside, as Android's low memory killer does: goes on, too
    another signal               a crash, which the next attempt would meet again: ends with 1. But where allocations
                                 were limited, native code may crash on one that was refused (numpy does): goes on as
                                 after a kill, if something can be given up

Before it goes on, what changes no bit of the result is given up, as the governor would have. It ends where that helps
no more: killed again without a further checkpoint, or `MAX_KILLS` times.

Left out: what happens when the supervisor itself is killed. The run then goes on by itself and ends in good order, and
an empty cgroup stays.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from edgetune.cgroup import Cgroup, make_cgroup, own_cgroup
from edgetune.cli.console import STOPPED_EARLY, answer, fail, tell
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.memory import format_mib

MAX_KILLS = 5
_VMSTAT = Path("/proc/vmstat")


class Child:
    """The process that trains, and who asked for its end: while the body runs, SIGINT and SIGTERM are passed on."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked: int | None = None
        self._pending: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Child:
        self._before = {number: signal.signal(number, self._pass_on) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if self._process is None:
            self._pending = number
        else:
            self._process.send_signal(number)

    def run(self, job: dict[str, Any], group: Cgroup | None) -> int:
        """Start it, in the group where there is one, and return its exit code: a negative one is the signal."""
        words = ["edgetune.cli.personalizing"] if _personalizes(job) else ["edgetune.cli.launch", "train"]
        command = [sys.executable, "-m", *words, json.dumps(job)]
        try:
            # A process group of its own: a terminal sends Ctrl-C to all of ours, and it would get that twice.
            process = subprocess.Popen(command, preexec_fn=None if group is None else group.enter, process_group=0)
        except subprocess.SubprocessError as error:  # preexec_fn failed
            raise ConfigError(
                f"enforce = 'cgroup': no process may be moved into {group and group.folder}. "
                "Use --enforce rlimit or --enforce governor."
            ) from error
        self._process = process
        if self._pending is not None:
            process.send_signal(self._pending)
            self._pending = None
        code = process.wait()
        self._process = None
        return code


def supervise(job: dict[str, Any], child: Child, group: Cgroup | None) -> int:
    """Run a job of `launch.start` to its end, through kills; returns the exit code."""
    run = Path(job["out"])
    kills = 0
    while child.asked is None:
        plan_before, kills_before = _plan_file(run), _oom_kills(group)
        step_before = _step(job)
        code = child.run(job, group)
        if code >= 0:
            return code
        if child.asked is not None:
            break
        if -code in child.SIGNALS:
            return 128 - code
        if _plan_file(run) != plan_before:  # it got as far as to write into the run
            job |= {"resume": True, "force": False}
        gave_up = _give_up(job["plan"])
        if code != -signal.SIGKILL:
            crash = f"crashed with {signal.Signals(-code).name}"
            if not gave_up or job["enforce"] not in ("rlimit", "cgroup"):
                raise EdgetuneError(
                    f"the process that trains {crash}, which is not the budget. The checkpoints in {run} are kept."
                )
            tell(f"{crash}, perhaps on memory that it was refused; going on from step {_step(job)}{_now(job)}")
            continue
        kills += 1
        by = _killer(job, group, _oom_kills(group) > kills_before)
        if kills == MAX_KILLS or not (gave_up or _step(job) > step_before):
            return _cannot_hold(job, group, kills, by)
        tell(f"killed {by or 'from outside'}; going on from step {_step(job)}{_now(job) if gave_up else ''}")
    return 128 + child.asked


def _personalizes(job: dict[str, Any]) -> bool:
    """Whether the job is one of `personalizing.start`."""
    return job.get("verb") == "personalize"


def _plan_file(run: Path) -> int | None:
    """Another number whenever a trainer has written its plan."""
    try:
        return (run / "plan.json").stat().st_mtime_ns
    except OSError:
        return None


def _step(job: dict[str, Any]) -> int:
    """That of the newest checkpoint; under its final name it is whole, and whoever goes on checks every byte."""
    if not job["resume"]:  # what may lie there is of an earlier run
        return 0
    names = (path.name.removeprefix("ckpt-") for path in Path(job["out"], "checkpoints").glob("ckpt-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _oom_kills(group: Cgroup | None) -> int:
    """How often the kernel has killed for memory, in the trainer's group: ours, where it has none of its own."""
    watched = group or own_cgroup()
    if watched is not None and watched.oom_kills is not None:
        return watched.oom_kills
    with contextlib.suppress(OSError):
        for line in _VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _give_up(plan: dict[str, Any]) -> bool:
    """Let no block of a plan keep its activations; whether one did."""
    lowest = min(plan["adapter"].get("layers_to_transform") or (0,))
    path = plan["model_config"]["num_hidden_layers"] - lowest
    gave_up: bool = plan["recompute_layers"] < path
    plan["recompute_layers"] = max(path, plan["recompute_layers"])
    plan["dequantized_layers"] = 0
    return gave_up


def _now(job: dict[str, Any]) -> str:
    return f", where {job['plan']['recompute_layers']} blocks run again"


def _killer(job: dict[str, Any], group: Cgroup | None, out_of_memory: bool) -> str | None:
    """Who killed it for memory; None is somebody else."""
    if not out_of_memory:
        return None
    if group is None:
        return "by the kernel, which was out of memory"
    return f"by the kernel at the budget of {format_mib(job['plan']['budget_bytes'])}"


def _cannot_hold(job: dict[str, Any], group: Cgroup | None, kills: int, by: str | None) -> int:
    """The end where going on does not help."""
    run, step = job["out"], _step(job)
    stands = f"its checkpoint of step {step} is kept" if job["resume"] else "nothing was written"
    how = f"{run} was killed {'' if kills == 1 else f'{kills} times, the last time '}{by or 'from outside'}; {stands}"
    resume = "the same command and --resume" if _personalizes(job) else f"`edgetune train --resume {run}`"
    again = resume if job["resume"] else "the same command"
    if by is None:
        raise EdgetuneError(f"{how}. Find out what kills it, then go on with {again}.")
    result = {
        "stopped": "budget", "out": run, "steps": step, "budget_bytes": job["plan"]["budget_bytes"],
        "enforcement": job["enforce"], "kills": kills,
        "cgroup_oom_kills": group and group.oom_kills, "cgroup_peak_bytes": group and group.peak_bytes,
    }  # fmt: skip
    text = f"stopped at the budget: {how}. Give {again} a larger --budget, or plan a smaller run."
    answer(result, text, job["as_json"])
    return STOPPED_EARLY


@contextlib.contextmanager
def _group(job: dict[str, Any]) -> Iterator[Cgroup | None]:
    """The job's cgroup, where it wants one."""
    if job["enforce"] != "cgroup":
        yield None
        return
    group = make_cgroup(job["plan"]["budget_bytes"])
    try:
        yield group
    finally:
        group.remove()


def main(text: str) -> int:
    """`python -m edgetune.cli.supervisor JOB` (JSON, as `launch.start` writes it); returns the exit code."""
    job = json.loads(text)
    try:
        with Child() as child, _group(job) as group:
            return supervise(job, child, group)
    except EdgetuneError as error:
        fail(error, job["as_json"])
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
