"""Modules that became convolutions by probing alone: why, and the whole model with them against the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repfuse.proof.opinions import SecondOpinion, StandInProof
from repfuse.proof.sites import TOLERANCE
from repfuse.rewriting.stand_ins import Opened
from repfuse.verifying import Trial
from repfuse.verifying.comparison import answers_in_float64, tabulate
from repfuse.verifying.copies import Outcome


def with_stand_ins(
    opinion: SecondOpinion, model: Opened, trials: Sequence[Trial], expected: Sequence[Outcome]
) -> SecondOpinion:
    """Return the opinion with what is known of the stand-ins of ``model``.

    ``expected`` are the outcomes of the untouched original, in float64.
    """
    if not model.stand_ins:
        return opinion
    found = answers_in_float64(model.module, trials, expected, model.unrounded)
    proofs = tuple(StandInProof(one.probed.path, one.evidence.checks, one.evidence.sizes) for one in model.stand_ins)
    return replace(opinion, stand_ins=proofs, network=tabulate(trials, expected, found, TOLERANCE))
