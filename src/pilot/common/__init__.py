"""Concepts that every package uses, each defined once."""
