"""What this machine can do: devices, cores, memory, precision, threads, versions."""

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from sslkit.data.loading.loader import cores_of_a_process
from sslkit.doctor.findings import Finding, attempt, not_applicable, ok, warning

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")  # where data workers leave their batches


def examine_machine() -> list[Finding]:
    """Look, and change nothing."""
    checks = {
        "versions": _versions,
        "torchvision": _torchvision,
        "albumentations": _albumentations,
        "cores": _cores,
        "threads": _threads,
        "memory": _memory,
        "shared memory": _shared_memory,
        "GPU": _gpu,
        "precision": check_bf16,
    }
    return [attempt(name, check) for name, check in checks.items()]


def training_device() -> torch.device:
    """Where a run on this machine computes."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def memory_of_machine() -> int:
    """Bytes that processes here may use: the machine's, or less where a container sets a limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def memory_of_device(device: torch.device) -> int:
    """Bytes of the device that computes."""
    return torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else memory_of_machine()


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself, rather than by way of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def check_bf16() -> Finding:
    """Which of ``no``, ``bf16`` and ``fp16`` pays here."""
    device = training_device()
    if device.type == "cpu":
        speed = "bf16 is computed natively" if has_bf16(device) else "bf16 works but is slower than float32"
        return ok("precision", f"no GPU, so no fp16; {speed}")
    return ok("precision", "bf16 and fp16" if has_bf16(device) else "fp16; bf16 only by emulation")


def _versions() -> Finding:
    found = [
        f"{name} {importlib.metadata.version(name)}" for name in ("sslkit", "torch", "timm", "accelerate", "datasets")
    ]
    return ok("versions", f"{', '.join(found)}, Python {platform.python_version()}")


def _torchvision() -> Finding:
    version = importlib.metadata.version("torchvision")
    try:
        importlib.import_module("torchvision.ops")
    except Exception as error:
        return warning(
            "torchvision",
            f"{version} does not fit this torch ({type(error).__name__}): `accelerate launch` imports it through timm "
            "and would stop; install the pair of versions that belong together",
        )
    return ok("torchvision", f"{version}, fits torch")


def _albumentations() -> Finding:
    try:
        version = importlib.metadata.version("albumentations")
    except importlib.metadata.PackageNotFoundError:
        return warning(
            "albumentations", "not installed; another package may answer to its name: pip install albumentations"
        )
    try:
        other = importlib.metadata.version("albumentationsx")
    except importlib.metadata.PackageNotFoundError:
        return ok("albumentations", version)
    return warning(
        "albumentations",
        f"albumentationsx {other} lies in the same folder and has another licence; uninstall both, then install "
        "albumentations alone",
    )


def _cores() -> Finding:
    usable, there = cores_of_a_process(1), os.cpu_count() or 1
    return ok("cores", f"{usable} of {there} may be used" if usable < there else str(usable))


def _threads() -> Finding:
    asked, cores = os.environ.get("OMP_NUM_THREADS"), cores_of_a_process(1)
    if asked and asked.isdigit() and int(asked) > cores:
        return warning("threads", f"OMP_NUM_THREADS = {asked} on {cores} cores: threads would wait for each other")
    waiting = os.environ.get("OMP_WAIT_POLICY", "").upper()
    if waiting == "ACTIVE":
        return warning("threads", "OMP_WAIT_POLICY = ACTIVE takes cores from data workers; unset it or say PASSIVE")
    return ok(
        "threads", f"torch computes with {torch.get_num_threads()}" + (f", OMP_NUM_THREADS = {asked}" if asked else "")
    )


def _memory() -> Finding:
    return ok("memory", f"{memory_of_machine() / GIB:.1f} GiB")


def _shared_memory() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return not_applicable("shared memory", f"no {SHARED_MEMORY} here")
    if not os.access(SHARED_MEMORY, os.W_OK):
        return warning(
            "shared memory", f"{SHARED_MEMORY} cannot be written to; mount it writable, or set [data] workers = 0"
        )
    system = os.statvfs(SHARED_MEMORY)
    size = system.f_frsize * system.f_blocks
    if size < GIB:
        return warning(
            "shared memory",
            f"{SHARED_MEMORY} has {size >> 20} MiB, too few for data workers' batches: start the container with "
            "--shm-size=8g or --ipc=host, or set [data] workers = 0",
        )
    return ok("shared memory", f"{size / GIB:.1f} GiB")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return ok(
            "GPU", "Apple's, by way of mps" if torch.backends.mps.is_available() else "none: training runs on the CPU"
        )
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ok("GPU", ", ".join(f"{each.name} ({each.total_memory / GIB:.0f} GiB)" for each in found))
