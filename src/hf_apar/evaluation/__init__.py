"""What a tuned model is measured on, and how."""
