"""A paragraph tree as a row of a batch: features, collator, masks."""
