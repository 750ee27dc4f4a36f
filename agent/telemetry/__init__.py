"""What the agent reads of its box.

Problem: every library has its own units, its own words for "absent" and its own way to fail. They
end in this folder: `nvml.py` reads the GPUs, `host.py` the host, and `probe.py` puts both behind
the `GpuProbe` port.
"""
