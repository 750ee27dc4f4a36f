"""Version 1 of the contract. All but the .proto files is generated (`make protos`)."""
