"""What a marketplace is, with no socket, file or global randomness inside: those come as arguments."""
