"""What a graph node means: its spelling is translated into one operator, whose row gives one of a few kinds."""
