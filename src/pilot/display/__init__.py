"""The terminal, metrics and plots."""
