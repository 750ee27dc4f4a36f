"""Trainers as processes: `shim.py` holds one and outlives the agent, `supervisor.py` is the agent's
side, `logs.py` reads.

Problem: a trainer that is the agent's child dies, or loses its output pipe and its exit status,
when the agent is restarted. So each trainer gets a small parent of its own, and everything that the
agent must know about it afterwards lies in one directory per attempt: `launch`, `started.json`,
`exit.json`, `log/`.
"""
