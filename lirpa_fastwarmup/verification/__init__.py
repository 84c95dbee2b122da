"""Errors, certificates, certified radii and attacks; files for other verifiers."""

from lirpa_fastwarmup.attacks import Attack, attack, pgd
from lirpa_fastwarmup.engine.bounds import METHODS
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError
from lirpa_fastwarmup.memory import OutOfMemoryError
from lirpa_fastwarmup.verification.complete import ABCrown, WorkerError
from lirpa_fastwarmup.verification.evaluate import certified_radii, evaluate, verify
from lirpa_fastwarmup.verification.folder import Journal
from lirpa_fastwarmup.verification.handover import export, robustness_property
from lirpa_fastwarmup.verification.onnx import read_onnx, write_onnx
from lirpa_fastwarmup.verification.result import Certificate, ErrorRate, Radius, Stage, Verification

__all__ = ["METHODS", "ABCrown", "Attack", "Certificate", "ErrorRate", "Journal", "OutOfMemoryError", "Radius", "Stage"]
__all__ += ["UnsoundBoundError", "Verification", "WorkerError", "attack", "certified_radii", "evaluate", "export"]
__all__ += ["pgd", "read_onnx", "robustness_property", "verify", "write_onnx"]
