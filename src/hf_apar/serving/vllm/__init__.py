"""Stock vLLM as the engine: offline, and behind its own server."""
