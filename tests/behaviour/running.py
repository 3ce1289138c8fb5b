"""Run `python -m vmonarch_cli` many times at the cost of one import of torch, and give back what each run left.

A process that has imported torch and the diffusers classes, and has run `vmonarch --version`, forks for every command;
the fork enters the program through `runpy`, as `python -m` does. What a command does to the process is gone with its
fork. `spawn=True` starts an interpreter for each command instead: seconds longer, and the same record. A command with
variables of its own always gets one, as libraries read variables when they are imported.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
INPUTS = HERE / "inputs"
LIMIT_S = 300
_KEPT = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT")


@dataclass(frozen=True)
class Command:
    """One command line, and what it needs around it."""

    group: str
    """The file of `expected/` that holds its record."""
    name: str
    args: str
    """What follows `vmonarch`, as in a shell; without a shell's wildcards and variables."""
    folder: str = ""
    """Commands of one folder run there in order and find what earlier ones wrote; "" is a folder of its own."""
    stdin: str = ""
    env: dict[str, str] = field(default_factory=dict)
    columns: int | None = None
    """Width of the output; None leaves the program its default."""
    measured: bool = False
    """Whether the output holds times: its numbers are then left out of the text, and wrapping does not matter."""
    kill_at: tuple[str, str] = ("", "")
    """A file and a text: the process is killed as soon as the file holds the text."""
    in_full: bool = False
    """Whether a record's facts of the model and the preset are kept, not only their digest."""
    slow: bool = False
    """Whether only the whole record has it, and the quick check of the test suite leaves it out."""


@dataclass(frozen=True)
class Left:
    """What a command left."""

    exit: int
    """Exit code; the negative of the signal's number for a killed process."""
    stdout: str
    stderr: str
    folder: Path
    changed: tuple[str, ...]
    """Files made or changed, relative to the folder."""
    removed: tuple[str, ...]


def environment(home: Path) -> dict[str, str]:
    """A process environment in which nothing of the user's settings changes what is printed."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {
        **kept,
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "VMONARCH_CACHE": str(home / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "TZ": "UTC",
        "VMONARCH_COMMIT": "recorded",
    }


def warm_up() -> None:
    """Import what every clip needs, and start the program once; where a library lacks a name, runs are just slower."""
    os.environ.update({"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"})
    for module, names in (
        ("torch", ()),
        ("numpy", ()),
        ("PIL.Image", ()),
        ("typer.rich_utils", ()),
        ("rich.table", ()),
        ("rich.progress", ()),
        ("yaml", ()),
        ("pydantic", ("BaseModel", "ConfigDict", "field_validator", "ValidationError")),
        ("transformers", ("UMT5EncoderModel", "AutoTokenizer", "T5TokenizerFast")),
        (
            "diffusers",
            (
                "WanPipeline",
                "WanTransformer3DModel",
                "AutoencoderKLWan",
                "FlowMatchEulerDiscreteScheduler",
                "UniPCMultistepScheduler",
            ),
        ),
    ):
        with contextlib.suppress(ImportError, AttributeError):
            loaded = importlib.import_module(module)
            for name in names:
                getattr(loaded, name)
    sys.path[:] = _program_path()
    argv, sys.argv = sys.argv, ["vmonarch", "--version"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = _enter()
    sys.argv = argv
    if code:
        raise RuntimeError("the program does not start: see above")


def _program_path() -> list[str]:
    return [entry for entry in sys.path if entry and Path(entry).resolve() != HERE]


def run_all(commands: list[Command], work: Path, jobs: int, spawn: bool) -> Iterator[tuple[Command, Left]]:
    """Run the commands, those of one folder in order, `jobs` folders at a time."""
    chains: dict[str, list[Command]] = {}
    for command in commands:
        chains.setdefault(command.folder or f"{command.group}-{command.name}", []).append(command)
    waiting = list(chains.items())
    active: dict[str, tuple[list[Command], _Running]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                key, chain = waiting.pop(0)
                folder = work / key
                shutil.copytree(INPUTS, folder / "here")
                active[key] = (chain[1:], _Running(chain[0], folder, spawn or bool(chain[0].env)))
            for key, (rest, running) in list(active.items()):
                left = running.ended()
                if left is None:
                    continue
                yield running.command, left
                del active[key]
                if rest:
                    active[key] = (rest[1:], _Running(rest[0], work / key, spawn or bool(rest[0].env)))
            time.sleep(0.003)
    finally:
        for _, running in active.values():
            running.stop()


class _Running:
    """A command that is running in `folder/here`."""

    def __init__(self, command: Command, folder: Path, spawn: bool) -> None:
        self.command = command
        self._folder = folder
        self._here = folder / "here"
        self._before = _files(self._here)
        self._began = time.monotonic()
        (folder / "stdin").write_text(command.stdin, encoding="utf-8")
        env = {**environment(folder / "home"), **command.env}
        if command.columns is not None:
            env["COLUMNS"] = str(command.columns)
        arguments = shlex.split(command.args)
        if spawn:
            self._pid = _start(arguments, env, folder)
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            self._pid = os.fork()
            if self._pid == 0:
                _become(arguments, env, folder)

    def ended(self) -> Left | None:
        """What the command left, once it has ended."""
        name, sign = self.command.kill_at
        if name and (self._here / name).is_file() and sign in (self._here / name).read_text(encoding="utf-8"):
            os.kill(self._pid, signal.SIGKILL)
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - self._began > LIMIT_S:
                self.stop()
                raise TimeoutError(f"vmonarch {self.command.args} did not end within {LIMIT_S} s")
            return None
        after = _files(self._here)
        return Left(
            os.waitstatus_to_exitcode(status),
            *((self._folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")),
            self._here,
            tuple(sorted(name for name, stamp in after.items() if self._before.get(name) != stamp)),
            tuple(sorted(set(self._before) - set(after))),
        )

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def _start(arguments: list[str], env: dict[str, str], folder: Path) -> int:
    with (
        (folder / "stdin").open("rb") as stdin,
        (folder / "stdout").open("wb") as out,
        (folder / "stderr").open("wb") as err,
    ):
        command = [sys.executable, "-m", "vmonarch_cli", *arguments]
        process = subprocess.Popen(command, cwd=folder / "here", env=env, stdin=stdin, stdout=out, stderr=err)
    process.returncode = 0  # whoever asked waits for the process by its id
    return process.pid


def _become(arguments: list[str], env: dict[str, str], folder: Path) -> None:
    """Be `python -m vmonarch_cli ARGUMENTS` in `folder/here` from here on; never returns."""
    code = 70
    try:
        for number, (name, flags) in enumerate(
            (
                ("stdin", os.O_RDONLY),
                ("stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
                ("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            )
        ):
            file = os.open(folder / name, flags, 0o644)
            os.dup2(file, number)
        sys.stdin = io.TextIOWrapper(os.fdopen(0, "rb", closefd=False), encoding="utf-8")
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", line_buffering=True)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder / "here")
        sys.path[:] = _program_path()
        sys.argv = ["vmonarch", *arguments]
        code = _enter()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _enter() -> int:
    try:
        runpy.run_module("vmonarch_cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0
