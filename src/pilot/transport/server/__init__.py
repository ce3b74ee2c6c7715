"""HTTP servers that strangers may call."""
