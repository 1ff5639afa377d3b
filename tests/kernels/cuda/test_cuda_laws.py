"""The laws of laws.py for the CUDA target, in the emulator."""
import functools

import executors
import laws
import numpy as np
import pytest
from cuda_emulated import long_form

import edgeattn
from edgeattn.kernels.cuda import driver as driver_module

pytestmark = pytest.mark.usefixtures("device")
LAWS = [law for law in laws.LAWS if law is not laws.threads_change_no_bit]
# an emulated block takes a tenth of a second
FEW = {"tokens": 9, "bad": (np.nan,), "bad_for_others": (np.nan,)}
OF_BYTES = {**executors.SHARED, **FEW, "bad": (np.nan, 1e38)}
ON_DEVICE = {"put": lambda array: driver_module.driver().array(array),
             "get": lambda array: array.numpy(), "takes": ("float mask", "lengths"), **FEW}


def function(precision, **changes):
    attend = functools.partial(edgeattn.scaled_dot_product_attention, precision=precision)
    return executors.Function(f"{precision} function", attend=attend, **{**ON_DEVICE, **changes})


EXECUTORS = (
    function("float32"), function("int8", **OF_BYTES),
    function("float16", sliced=2e-3), function("tf32", sliced=2e-3),
    executors.Layer("float32 layer", layer=lambda: executors.float_layer().to("cuda"), **FEW),
    executors.Layer("dynamic layer", layer=lambda: executors.dynamic_layer().to("cuda"), **OF_BYTES),
    executors.StaticLayer("static layer", layer=lambda: executors.static_layer().to("cuda"), **FEW),
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("executor", [
    pytest.param(executor, id=executor.name, marks=[] if executor is EXECUTORS[0] else [long_form]) for executor in EXECUTORS])
def test_law(executor, law):
    vars(executor).pop("made", None)  # its weights lie on the device of another test
    law(executor)
