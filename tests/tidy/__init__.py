"""The rules of the house, as code.

Problem: a rule that lives in a document is a rule that the next hurried change breaks. So each rule
is a function from a source file to findings, with a number or a name in every finding, and is
itself tested on a snippet that breaks it: a check that cannot fail guards nothing.

- `source.py` finds and parses the files; `shape.py` measures them; `bans.py` names what must not be
  written; `purity.py` keeps the cores pure; `layout.py` looks at how the files hang together.
- `test_tree.py` runs every rule on this tree; `test_rules.py` runs every rule on snippets.

Resembles TigerBeetle's `src/tidy.zig`.
"""
