"""The contract of agent, coordinator and clients: `baton/v1/*.proto` and its generated code."""
