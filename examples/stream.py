"""Follow the threads while they write: every token comes with the thread that wrote it."""

import torch
from transformers import PreTrainedTokenizerBase

import hf_apar
from hf_apar.text.encoding import decode_text


class Log(hf_apar.AparStreamer):
    """Prints a line for each event."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def begin_thread(self, row: int, thread: int, parent: int | None) -> None:
        print(f"thread {thread} starts, from {parent}")

    def put_token(self, row: int, thread: int, parent: int | None, token: int) -> None:
        print(f"{'    ' * thread}{decode_text(self.tokenizer, [token])!r}")

    def end_thread(self, row: int, thread: int, finish_reason: str) -> None:
        print(f"thread {thread} ends: {finish_reason}")

    def end(self) -> None:
        print("the answer is finished")


model, tokenizer = hf_apar.load_default_model()
chat = [{"role": "user", "content": "Give me three practical ideas for saving water at home."}]
input_ids = torch.tensor([hf_apar.encode_chat(tokenizer, chat)])
model.generate(input_ids=input_ids, apar=True, max_new_tokens=96, streamer=Log(tokenizer))
