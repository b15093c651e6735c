"""repfuse: rewrites the parallel linear branches of a trained network into single convolutions, and proves it."""
