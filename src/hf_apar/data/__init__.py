"""From Markdown answers to packed rows: extraction, features, the collator, self-distillation."""
