"""Text to tokens and back: tokenizers, chat templates, stop strings. Knows no gRPC, no messages."""
