"""What the files are that commands are given: every form that a layer or a model is read from."""
import contextlib
import errno
import mmap
import os

import edgeattn
from edgeattn.files.checkpoints import kernel_set_of

_QUANTIZER = b'"\x0eQuantizeLinear'  # the op_type of a node, field 4, as protobuf has it
FORMS = ("A .safetensors, .tflite, .onnx or .so (bundle) file, or a folder of a model as transformers and "
         "sentence-transformers save it")


def open_model(path, *, texts=False, tokenizer=None, scheme=None, arithmetic=None, part=None):
    """The layer or model in a file, or in a folder of another library.

    Parameters
    ----------
    path : str or path
    texts : bool
        Whether it must be a text encoder, of a file that could be read as something smaller.
    tokenizer : str or path, optional
        Of an .onnx file: the folder of its tokenizer, where that is not its own.
    scheme, arithmetic : str, optional
        Of an .onnx file, as `edgeattn.TransformerEncoder.from_onnx` takes them.
    part : str, optional
        Of a folder, as `edgeattn.from_pretrained` takes it.
    """
    folder, suffix = os.path.isdir(path), os.path.splitext(path)[1]
    if arithmetic is not None and (folder or suffix == ".so"):
        what = "folder, which is float32" if folder else "bundle, which has its own"
        raise ValueError(f"--arithmetic must be left out for a {what}; got {path}")
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    if scheme is not None and (folder or suffix != ".onnx"):
        raise ValueError(f"--scheme must be left out but for an .onnx file, got {path}: any other says what it holds")
    if part is not None and not folder:
        raise ValueError(f"--part must be left out but for a model's folder, got {path}")
    if folder:
        return edgeattn.from_pretrained(path, part=part)
    if suffix == ".so":
        from edgeattn import bundle

        return bundle.load(path)
    return _in_onnx(path, texts, tokenizer, scheme or "float32", arithmetic) if suffix == ".onnx" else edgeattn.load(
        path, arithmetic=arithmetic)


def hints_of(path, model, scheme):
    """(what, text) rows of a file that could be read otherwise than as `model`."""
    if os.path.splitext(path)[1] == ".onnx" and scheme is None and not isinstance(model, edgeattn.MultiHeadAttention):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_QUANTIZER) >= 0:
                yield "quantizers", ("the file has some; float32 is what its weights stand for, --scheme static reads "
                                     "its int8 layers")


def _in_onnx(path, texts, tokenizer, scheme, arithmetic):
    """The most of it that is known: a model, the encoder in it, an attention layer."""
    kernel_set_of(scheme, arithmetic)
    given = {"scheme": scheme, "arithmetic": arithmetic}
    if texts:
        return edgeattn.TextEncoder.from_onnx(path, tokenizer=tokenizer, **given)
    for reader in (lambda: edgeattn.TextEncoder.from_onnx(path, tokenizer=tokenizer, **given),
                   lambda: edgeattn.ImageEncoder.from_onnx(path, **given)):
        with contextlib.suppress(ValueError):
            return reader()
    try:
        return edgeattn.TransformerEncoder.from_onnx(path, **given)
    except ValueError as error:
        if scheme == "static":
            raise
        try:
            return edgeattn.MultiHeadAttention.from_onnx(path)
        except ValueError as alone:
            raise ValueError(f"{error}; and as one attention layer: {alone}") from None
