"""What a tuned model's answers are worth: prompts, ways to answer them, figures with intervals, and a judge."""
