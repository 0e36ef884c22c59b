"""From logits to tokens: processors, sampling, and when a thread must stop."""
