"""The inference engine: requests in, tokens out. It never loads a file and never opens a port."""
