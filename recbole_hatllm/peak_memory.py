"""The most memory that a run took, whatever ran before it in the same process."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Bytes at their most since this was made: of the tensors on a CUDA device; else the resident set of the process, Python and
    its libraries included. What runs before have left behind is given back first, so that it does not count.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = 0
        self.begin()

    def begin(self) -> None:
        """Counts from what is there now on; what was noted before stays."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError, AttributeError):  # no glibc: freed blocks may stay
            ctypes.CDLL(None).malloc_trim(0)
        try:
            # ru_maxrss never falls; the kernel's own mark does, to what is resident now.
            (_PROCESS / "clear_refs").write_text("5")
        except OSError:  # no Linux, or a container that does not allow it: then the peak is not known
            self.bytes = None

    def note(self) -> int | None:
        """The peak so far, None where it cannot be told; `begin` may follow, to leave out what comes next."""
        if self.bytes is not None:
            self.bytes = max(self.bytes, self._now())
        return self.bytes

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text(encoding="utf-8"))
        return 1024 * int(found[1]) if found else 0
