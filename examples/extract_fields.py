"""Take ten fields out of one document: it is read and held once, and all fields are written in the same forward passes."""

import torch

import hf_apar

DOCUMENT = """\
The Wren's Rest is a small hotel in Aldbury, a village of 900 people on the river Tame. It was built in 1874 as a mill and \
became a hotel in 1961, when Martha Osgood bought it. Today her grandson Peter Osgood runs it with a staff of seven. There \
are 14 rooms, and a double room costs 95 pounds a night, breakfast included. The kitchen is known for its trout pie. Dogs \
are welcome in the garden rooms. The hotel is closed in January. To book a room, call 01632 960 417."""
FIELDS = {  # how an answer that names the field begins
    "name": "The hotel is called",
    "village": "It is in the village of",
    "river": "The village lies on the river",
    "built": "It was built in the year",
    "built as": "It was built as a",
    "run by": "The name of the man who runs it today is",
    "rooms": "The number of rooms is",
    "price": "A double room costs",
    "known for": "Its kitchen is known for",
    "telephone": "The telephone number is",
}

model, tokenizer = hf_apar.load_default_model()  # any model of transformers will do: nothing of it forks here
question = f"{DOCUMENT}\n\nWhat does the text say about the hotel?"
input_ids = torch.tensor([hf_apar.encode_chat(tokenizer, [{"role": "user", "content": question}])])

out = hf_apar.branch(
    model, input_ids, list(FIELDS.values()), tokenizer=tokenizer, stop_strings=[".", ",", "\n"], max_new_tokens=16,
    do_sample=False, return_dict_in_generate=True, output_scores=True,
)  # fmt: skip

for field, text, logprobs in zip(FIELDS, out.texts(tokenizer)[0], out.logprobs[0], strict=True):
    sure = torch.tensor(logprobs).mean().exp()  # the mean probability of its tokens
    print(f"{field:<12}{text.strip().rstrip('.,'):<36}{sure:.2f}")
stats = out.stats[0]
print(f"{stats.tokens} tokens in {stats.steps} passes, {stats.peak_kv} slots; one by one {stats.kv_if_sequential} in all")
