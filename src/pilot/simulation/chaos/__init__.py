"""Real processes under injected faults, and the proof that nothing was lost."""
