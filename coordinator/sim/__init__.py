"""The fleet in virtual time: the production core decides, and here are time, jobs and GPUs.

Problem: whether one way to share a fleet is better than another takes weeks to see on the fleet,
and then it was another week. So jobs with known work and known rates arrive in a heap of events
(`engine.py`), a policy (`policies.py`, `rounds.py`, `ours.py`) says who runs where, and what
happened is a list of lines that others than the engine verify (`checks.py`) and measure
(`report.py`). The same seed makes the same lines, and the same hash of them.

GPUs are counted by type here; which node of a type it is has no part in these questions.
"""
