"""What a network does: it runs as it is, on plain tensors, and every function of torch that it calls is noted."""
