"""Networks and properties in the formats of other verifiers."""

from lirpa_fastwarmup.exchange.handover import export
from lirpa_fastwarmup.exchange.onnx_file import read_onnx, write_onnx
from lirpa_fastwarmup.exchange.vnnlib import robustness_property

__all__ = ["export", "read_onnx", "robustness_property", "write_onnx"]
