"""Threads, the paragraph tree that they write, and the cache slots that their paths hold: plain Python."""
