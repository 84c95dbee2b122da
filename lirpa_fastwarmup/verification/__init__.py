"""What a trained network can be trusted with: errors, attacks."""

from lirpa_fastwarmup.verification.attacks import pgd
from lirpa_fastwarmup.verification.errors import Errors, evaluate, pgd_error, standard_error, verified_error

__all__ = ["Errors", "evaluate", "pgd", "pgd_error", "standard_error", "verified_error"]
