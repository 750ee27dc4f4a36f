"""The command `baton`: one file per noun, and one file (`client.py`) that knows how the coordinator
is spoken to."""
