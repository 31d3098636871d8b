"""Device, number format and memory of this machine: each choice with its reason."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.errors import RecipeError

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "qft-toolkit", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets",
    "safetensors", "tokenizers", "gguf",
)  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """What a run uses, and why.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: of weights and arithmetic.
        reason: why these two, in one sentence each.
    """

    device: str
    dtype: torch.dtype
    reason: str


DTYPES = ("auto", "bfloat16", "float16", "float32")


def choose(device: str = "auto", dtype: str = "auto") -> Hardware:
    """The device and dtype for a run.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.

    Raises:
        RecipeError: CUDA was asked for and is not there, or there is no such dtype.
    """
    import torch

    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise RecipeError(
            "The recipe asks for CUDA, and this PyTorch sees no CUDA device.",
            where="device",
            found=f"torch {torch.__version__}",
            fix="device: auto",
        )
    chosen = "cuda" if cuda and device != "cpu" else "cpu"
    why_device = (
        "asked for"
        if device != "auto"
        else ("a CUDA device is there" if cuda else "there is no CUDA device")
    )
    if dtype not in DTYPES:
        raise RecipeError("No such type of numbers.", where="dtype", found=dtype,
                          fix=", ".join(DTYPES))  # fmt: skip
    if dtype != "auto":
        reason = f"{chosen}: {why_device}; {dtype}: asked for"
        return Hardware(chosen, getattr(torch, dtype), reason)
    fast, why_dtype = _fast_bfloat16(chosen)
    picked = torch.bfloat16 if fast else torch.float32
    name = str(picked).removeprefix("torch.")
    return Hardware(chosen, picked, f"{chosen}: {why_device}; {name}: {why_dtype}")


def _fast_bfloat16(device: str) -> tuple[bool, str]:
    import torch

    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, f"this GPU {'computes' if fast else 'does not compute'} in bfloat16"
    flags = _cpu_flags()
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return True, "this CPU has AVX512-BF16 or AMX"
    return False, "this CPU has no AVX512-BF16, so bfloat16 would be slower"


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpu_says("flags", "Features").split())


def _cpu_says(*keys: str) -> str:
    """What /proc/cpuinfo has for the first of these keys; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")


def device_name(device: str) -> str:
    """The card's or the processor's own name; ``cuda`` where there is no card."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else device
    return _cpu_says("model name") or platform.processor() or device


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return peak_resident_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


_peak_before = [0]  # of the times before the kernel's own mark was last set back


def peak_resident_bytes() -> int:
    """The most bytes this process ever had in memory."""
    return max(_peak_before[0], _marked_resident_bytes())


def _marked_resident_bytes() -> int:
    """The most since the kernel's mark was set back, or since the process began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes_since() -> int | None:
    """The most bytes in memory since this was last called; None where the system does not tell.

    The kernel's high-water mark is read and set back (Linux: 5 in /proc/self/clear_refs).
    """
    peak = _marked_resident_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    _peak_before[0] = max(_peak_before[0], peak)
    return peak


def device_memory(device: str) -> tuple[int, int]:
    """Bytes in use now and at the peak: allocated on a GPU, resident on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    now = resident_bytes()  # the kernel counts the two in different ways
    return now, max(now, peak_resident_bytes())


def free_memory_bytes(device: str) -> int | None:
    """Bytes a new job could take, or None where the system does not say."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    known = [free for free in (_available_bytes(), _free_in_group_bytes()) if free is not None]
    return min(known, default=None)


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


_GROUPS = (("memory.max", "memory.current"),  # of a container, version 2 and version 1
           ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))  # fmt: skip


def _free_in_group_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves; what it uses includes files that could be given up."""
    for limit, used in _GROUPS:
        try:
            allowed = int((root / limit).read_text(encoding="ascii"))
            taken = int((root / used).read_text(encoding="ascii"))
            files = _cached_files_bytes((root / limit).with_name("memory.stat"))
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        return max(0, allowed - taken + files)
    return None


def _cached_files_bytes(statistics: Path) -> int:
    for line in statistics.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """Everything `qft env` prints: for a bug report, no paths and no names in it."""
    import torch

    hardware = choose()
    values: dict[str, Any] = {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": hardware.device,
        "dtype": str(hardware.dtype).removeprefix("torch."),
        "reason": hardware.reason,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "free_memory_bytes": free_memory_bytes(hardware.device),
    }
    if hardware.device == "cuda":
        values["gpu"] = torch.cuda.get_device_name()
        values["gpu_memory_bytes"] = torch.cuda.mem_get_info()[1]
    return values
