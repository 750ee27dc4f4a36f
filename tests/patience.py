"""How long a test waits for what must come: an answer, another process, a thread.

Reached only when the test fails, so it is far longer than anything takes that works, on the
slowest machine that these tests have met: there a trainer needed 16 s to import what it imports,
and was at its first step after 36 s, where 6 s are usual. The suite's own timeouts
(`pyproject.toml`, `tests/e2e/conftest.py`) are longer still, or they would come first, without
saying what was waited for.
"""

HANG_S = 300
