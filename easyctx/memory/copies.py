"""Copies between device and host beside the computation: a stream of their own on a GPU, plain copies on a CPU."""

from collections.abc import Callable

import torch


class Copies:
    """Runs copies one after the other. On a CPU each is done when `start` returns."""

    def start(self, copy: Callable[[], None]) -> "Done":
        """Begin a copy of what all work so far has made; returns what to wait for."""
        copy()
        return Done()


class Done:
    """That a copy has ended."""

    def has_come(self) -> bool:
        """Whether it has, for certain."""
        return True

    def wait(self) -> None:
        """Have the work that is given from here on come after the copy; the host does not wait."""


class CudaCopies(Copies):
    """On a stream beside the computing one."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def start(self, copy: Callable[[], None]) -> "Done":
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            copy()
            return _CudaDone(self.stream.record_event())


class _CudaDone(Done):
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def has_come(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


def copies_for(device: torch.device) -> Copies:
    """What copies between this device and the host."""
    return CudaCopies(device) if device.type == "cuda" else Copies()
