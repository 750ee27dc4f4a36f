"""A stand-in for `libnvidia-ml.so.1`, in C, for machines without a GPU.

`nvml.c` is the library and explains the file that describes the GPUs; `build.py` compiles it,
writes that file, and knows the usual GPUs; `probe_child.py` serves the agent's real probe to a
test, one request a line.
"""
