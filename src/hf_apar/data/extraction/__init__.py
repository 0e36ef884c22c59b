"""From the Markdown of an answer to its parts, and the rules that leave an answer whole."""
