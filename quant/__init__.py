"""The workbench: calibrate a float layer or model, quantize it to int8, say what that cost, export it."""

try:
    from quant.calibrate import calibrate
    from quant.calibration import Calibration
    from quant.compare import compare
    from quant.export import export
    from quant.model_calibration import ModelCalibration
    from quant.page import write_report
    from quant.quantize import quantize
    from quant.report import ModelReport, Report
except ModuleNotFoundError as error:
    lacking = (error.name or "quant").partition(".")[0]
    if lacking in ("quant", "edgeattn"):
        raise
    # beside NumPy alone, as on a board with a wheel that brings its kernels
    raise ImportError(f"the workbench needs the package {lacking}: pip install '.[quant]' in edgeattn's folder",
                      name=lacking) from error

__all__ = ["Calibration", "ModelCalibration", "ModelReport", "Report", "calibrate", "compare", "export", "quantize",
           "write_report"]


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
