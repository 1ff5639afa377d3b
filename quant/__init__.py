"""The workbench: calibrate a float attention layer, quantize it to int8, say what that cost, export it."""

from quant.calibrate import Calibration, calibrate
from quant.compare import compare
from quant.export import export
from quant.quantize import quantize
from quant.report import Report

__all__ = ["Calibration", "Report", "calibrate", "compare", "export", "quantize"]
