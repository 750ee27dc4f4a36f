"""What the agent reads of its box.

Problem: every library has its own units, its own words for "absent" and its own way to fail. They
end in this folder: `nvml.py` reads the GPUs, in a process of its own (`sampler.py`), which
`remote.py` asks and `watch.py` judges; `host.py` reads the host; and `probe.py` puts both behind
the `GpuProbe` port. Only the sampler imports the binding, and it imports little else.
"""

from typing import Final

# Between the agent and the sampler: 64 GPUs with their names are 10 KiB.
MESSAGE_BYTES_MAX: Final = 1 << 16
