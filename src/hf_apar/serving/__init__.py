"""APAR on stock vLLM: children as ordinary requests, offline and behind the OpenAI-compatible server (extra ``vllm``)."""
