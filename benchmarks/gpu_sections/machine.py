"""Which machine, versions and switches the figures are of."""

import os
import platform
from datetime import UTC, datetime

import timm
import torch

import sslkit
from gpu_sections.common import Plan, Row


def run(plan: Plan) -> list[Row]:
    """One row a fact."""
    facts: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "sslkit": sslkit.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": plan.device.type,
    }
    if plan.device.type == "cuda":
        properties = torch.cuda.get_device_properties(plan.device)
        facts |= {
            "GPU": properties.name,
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "compute capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "clock, MHz": torch.cuda.clock_rate(plan.device),
        }
    return [{"fact": name, "value": value} for name, value in facts.items()]
