"""Real processes, real gRPC, real SQLite, real trainers, on loopback."""
