"""Inject faults into a marketplace of real processes, and check that nothing is lost."""
