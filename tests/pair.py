"""Processes of one gloo group that do as they are told, so that a test need not start its own."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from tests.forked import CONTEXT, start_forking

#: Seconds after which a piece of work counts as hanging.
PATIENCE = 60


def _serve(rank: int, size: int, store: str, tasks: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    while (task := tasks.get()) is not None:
        try:
            function, arguments = pickle.loads(task)
            answer = pickle.dumps((True, function(*arguments)))
        except Exception as error:
            answer = pickle.dumps((False, error))
        answers.put(answer)
    torch.distributed.destroy_process_group()


class Processes:
    """Ranks 0 to `size` - 1 of a group on this machine."""

    def __init__(self, size: int = 2) -> None:
        start_forking()
        self._folder = tempfile.TemporaryDirectory()
        store = os.fspath(Path(self._folder.name) / "store")
        self._tasks = [CONTEXT.Queue() for _ in range(size)]
        self._answers = [CONTEXT.Queue() for _ in range(size)]
        self._processes = [
            CONTEXT.Process(
                target=_serve,
                args=(rank, size, store, self._tasks[rank], self._answers[rank]),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """Calls a function on every rank.

        Args:
            function: It and what it returns can be pickled.
            arguments: For each, the value on every rank, in the order of ranks.

        Returns:
            For each rank: whether it returned, and what it returned or raised.
        """
        for rank, tasks in enumerate(self._tasks):
            # Pickled here, since a queue does it in a thread whose errors nobody sees.
            tasks.put(pickle.dumps((function, tuple(argument[rank] for argument in arguments))))
        try:
            return [pickle.loads(answers.get(timeout=PATIENCE)) for answers in self._answers]
        except Empty:
            self.close()
            raise AssertionError("a rank hangs") from None

    def close(self) -> None:
        """Ends the processes."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.terminate()
        self._folder.cleanup()
