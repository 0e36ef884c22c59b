"""How an answer was written, step by step, and a page that plays it: record, keep, show."""

from hf_apar.replay.page import replay_page, write_replay
from hf_apar.replay.recorder import Recorder, trace_of_tree
from hf_apar.replay.trace import Trace, TracedThread, load_traces, save_traces

__all__ = [
    "Recorder", "Trace", "TracedThread", "load_traces", "replay_page", "save_traces", "trace_of_tree", "write_replay",
]  # fmt: skip
