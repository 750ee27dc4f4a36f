"""The coordinator's durable state: one port, one SQL text, one conformance suite."""
