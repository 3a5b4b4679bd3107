"""What this machine has, and which known defects of RecBole and transformers it meets: the report to read or to
send."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from recbole_hatllm import __version__, compat

PACKAGES = ("recbole", "torch", "transformers", "peft", "accelerate", "safetensors", "gguf", "bitsandbytes",
            "numpy", "scipy", "pandas")  # fmt: skip

Version = tuple[int, ...]


@dataclass(frozen=True)
class Known:
    """A defect of some versions of transformers; `mended` says what this package does about it."""

    name: str
    what: str
    found: Callable[[Version], bool]
    mended: str


TRANSFORMERS = (
    Known(
        "one way of masks", "before 4.53, not all families take masks in the way used here", lambda v: v < (4, 53), "no"
    ),
    Known(
        "packed GGUF",
        "newer versions keep .gguf weights packed, which LoRA cannot train",
        lambda v: _file("quantizer_gguf"),
        "yes",
    ),
    Known(
        "Gemma-2 soft cap",
        "4.53 to 5.17 drop the cap of its scores under sdpa",
        lambda v: (4, 53) <= v < (5, 18),
        "yes",
    ),
)


def report() -> str:
    """Versions, machine, and one line for each known defect: found in the installed versions or not, mended or not."""
    lines = [
        "Versions",
        *_table(
            [
                ("recbole_hatllm", __version__),
                ("python", platform.python_version()),
                *((name, _version(name)) for name in PACKAGES),
            ]
        ),
    ]
    lines += ["", "Machine", *_table(_machine())]
    lines += ["", "Known defects of RecBole 1.2.1"]
    lines += [_line(d.name, d.what, _tell(d.found), _tell(d.mended)) for d in compat.DEFECTS]
    lines += ["", "Known defects of transformers"]
    installed = tuple(int(part) for part in re.findall(r"\d+", _version("transformers"))[:2])
    lines += [_line(k.name, k.what, _yes(installed and k.found(installed)), k.mended) for k in TRANSFORMERS]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _file(quantizer: str) -> bool:
    """Whether transformers has that quantizer; looked up as a file, since importing transformers takes seconds."""
    spec = importlib.util.find_spec("transformers")
    return spec is not None and Path(spec.origin).with_name("quantizers").joinpath(f"{quantizer}.py").is_file()


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("cores", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable"),
        ("threads", f"{torch.get_num_threads()} for torch"),
        ("memory", _memory()),
        (
            "bf16 on the CPU",
            _yes(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        ),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none that torch can use")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, bf16 {_yes(gpu.major >= 8)}"))
    return rows


def _memory() -> str:
    """Free and whole memory, of the container where it has a limit of its own."""
    if not hasattr(os, "sysconf"):
        return "unknown"
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    whole = f"{total / 2**30:.1f} GiB"
    return whole if free is None else f"{whole}, {min(free, total) / 2**30:.1f} GiB free"


def _tell(question: Callable[[], bool]) -> str:
    """The answer, or why there is none: a report on a broken installation must still come out."""
    try:
        return _yes(question())
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _line(name: str, what: str, found: str, mended: str) -> str:
    return f"  {name:<22}found: {found:<5}mended: {mended:<5}{what}"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"  {name:<22}{value}" for name, value in rows]
