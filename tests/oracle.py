"""Tiny random models, on which [Fork] and EOS are made likely, and the oracle: the model itself on each path alone."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_chat_model import make_likely

VOCABULARY, EOS, FORK, CHILD = 48, 0, 46, 47


def make_forks_likely(model, eos_scale=1.5):
    """Make [Fork] and EOS likely, and settle them as the control tokens of a checkpoint are."""
    model.generation_config.apar_config = {"fork_token_id": FORK, "child_token_id": CHILD}
    model.generation_config.suppress_tokens = [FORK, CHILD]
    return make_likely(model, FORK, EOS, eos_scale)


def tiny_llama(**changes):
    """A Llama of two layers with sharp random logits, that forks and ends often."""
    torch.manual_seed(changes.pop("seed", 0))
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
        "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": None,
    }  # fmt: skip
    return make_forks_likely(LlamaForCausalLM(LlamaConfig(**settings | changes)))


def left_padded(prompts, pad=EOS):
    """Return ``input_ids`` and ``attention_mask`` of prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def random_prompts(count, seed=0, shortest=3, longest=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, FORK, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def next_token(model, path, depth, config, eos):
    """The greedy choice after ``path`` by a plain, uncached forward pass, under the protocol's bans."""
    logits = model(input_ids=torch.tensor([path]), use_cache=False).logits[0, -1].float()
    logits[CHILD] = -torch.inf
    logits[FORK] += config.fork_bias
    if path[-1] in (FORK, CHILD) or depth >= config.max_depth:
        logits[FORK] = -torch.inf
    return int(logits.argmax())


def walk(model, prompt, config, limit, depth=1):
    """The answer as nested lists, by a sequential walk: tokens, and a list for each fork; None beyond ``limit`` tokens."""
    path, answer, pending, used = list(prompt), [], [], 0
    while (token := next_token(model, path, depth, config, EOS)) != EOS:
        path.append(token)
        used += 1
        if used > limit:
            return None
        if token == FORK:
            pending.append((len(answer), list(path)))
            answer.append(None)
        else:
            answer.append(token)
    for place, prefix in pending:
        answer[place] = walk(model, [*prefix, CHILD], config, limit, depth + 1)
        if answer[place] is None:
            return None
    return answer


def flat(answer):
    return [token for part in answer for token in (flat(part) if isinstance(part, list) else [part])]


def nested(tree):
    """The same nested lists from a :class:`ParagraphTree`."""

    def own(thread):
        children = {}
        for child in tree.children(thread):
            children.setdefault(child.fork_position, []).append(own(child))
        parts = []
        for position in range(len(thread.tokens) + 1):
            parts += children.get(position, [])
            parts += thread.tokens[position : position + 1]
        return parts

    return own(tree.threads[0])
