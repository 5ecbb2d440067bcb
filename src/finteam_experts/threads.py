# SPDX-License-Identifier: Apache-2.0
"""How many cores a process uses, how its threads wait for each other, and what they compute in. Import it before torch.

Between two matrix products a thread that has finished spins until the others have. If another program uses one of the cores,
it spins for as long as the slowest thread has to wait for that core. OpenMP reads how long to spin when torch is imported.
"""

import math
import os
from pathlib import Path

# Then it sleeps, and is slow to wake. A training step of the sample takes 1.29 seconds with 2,000, 1.17 with 10,000 and 1.07 with the
# default of 300,000; with one of two cores busy 1.9, 3.2 and 20.6 (docs/speed.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores in a period, and the period


def available_cores() -> int:
    """The cores that this process may use: by its affinity, and by its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or one without a quota ("max")
        return cores


def use_available_cores() -> None:
    """Give this process its share of the cores, also where `accelerate launch` left it with one thread."""
    import torch

    torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def has_bf16_units() -> bool:
    """Whether this CPU multiplies in bfloat16 itself (AVX512-BF16, AMX or Arm's BF16): elsewhere float32 is faster."""
    import torch

    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
