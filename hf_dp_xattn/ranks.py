"""`Ranks`: the processes of one job (accelerate launch, torchrun) that make one thing together; alone where there is no job.

Integers are added exactly, in int64 on the CPU, and everything else is small. A process that fails tells the others, so that none waits for
it; one that dies makes the others' next step fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import DPXAttnError, ReleaseError

T = TypeVar("T")
LIMIT = 2**62  # of the sum of all ranks' largest entries


class Ranks:
    """rank: of this process. count: of processes."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def current(cls) -> Ranks:
        """Those of the running job; this process alone where torch.distributed was not initialised."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"))

    @property
    def first(self) -> bool:
        """Whether this process charges, and draws the noise."""
        return self.rank == 0

    @contextmanager
    def alive(self, charged: str) -> Iterator[None]:
        """Raises ReleaseError where another process is gone. charged: what it says of the charge."""
        try:
            yield
        except DPXAttnError:
            raise
        except RuntimeError as error:
            if self.count == 1:
                raise
            raise ReleaseError(
                f"A process of this release is gone, or they do not all release the same corpus ({type(error).__name__}). {charged}"
            ) from error

    def share(self, value: T | None) -> T:
        """The first process's value, on all of them."""
        if self.count == 1:
            return value  # type: ignore[return-value]
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=dist.get_global_rank(self._group, 0), group=self._group)
        shared: T = values[0]
        return shared

    def everyone(self, value: T) -> list[T]:
        """The values of all processes, by rank, on all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def collect(self, value: T) -> list[T]:
        """The values of all processes, by rank, on the first one; nothing on the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(value, values, dst=dist.get_global_rank(self._group, 0), group=self._group)
        return values or []

    def agreed(self, run: Callable[[], T]) -> T:
        """What `run` gives here. Where it fails in one process it fails in all: there with its own error, elsewhere with its class and,
        of an error of this package, its words (which quote nothing private)."""
        failed: BaseException | None = None
        value: T | None = None
        try:
            value = run()
        except Exception as error:
            failed = error
        report = None
        if failed is not None:
            words = f": {failed}" if isinstance(failed, DPXAttnError) else ""
            report = (
                type(failed) if isinstance(failed, DPXAttnError) else ReleaseError,
                f"{type(failed).__name__}{words}",
            )
        others = self.everyone(report)
        if failed is not None:
            raise failed
        for rank, other in enumerate(others):
            if other is not None:
                kind, said = other
                raise kind(f"Process {rank} of this job failed ({said}).")
        return value  # type: ignore[return-value]

    def total(self, integers: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The sum over all processes of integers (int64; none where a process has none), on the first one.

        Raises:
            ReleaseError: it may not fit int64, or shapes differ. On all processes.
        """
        mine = [t.detach().cpu() for t in integers]
        shapes = self.everyone([(tuple(t.shape), largest(t)) for t in mine])
        filled = [s for s in shapes if s]
        if not filled:
            return ()
        if any([shape for shape, _ in s] != [shape for shape, _ in filled[0]] for s in filled):
            raise ReleaseError(
                "The processes release with other configs or calibrations: their sums differ in shape. Nothing was spent."
            )
        for i in range(len(filled[0])):
            require_room(sum(s[i][1] for s in filled))
        mine = mine or [torch.zeros(shape, dtype=torch.int64) for shape, _ in filled[0]]
        if self.count > 1:
            mine = [t.contiguous().clone() for t in mine]
            for tensor in mine:
                dist.reduce(
                    tensor, dst=dist.get_global_rank(self._group, 0), op=dist.ReduceOp.SUM, group=self._group
                )
        return tuple(mine)


def largest(integers: torch.Tensor) -> int:
    """max |entry|, of int64."""
    if integers.dtype != torch.int64:
        raise ReleaseError(f"Exact sums are int64, got {integers.dtype}. Nothing was spent.")
    return max(int(integers.max()), -int(integers.min())) if integers.numel() else 0


def require_room(bound: int) -> None:
    """Raises ReleaseError where a sum of entries up to `bound` might not fit."""
    if bound >= LIMIT:
        raise ReleaseError(
            "The sums of this corpus may not fit 64 bits: release it in parts. Nothing was spent."
        )
