"""The verb doctor: what this machine can do, and what is missing."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from peftlab.assets import RELEASES, cache_dir
from peftlab.errors import Problem
from peftlab.units import GIB, format_bytes

_ROOM = 5 * GIB
_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16")


@dataclass(frozen=True)
class Device:
    """Something to compute on; ``bf16`` is whether it multiplies bfloat16 in hardware."""

    name: str
    memory_bytes: int
    bf16: bool


@dataclass(frozen=True)
class Diagnosis:
    """What was found. ``problems`` say what keeps something from working, and what to do.

    Args:
        devices: the processor first.
        threads: what torch uses of ``cores``.
        eight_bit: bitsandbytes took an optimizer step with 8-bit state.
        cached: embedded model or data set to whether it is here; the others are downloaded when
            they are first used.
    """

    python: str
    platform: str
    versions: dict[str, str | None]
    devices: tuple[Device, ...]
    cores: int
    threads: int
    memory_available_bytes: int
    cuda: str | None
    eight_bit: bool
    cache_dir: str
    cached: dict[str, bool]
    disk_free_bytes: int
    problems: tuple[Problem, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the problems left out."""
        data = asdict(self)
        del data["problems"]
        return data


def diagnose() -> Diagnosis:
    """Look at the machine; loads torch and bitsandbytes, downloads nothing."""
    import psutil
    import torch

    versions = _versions()
    problems = [
        Problem(package, "is not installed.", f"pip install {package}")
        for package, found in versions.items()
        if found is None
    ]
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    processor = Device(_processor(), memory.total, _processor_has_bf16())
    eight_bit, wrong = _eight_bit_step()
    problems += wrong
    free = shutil.disk_usage(_existing(cache_dir())).free
    if free < _ROOM:
        message = f"only {format_bytes(free)} free for models and data."
        problems.append(Problem(str(cache_dir()), message, "Set PEFTLAB_CACHE to another disk."))
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=versions,
        devices=(processor, *_cuda_devices()),
        cores=cores,
        threads=torch.get_num_threads(),
        memory_available_bytes=memory.available,
        cuda=torch.version.cuda if torch.cuda.is_available() else None,
        eight_bit=eight_bit,
        cache_dir=str(cache_dir()),
        cached={name: (cache_dir() / release.key).is_dir() for name, release in RELEASES.items()},
        disk_free_bytes=free,
        problems=tuple(problems),
    )


def _versions() -> dict[str, str | None]:
    """The packages that peftlab needs, each with its version; None if it is missing."""
    found: dict[str, str | None] = {"peftlab": version("peftlab")}
    for requirement in requires("peftlab") or ():
        if "extra ==" in requirement:
            continue
        package = requirement.split(";")[0].split(">")[0].split("<")[0].split("=")[0].strip()
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    import torch

    name = torch.cpu.get_capabilities().get("cpu_name")
    return str(name or platform.processor() or platform.machine())


def _processor_has_bf16() -> bool:
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(feature) for feature in _BF16_FEATURES)


def _cuda_devices() -> list[Device]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        # Ampere is the first that multiplies bfloat16; torch emulates it on older ones.
        devices.append(Device(facts.name, facts.total_memory, facts.major >= 8))
    return devices


def _eight_bit_step() -> tuple[bool, list[Problem]]:
    """Whether bitsandbytes steps with 8-bit state here, tried out."""
    import torch

    hint = "The recipes full-8bit and qlora need it: pip install --force-reinstall bitsandbytes"
    try:
        from bitsandbytes.optim import AdamW8bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
        weight.grad = torch.ones_like(weight)
        optimizer = AdamW8bit([weight], lr=0.1)
        optimizer.step()
        state = optimizer.state[weight]["state1"]
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        return False, [Problem("bitsandbytes", f"cannot be used: {reason}.", hint)]
    if state.dtype != torch.uint8 or not bool((weight < 1).all()):
        return False, [Problem("bitsandbytes", "its 8-bit step does not do what it should.", hint)]
    return True, []


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
