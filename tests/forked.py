"""Processes that start at once: forks of one that has imported fxfuse, and fused once.

A new interpreter imports torch for seconds, before what a test is about can begin. The process
that forks has one thread and runs nothing else, so that nothing of the tests is in the children.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
#: Seconds after which a child counts as hanging.
PATIENCE = 120


def start_forking() -> None:
    """Start the process that forks, where it finds the tests, unless it runs."""
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()


class Child:
    """A function in a process of its own, which may be sent signals.

    Args:
        function: A function of a module.
        *arguments: Its arguments, which can be pickled.
        cwd: The working directory, and the first folder in which modules are looked for.
        environment: Variables to add.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: Any,
        cwd: Path = ROOT,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        start_forking()
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        given = (self._files, str(cwd), dict(environment), function, arguments)
        self.process = CONTEXT.Process(target=_run, args=given, daemon=True)
        self.process.start()

    def first_line(self) -> str:
        """The first line on standard output, as soon as it is complete."""
        deadline = time.monotonic() + PATIENCE
        while "\n" not in (said := self._files[0].read_text()):
            assert time.monotonic() < deadline
            assert self.process.is_alive() or "\n" in self._files[0].read_text(), self.ended()
            time.sleep(0.005)
        return said.splitlines()[0]

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self) -> tuple[int | None, str, str]:
        """Exit status, standard output and standard error, once the process has ended."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError("a process hangs")
        out, err = (file.read_text() for file in self._files)
        return self.process.exitcode, out, err


def _run(
    files: list[Path],
    cwd: str,
    environment: dict[str, str],
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    """What a new interpreter would do around a script."""
    for number, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    # Where tests run in the background, they and their children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    os.environ.update(environment)
    try:
        function(*arguments)
    finally:
        # Children of multiprocessing leave these out.
        atexit._run_exitfuncs()


def fxfuse(*arguments: object) -> None:
    """`fxfuse ARGUMENTS`."""
    from fxfuse.cli import main

    sys.argv = ["fxfuse", *map(str, arguments)]
    main()


def script(path: Path) -> None:
    """`python PATH`."""
    runpy.run_path(str(path), run_name="__main__")


def fxfuse_on_disk(disk: Path, size: str, writable: bool, *arguments: object) -> None:
    """Run fxfuse where a folder is a file system of some size; print what is on it then."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _check(libc.unshare(0x10000000 | 0x00020000))  # a user's and mounts of its own
    for file, content in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path("/proc/self", file).write_text(content)
    options = f"size={size}".encode()
    _check(libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0 if writable else 1, options))
    try:
        fxfuse(*arguments)
    finally:
        print(*sorted(os.listdir(disk)), flush=True)


def fxfuse_without_rights(*arguments: object) -> None:
    """Run fxfuse without the rights of root to write anywhere."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    _check(ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()))
    fxfuse(*arguments)


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
