"""An independent second opinion: what a block computes, read off its answers to impulses in float64.

**The identity.** A map f is affine and shift-equivariant if and only if f(x) = W * x + b, with x continued by zeros.
Then f(0) = b, and f(impulse at p) - f(0) holds the taps of W around p: with a stride s the places p of each residue
modulo s show the taps of theirs. At the border the response is cut off; any other padding shows as a further response.

The block is a black box here. Nothing in this package knows the algebra, the planner or the rewriting, and nothing in
it calls an operator that convolves: what is expected of a kernel is index arithmetic.
"""

from repfuse.probing.box import Box, Refused
from repfuse.probing.kernel import Kernel
from repfuse.probing.reading import kernel_of
from repfuse.probing.recovering import Recovered, recover

__all__ = ["Box", "Kernel", "Recovered", "Refused", "kernel_of", "recover"]
