"""What the programs log: the list of events, the code, the documents and the readers' tools."""
