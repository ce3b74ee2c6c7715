"""Text, and the tokens that tasks make of it."""
