"""Both real shells in one process, under virtual time, with every fault that a fleet knows.

`python -m tests.sim` runs many seeds; `test_sim.py` runs some in every build. See `world.py`.
"""
