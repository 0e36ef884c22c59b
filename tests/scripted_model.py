"""A model that is a script: what follows a path is a function of the path, which the model reads off mask and cache.

It keeps token and position of every slot as "key", so it goes wrong if a slot is lost or used twice, if the mask shows a
token of another thread, or if a position is off.
"""

import random

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

EOS, FORK, CHILD, LETTERS = 0, 11, 12, range(1, 11)


class ScriptConfig(PretrainedConfig):
    model_type = "script"

    def __init__(self, seed=0, **kwargs):
        self.seed, self.vocab_size, self.num_hidden_layers, self.hidden_size = seed, 13, 1, 2
        super().__init__(eos_token_id=EOS, pad_token_id=EOS, **kwargs)


def follow(seed, path):
    """The logits after ``path``: always the same ones for the same path."""
    draw = random.Random(f"{seed} {path}")
    logits = [draw.random() for _ in range(13)]
    logits[FORK] *= 1.9  # so that trees are neither too large nor too small
    logits[EOS] *= 1.2 + 0.03 * len(path)
    return logits


class ScriptedModel(PreTrainedModel, GenerationMixin):
    config_class = ScriptConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, 2)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True, **kwargs):
        batch, width = input_ids.shape
        position_ids = position_ids.expand(batch, width)
        states = torch.stack([input_ids, position_ids], dim=-1)[:, None].float()  # (batch, 1, width, 2)
        keys, _ = past_key_values.update(states, states, 0)
        logits = torch.full((batch, width, self.config.vocab_size), float("nan"))
        for row in range(batch):
            for query in range(width):
                visible = self.visible(attention_mask, row, query, width, keys.shape[2])
                seen = sorted((int(position), int(token)) for token, position in keys[row, 0, visible].tolist())
                if len(visible) > 1 or int(position_ids[row, query]) == 0:
                    places = [position for position, _ in seen]
                    if places == list(range(len(seen))):  # else a padding token, whose logits nobody may use
                        logits[row, query] = torch.tensor(follow(self.config.seed, [token for _, token in seen]))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def visible(self, mask, row, query, width, length):
        if mask is not None and mask.dim() == 4:
            return [slot for slot in range(length) if mask[row, 0, query, slot] == 0]
        last = length - width + query
        return [slot for slot in range(last + 1) if mask is None or mask[row, slot]]
