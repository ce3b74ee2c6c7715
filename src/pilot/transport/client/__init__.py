"""Calls to miners and validators over HTTP."""
