"""Random affine networks: modules that run a random program, which symbolic tracing sees as an ordinary forward."""

from support.programs.program import Program, ProgramOfTwo, Step, program
from support.programs.strategies import EXAMPLES, STEPS

__all__ = ["EXAMPLES", "STEPS", "Program", "ProgramOfTwo", "Step", "program"]
