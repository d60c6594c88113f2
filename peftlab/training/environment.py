"""What a result depends on besides the experiment: device, versions, source."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from peftlab.results.record import Environment

PACKAGES = ("peftlab", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")


def describe_device(device: torch.device) -> str:
    """The accelerator's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide results."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_environment(device: torch.device, num_processes: int) -> Environment:
    """The environment of this process."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain") if commit else None
    return Environment(
        device=f"{device.type}: {describe_device(device)}",
        num_processes=num_processes,
        num_threads=torch.get_num_threads(),
        python=platform.python_version(),
        platform=platform.platform(),
        versions=package_versions(),
        git_commit=commit,
        git_dirty=None if status is None else bool(status),
    )


def _git(*arguments: str) -> str | None:
    """What git says of the working directory, None outside a repository or without git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
