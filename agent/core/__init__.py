"""Pure decisions of one node: no clock, no I/O, no threads, no protobuf."""
