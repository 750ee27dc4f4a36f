"""The protobuf package `baton`; its versions live below."""
