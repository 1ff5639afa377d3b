"""What functions say in their errors, for those who type commands."""
import re

# Files and folders of other libraries are given to a command as they are.
_ADVICE = (
    (r"path must end in \.safetensors or \.tflite, got '([^']*)', of which there is none", r"there is no \1"),
    (r"path must end in \.safetensors or \.tflite, got '([^']*)'",
     r"\1 is no .safetensors, .tflite, .onnx or .so file, and no folder"),
    (r"choose one by block=, its number or name", "`quant inspect` shows each, edgeattn.load with block= reads one"),
    (r"Read the model that it was made of \([^)]*\) and quantize that with quant\.quantize\(layer, "
     r"scheme='dynamic'\)", "Quantize the model that it was made of with `quant quantize --scheme dynamic`"),
    (r"read checkpoints of other libraries with MultiHeadAttention\.from_torch or from_bert, an encoder with "
     r"TransformerEncoder\.from_torch, a whole model from its folder with edgeattn\.from_pretrained",
     "`quant export` with --prefix or --torch-prefix makes a layer of a checkpoint, with --torch-encoder an encoder; a "
     "whole model is read by its folder"),
    (r"; edgeattn\.from_pretrained reads a model's folder|; edgeattn\.bundle\.load runs a bundle", ""),
    (r"cut the text, or give the TextEncoder a max_length", "shorter ones fit"),
    (r"as quant\.calibrate gives and \w+\.save writes it", "as `quant calibrate` writes it"),
    (r"must be a layer from quant\.quantize", "must be an int8 layer, as `quant quantize` writes it"),
    (r"must be (an array|what \w+ is called with,) or a mapping with", "must hold"),
    (r"it has dtype object; only plain numbers are read, never objects",
     "it holds objects; only plain numbers are read"),
    (r"\bgot dtype ", "got "),
    (r"; got sequence_length=[^;]*$", ""),
    (r", encoder\.layers\[i\]\.attention, one by one", " one by one, from Python"),
    (r"export its encoder, model\.encoder, whose inputs are what the embedding gives",
     "export its encoder, whose inputs are what the embedding gives: of a folder with --part encoder, of a saved file "
     "from Python"),
    (r"`?\bquant\.(calibrate|compare|export|quantize)\b`?", r"`quant \1`"),
    (r"^arithmetic must", "--arithmetic must"),
    # an argument and its value
    (r"(^|: )part(?= must )", r"\1--part"),
    (r"\bfrom_pretrained\(folder, (part='[^']*')\)", r"\1"),
    (r"\b(arithmetic|attention|mask|observer|part|scheme|target)='([^']*)'", r"--\1 \2"),
)


def in_words_of_the_command(message):
    """The message of an error, in words of files and options."""
    for said, instead in _ADVICE:
        message = re.sub(said, instead, message)
    return message
