"""The proof of a rewrite: in float64 site by site, then the whole network, then of the weights to be written.

A site alone is small enough for inputs of one pixel, where every output lies at a border; a whole network is not,
after its strides. And a site is where wrong algebra would be, so that is where it is named.
"""

from repfuse.proof.network import prove
from repfuse.proof.results import Proof, SiteProof
from repfuse.proof.sites import prove_sites

__all__ = ["Proof", "SiteProof", "prove", "prove_sites"]
