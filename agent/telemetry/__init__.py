"""What the agent reads of its box.

Problem: every library has its own units, its own words for "absent" and its own way to fail. They
end in this folder: `nvml.py` reads the GPUs, in a process of its own (`sampler.py`), which
`remote.py` asks and `watch.py` judges; `host.py` reads the host; and `probe.py` puts both behind the
`GpuProbe` port.
"""
