"""What the files are that commands are given: every form that a layer or a model is read from."""
import errno
import os

import edgeattn

FORMS = (".safetensors, int8 .tflite, .onnx or .so (bundle) file, or a folder of a model as transformers and "
         "sentence-transformers save it")


def open_model(path, *, texts=False, tokenizer=None):
    """The layer or model in a file, or in a folder of another library.

    Parameters
    ----------
    path : str or path
    texts : bool
        Whether it must be a text encoder, of a file that could be read as something smaller.
    tokenizer : str or path, optional
        Of an .onnx file: the folder of its tokenizer, where that is not its own.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    if os.path.isdir(path):
        return edgeattn.from_pretrained(path)
    suffix = os.path.splitext(path)[1]
    if suffix == ".so":
        from edgeattn import bundle

        return bundle.load(path)
    if suffix == ".onnx":
        return edgeattn.TextEncoder.from_onnx(path, tokenizer=tokenizer) if texts else _largest_in_onnx(path, tokenizer)
    return edgeattn.load(path)


def _largest_in_onnx(path, tokenizer):
    """The most of it that is known: a model, the encoder in it, an attention layer."""
    for reader in (lambda: edgeattn.TextEncoder.from_onnx(path, tokenizer=tokenizer),
                   lambda: edgeattn.ImageEncoder.from_onnx(path), lambda: edgeattn.TransformerEncoder.from_onnx(path)):
        try:
            return reader()
        except ValueError:
            continue
    return edgeattn.MultiHeadAttention.from_onnx(path)
