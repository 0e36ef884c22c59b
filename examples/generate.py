"""Decode one answer with many threads, and look at the tree that came out."""

import torch

import hf_apar

model, tokenizer = hf_apar.load_default_model()
chat = [{"role": "user", "content": "Give me three practical ideas for saving water at home."}]
input_ids = torch.tensor([hf_apar.encode_chat(tokenizer, chat)])

out = model.generate(input_ids=input_ids, apar=True, max_new_tokens=96, return_dict_in_generate=True)
tree, stats = out.trees[0], out.stats[0]

print(tree.text(tokenizer))
for number, thread in enumerate(tree.threads):
    print(f"thread {number}, parent {thread.parent}, depth {thread.depth}: {tokenizer.decode(thread.tokens)!r}")
print(f"{stats.tokens} tokens in {stats.steps} steps, {stats.tokens_per_step:.2f} a step")
