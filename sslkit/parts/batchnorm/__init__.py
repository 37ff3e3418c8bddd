"""BatchNorm over the global batch, or over groups of it, on any device and any number of processes.

Read `conversion` first, which chooses the layer: `global_norm` on CPUs, `device_norm` on GPUs.
"""

from sslkit.parts.batchnorm.conversion import (
    batch_norms,
    has_batch_norm,
    synchronise_batch_norm,
    synchronise_in_groups,
)
from sslkit.parts.batchnorm.device_norm import DeviceBatchNorm, can_divide, device_norms, shares_collectives
from sslkit.parts.batchnorm.global_norm import GlobalBatchNorm
from sslkit.parts.batchnorm.group_statistics import GroupStatistics

__all__ = [
    "DeviceBatchNorm",
    "GlobalBatchNorm",
    "GroupStatistics",
    "batch_norms",
    "can_divide",
    "device_norms",
    "has_batch_norm",
    "shares_collectives",
    "synchronise_batch_norm",
    "synchronise_in_groups",
]
