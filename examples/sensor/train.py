"""Train the sensor encoder and write sensor.safetensors: the only file here that needs PyTorch; some minutes.

The encoder is a torch.nn.TransformerEncoder and keeps its names in the file, so that
`edgeattn.TransformerEncoder.from_torch(path, num_heads=4, prefix="encoder.", ...)` reads it. Weights are stored as
float16, which halves the file.
"""

from pathlib import Path

import numpy as np
import torch
from data import FAULTS, SAMPLES, TEST_RECORDINGS, TEST_SEED, TOKENS, TRAIN_SEED, recordings
from safetensors.numpy import save_file
from torch import nn

WEIGHTS = Path(__file__).with_name("sensor.safetensors")
LAYERS, WIDTH, HIDDEN, HEADS = 2, 64, 256, 4
RECORDINGS, EPOCHS, BATCH = 4800, 30, 64
LEARNING_RATE = 2e-3


class Model(nn.Module):
    """Tokens -> linear + position -> encoder -> mean of the real tokens -> linear."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2 * SAMPLES, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.1, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(FAULTS))

    def forward(self, x, lengths):
        """Recordings (B, 64, 16) and how many tokens are real to scores (B, 6)."""
        real = torch.arange(x.shape[1]) < lengths[:, None]
        y = self.encoder(self.embed(x) + self.position, src_key_padding_mask=~real)
        return self.head((y * real[..., None]).sum(1) / lengths[:, None])


def tensors(some):
    """The arrays of Recordings as tensors."""
    return [torch.from_numpy(np.asarray(array)) for array in some]


def main():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * (RECORDINGS // BATCH))
    x, lengths, labels = tensors(recordings(RECORDINGS, TRAIN_SEED))
    for epoch in range(1, EPOCHS + 1):
        model.train()
        total = 0.0
        for chosen in torch.randperm(RECORDINGS).split(BATCH):
            scores = model(x[chosen], lengths[chosen])
            loss = nn.functional.cross_entropy(scores, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if epoch % 5 == 0:
            print(f"epoch {epoch:3d} of {EPOCHS}: loss {total / RECORDINGS:.4f}", flush=True)

    # The test recordings are looked at once, after the last step, and with the weights as they are stored.
    model.half().float().eval()
    x, lengths, labels = tensors(recordings(TEST_RECORDINGS, TEST_SEED))
    with torch.no_grad():
        correct = int((model(x, lengths).argmax(-1) == labels).sum())
    metadata = {"num_heads": str(HEADS), "test_correct": str(correct), "test_total": str(TEST_RECORDINGS)}
    save_file({name: tensor.half().numpy() for name, tensor in model.state_dict().items()}, WEIGHTS, metadata=metadata)
    print(f"{correct} of {TEST_RECORDINGS} test recordings right ({correct / TEST_RECORDINGS:.2%}); "
          f"wrote {WEIGHTS.name}, {WEIGHTS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
