"""All methods with one error each; see `mutant_register`."""

from methods import objective_mutants, teacher_mutants
from methods.mutant_register import MUTANTS, names_of

__all__ = ["MUTANTS", "names_of", "objective_mutants", "teacher_mutants"]
