"""From the plan of a step to logits: layout, masks, cache, attention."""
