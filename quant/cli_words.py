"""What the functions of the workbench say in their errors, for those who type commands."""

from __future__ import annotations

import re

from edgeattn.cli_words import in_words_of_the_command as of_both

# What errors advise in terms of Python, and what does the same here.
ADVICE = {
    "read checkpoints of other libraries with MultiHeadAttention.from_torch or from_bert, an encoder with "
    "TransformerEncoder.from_torch, a whole model from its folder with edgeattn.from_pretrained":
        "read checkpoints of other libraries with --prefix or --torch-prefix, an encoder with --torch-encoder, and "
        "--num-heads; a whole model by its folder",
    "MultiHeadAttention.from_checkpoint knows those of many families, edgeattn.from_pretrained a model's folder":
        "--prefix knows those of many families, and a whole model is read by its folder",
    "those that from_torch reads": "those of --torch-prefix",
    "convert a torch checkpoint with safetensors.torch.save_file(state_dict, path)":
        "convert a torch checkpoint with safetensors.torch.save_file(state_dict, path) in Python",
    "give quant.calibrate calls with attn_mask, key_padding_mask or is_causal, or pass the mask to each call of this "
    "layer": "run `quant calibrate` on DATA in .npz files that hold attn_mask, key_padding_mask or is_causal, too",
    "mask must be 'causal' or a bool array": "--mask must be \"causal\" or a .npy file with a bool array",
    "mask='causal' needs sequence_length, and as many keys as queries": "--mask causal needs --sequence-length, and no "
                                                                        "other --key-length",
    "(run quant.calibrate first)": "(run `quant calibrate` first)",
    "export layer.with_arithmetic('tflm'), or quantize with arithmetic='tflm'":
        "make it with `quant quantize --arithmetic tflm`",
    "quantize it first, quant.quantize(layer, calibration, arithmetic='tflm')":
        "quantize it first, with `quant calibrate` and `quant quantize --arithmetic tflm`",
    "quantize the float encoder with quant.quantize(encoder, quant.calibrate(encoder, batches), arithmetic='tflm')":
        "make it of the float encoder with `quant calibrate` and `quant quantize --arithmetic tflm`",
    "overrides=report.overrides() makes what costs most dynamic": "`quant quantize --override NAME=dynamic` makes what "
                                                                  "costs most dynamic",
    "batches must hold": "DATA must hold",
    "quantize with room_for_masks=True": "quantize with --room-for-masks",
    "any length up to sequence_length": "any length up to --sequence-length",
    "or equal sequence_length": "or equal --sequence-length",
    ", as model is": ", as LAYER is",
    "overrides of ranges need a quant.ModelCalibration": "--override of ranges needs CALIBRATION",
    "('percentile', share) with a share from 0 to below 0.5 or (low, high) with low below high":
        "percentile:SHARE with a share from 0 to below 0.5 or LOW:HIGH with low below high",
    "overrides of ": "--override of ",
    "overrides must ": "--override must ",
    "quant.quantize makes one": "`quant quantize --scheme static` makes one",
    "quantize with scheme=": "quantize with --scheme ",
    "a layer of scheme=": "a layer of --scheme ",
    "; scheme=": "; --scheme ",
    "pass numpy.asarray(": "store numpy.asarray(",
    "attention='float32' leaves": "--attention float32 leaves",
    "which edgeattn.save writes to a .safetensors file and edgeattn.load reads":
        "which a .safetensors file holds whole",
}

# Arguments that are options here.
OPTIONS = ("num_heads", "opset", "target", "test_vectors", "sequence_length", "key_length", "batch", "mask",
           "arithmetic", "scheme", "observer", "room_for_masks", "padding", "activation", "node")


def in_words_of_the_command(message: str) -> str:
    """What a Python function says, for those who type commands."""
    for python, option in ADVICE.items():
        message = message.replace(python, option)
    # the file stands before it where there is one
    message = re.sub(rf"(^|: )({'|'.join(OPTIONS)})(?= must | is | needs )",
                     lambda found: f"{found[1]}--{found[2].replace('_', '-')}", message)
    message = re.sub(r"(^|: )layer(?= must )", r"\1LAYER", message)
    message = re.sub(r"(^|: )quantized(?= must )", r"\1QUANTIZED", message)
    message = re.sub(r"(^|: )path(?= must end in one of )", r"\1OUT", message)
    message = re.sub(r"\boverrides=\{'([^']*)': '(\w+)'\}", r"--override \1=\2", message)
    if message.startswith("--override of "):
        message = re.sub(r"; got \('?([^',]+)'?, ([^,]+)\)$", r"; got \1:\2", message)
    return of_both(re.sub(r"(--scheme )'(static|dynamic)'", r"\1\2", message))
