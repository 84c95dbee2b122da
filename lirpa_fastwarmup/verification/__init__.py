"""What a network can be trusted with: errors, certificates, attacks."""

from lirpa_fastwarmup.engine.methods import METHODS
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError
from lirpa_fastwarmup.memory import OutOfMemoryError
from lirpa_fastwarmup.verification.attacks import Attack, attack, pgd
from lirpa_fastwarmup.verification.errors import Errors, check_ibp, evaluate, pgd_error, standard_error, verified_error
from lirpa_fastwarmup.verification.journal import Journal
from lirpa_fastwarmup.verification.radius import Radius, certified_radii
from lirpa_fastwarmup.verification.result import Certificate, Share, Stage, Verification
from lirpa_fastwarmup.verification.verifier import verify

__all__ = [
    "METHODS",
    "Attack",
    "Certificate",
    "Errors",
    "Journal",
    "OutOfMemoryError",
    "Radius",
    "Share",
    "Stage",
    "UnsoundBoundError",
    "Verification",
    "attack",
    "certified_radii",
    "check_ibp",
    "evaluate",
    "pgd",
    "pgd_error",
    "standard_error",
    "verified_error",
    "verify",
]
