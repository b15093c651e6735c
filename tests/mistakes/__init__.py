"""Mistakes in a fused network, made on purpose: what the checks of repfuse must catch.

``damage`` changes one thing of one fused convolution; ``making`` makes one mistake in the original's parameters and
fuses that, as a tool would that reads them wrongly. ``kernels`` decides, from the numbers, which were mistakes at all.
"""
