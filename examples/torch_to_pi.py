"""A torch encoder, trained here, in int8 on a Raspberry Pi: python examples/torch_to_pi.py    (or: make example-torch)

An image of scikit-learn's digits is 8 tokens, its rows. torch trains a Linear, a torch.nn.TransformerEncoder and a
Linear for some seconds; `to_board` is all that it takes from there: the state dict becomes an edgeattn encoder, images
say what int8 costs, and out/torch-to-pi/pi.safetensors is what the board needs, besides edgeattn. With `--target pi4`
(or another board of `quant export --help`) also a bundle, for a board with NumPy alone; that compiles for a while.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import edgeattn
import quant
from edgeattn import messages

OUT = Path(__file__).resolve().parents[1] / "out" / "torch-to-pi"
WIDTH, HEADS, HIDDEN, LAYERS, TRAINED_ON = 32, 4, 64, 2, 1200
MADE_WITH = {"activation": "gelu", "norm_first": True}  # which no state dict says


class Classifier:
    """What runs on the board: two Linears around an encoder, float32 or int8."""

    def __init__(self, embed, encoder, head, places):
        self.embed, self.encoder, self.head, self.places = embed, encoder, head, places

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images (N, 8, 8) -> digits (N,)."""
        return self.head(self.encoder(self.embed(images) + self.places).mean(axis=1)).argmax(-1)


def to_board(state: dict, images: np.ndarray, out: Path, target: str | None = None) -> tuple[Classifier, Classifier]:
    """From a torch state dict to files for a board: (float32, int8, read from the file)."""
    def linear(name):
        return edgeattn.Linear(state[f"{name}.weight"], state[f"{name}.bias"])

    encoder = edgeattn.TransformerEncoder.from_torch(state, HEADS, prefix="encoder.", **MADE_WITH)
    model = Classifier(linear("embed"), encoder, linear("head"), np.asarray(state["places"]))
    tokens = model.embed(images) + model.places
    int8 = quant.quantize(encoder, quant.calibrate(encoder, [tokens]))
    print(quant.compare(encoder, int8, [tokens]).verdict())
    edgeattn.save(int8, out / "pi.safetensors")
    if target is not None:
        print(f"wrote {quant.export(int8, out / 'encoder.so', target=target).name}, for {target}")
    return model, Classifier(model.embed, edgeattn.load(out / "pi.safetensors"), model.head, model.places)


def trained(images: np.ndarray, labels: np.ndarray, epochs: int = 30) -> dict:
    """The state dict of a torch model, after some seconds of training."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True, **MADE_WITH)
            self.embed, self.head = torch.nn.Linear(8, WIDTH), torch.nn.Linear(WIDTH, 10)
            self.encoder = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
            self.places = torch.nn.Parameter(0.1 * torch.randn(8, WIDTH))

        def forward(self, x):
            return self.head(self.encoder(self.embed(x) + self.places).mean(1))

    model, x, y = Model(), torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="A torch encoder, trained here, to int8 for a Raspberry Pi.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the files (default: out/torch-to-pi)")
    parser.add_argument("--target", help="also a bundle for this board: pi3, zero2w, pi4, pi5, ...")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    messages.show()
    began = time.perf_counter()
    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target
    try:
        state = trained(images[:TRAINED_ON], labels[:TRAINED_ON])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print("Cannot run: torch is not installed here; make example-torch installs it")
        return 1
    print(f"torch trained {sum(array.size for array in state.values()):,} parameters in "
          f"{time.perf_counter() - began:.1f} s")
    model, int8 = to_board(state, images[:TRAINED_ON][:256], chosen.out, chosen.target)
    right = {name: int((form(images[TRAINED_ON:]) == labels[TRAINED_ON:]).sum())
             for name, form in (("float32", model), ("int8", int8))}
    for name, count in right.items():
        print(f"{name:8s} {count} of {len(labels) - TRAINED_ON} test images right")
    print(f"wrote pi.safetensors: {(chosen.out / 'pi.safetensors').stat().st_size:,} bytes, of int8 weights")
    print(f"Done in {time.perf_counter() - began:.1f} s.")
    return 0 if min(right.values()) > 0.9 * (len(labels) - TRAINED_ON) else 1


if __name__ == "__main__":
    sys.exit(main())
