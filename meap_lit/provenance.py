"""The hardware, the versions and the commit of a run or an evaluation."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import meap_lit


def processor() -> str:
    """Return the name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where `platform.processor` is empty
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def versions() -> dict[str, str | None]:
    """Return the versions that decide a result, by name."""
    return {
        "meap_lit": meap_lit.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "litdata", "tokenizers", "numpy")},
        "cuda": torch.version.cuda,
    }


def git_commit() -> str | None:
    """Return the commit of the package's checkout, with `-dirty` if files differ from it; None without a checkout."""
    folder = Path(meap_lit.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk: no reason to end a run
        return None
    return found.stdout.strip() or None
