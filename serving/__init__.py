"""The engine behind gRPC: protocol, tokenizer, the loop that owns the engine, the service."""
