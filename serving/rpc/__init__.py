"""The gRPC door: server, servicer, checked messages."""
