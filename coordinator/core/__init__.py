"""Pure decisions of the fleet: no clock, no I/O, no threads, no protobuf."""
