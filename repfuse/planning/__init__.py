"""graph -> plan: which nodes become one convolution each, which do not, and why."""
