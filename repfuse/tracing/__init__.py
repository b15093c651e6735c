"""model -> graph: symbolic tracing, the shapes and constants of a graph, and who writes into which memory."""
