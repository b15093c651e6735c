"""Programs of torch.export (.pt2): reading them without running anything that they hold, and writing them."""
