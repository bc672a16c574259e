"""Several sampling runs side by side, one at a time: a fit needs all of them at one step before any goes on.

A stock sampler owns its loop and cannot be stopped between two steps, so every run has a thread of its own. Only one of
them ever runs: `Turns` resumes a run, and waits until it hands on at `wait` or ends. What the runs share is as safe as
in one thread, and each run keeps its state (its sample, its cache, its sampler's history) where it is.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Stopped(BaseException):
    """Raised in the runs that are left when one has failed, so that they clean up."""


class Turn:
    """One function on its thread, in a copy of the caller's context."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.go, self.halted = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.stopped = self.done = False
        self.thread = threading.Thread(target=contextvars.copy_context().run, args=(self.main,), daemon=True)

    def main(self) -> None:
        self.go.acquire()
        try:
            if not self.stopped:
                with torch.inference_mode():
                    self.function()
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.halted.release()

    def resume(self) -> None:
        """Lets it go on until it waits or ends."""
        self.go.release()
        self.halted.acquire()

    def wait(self) -> None:
        self.halted.release()
        self.go.acquire()
        if self.stopped:
            raise Stopped


class Turns:
    """Runs functions in turn, each until it calls `wait`; raises what one of them raised, after the others ended."""

    def __init__(self) -> None:
        self.runs: list[Turn] = []
        self.current: Turn | None = None

    def wait(self) -> None:
        """Called by a run: the others come as far as this before it goes on. Where nothing takes turns it returns."""
        if self.current is not None:
            self.current.wait()

    def take(self, functions: Sequence[Callable[[], Any]]) -> None:
        if len(functions) == 1:
            functions[0]()
            return
        self.runs = [Turn(function) for function in functions]
        for run in self.runs:
            run.thread.start()
        try:
            while left := [run for run in self.runs if not run.done]:
                for run in left:
                    self.resume(run)
        finally:
            for run in self.runs:
                self.current, run.stopped = run, True
                while not run.done:
                    run.resume()
                run.thread.join()
            self.runs, self.current = [], None

    def resume(self, run: Turn) -> None:
        self.current = run
        run.resume()
        if run.error is not None:
            error, run.error = run.error, None
            raise error
