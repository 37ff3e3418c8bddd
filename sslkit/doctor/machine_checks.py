"""Checks of this machine: versions, devices, cores, memory, precision, threads."""

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from sslkit.data.loading.loader import cores_of_a_process
from sslkit.doctor.findings import Check, Finding
from sslkit.engine.runtime.precision import gpu_has_bf16, training_device

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")  # data workers pass batches through it


def check_machine() -> list[Finding]:
    """All findings about this machine; nothing is changed."""
    checks = {
        "versions": _versions,
        "torchvision": _torchvision,
        "albumentations": _albumentations,
        "cores": _cores,
        "threads": _threads,
        "memory": lambda check: check.ok(f"{memory_of_machine() / GIB:.1f} GiB"),
        "shared memory": _shared_memory,
        "GPU": _gpu,
        "precision": _precision,
    }
    return [Check(name).attempt(check) for name, check in checks.items()]


def memory_of_machine() -> int:
    """Memory in bytes: the machine's, or the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _read(file).strip()
        total = min(total, int(limit)) if limit.isdigit() else total
    return total


def memory_of_device(device: torch.device) -> int:
    """Memory of a device in bytes."""
    return torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else memory_of_machine()


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 natively."""
    if device.type == "cuda":
        return gpu_has_bf16()
    flags = _read("/proc/cpuinfo")
    return device.type == "mps" or any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _read(file: str) -> str:
    """The text of a system file; empty if this system does not have it."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError:
        return ""


def _versions(check: Check) -> Finding:
    packages = ("sslkit", "torch", "timm", "accelerate", "datasets")
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return check.ok(f"{', '.join(found)}, Python {platform.python_version()}")


def _torchvision(check: Check) -> Finding:
    version = importlib.metadata.version("torchvision")
    try:
        importlib.import_module("torchvision.ops")
    except Exception as error:
        return check.warning(
            f"{version} does not work with torch {torch.__version__} ({type(error).__name__}), and timm imports it: "
            "reinstall both with pip install --upgrade torch torchvision"
        )
    return check.ok(f"{version}, works with torch")


def _albumentations(check: Check) -> Finding:
    try:
        other = importlib.metadata.version("albumentationsx")
    except importlib.metadata.PackageNotFoundError:
        return check.ok(importlib.metadata.version("albumentations"))
    return check.warning(
        f"albumentationsx {other} uses the same import name and has another licence: pip uninstall albumentationsx "
        "albumentations, then pip install albumentations"
    )


def _cores(check: Check) -> Finding:
    usable, there = cores_of_a_process(1), os.cpu_count() or 1
    return check.ok(f"{usable} of {there} are usable by this process" if usable < there else str(usable))


def _threads(check: Check) -> Finding:
    variable, cores = os.environ.get("OMP_NUM_THREADS", ""), cores_of_a_process(1)
    if variable.isdigit() and int(variable) > cores:
        return check.warning(f"OMP_NUM_THREADS={variable} is more than the {cores} cores: unset it")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        return check.warning("OMP_WAIT_POLICY=ACTIVE lets idle threads spin: set OMP_WAIT_POLICY=PASSIVE")
    origin = f", from OMP_NUM_THREADS={variable}" if variable else ""
    return check.ok(f"torch uses {torch.get_num_threads()}{origin}")


def _shared_memory(check: Check) -> Finding:
    if not SHARED_MEMORY.is_dir():
        return check.not_applicable(f"there is no {SHARED_MEMORY}")
    if not os.access(SHARED_MEMORY, os.W_OK):
        return check.warning(f"{SHARED_MEMORY} is not writable: mount it writable, or set data.workers = 0")
    system = os.statvfs(SHARED_MEMORY)
    size = system.f_frsize * system.f_blocks
    if size < GIB:
        return check.warning(
            f"{SHARED_MEMORY} has {size >> 20} MiB, too little for data workers: start the container with "
            "--shm-size=8g or --ipc=host, or set data.workers = 0"
        )
    return check.ok(f"{size / GIB:.1f} GiB")


def _gpu(check: Check) -> Finding:
    if not torch.cuda.is_available():
        return check.ok("Apple (mps)" if torch.backends.mps.is_available() else "none: training runs on the CPU")
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return check.ok(", ".join(f"{each.name} ({each.total_memory / GIB:.0f} GiB)" for each in found))


def _precision(check: Check) -> Finding:
    device = training_device()
    native = has_bf16(device)
    if device.type == "cpu":
        bf16 = "native" if native else "slower than float32"
        return check.ok(f'"auto" is float32; fp16 needs a GPU; bf16 is {bf16}')
    if device.type == "cuda" and native:
        return check.ok('"auto" is bf16; fp16 is there too')
    return check.ok(f'"auto" is float32; fp16 is there too, and bf16 is {"native" if native else "emulated"}')
