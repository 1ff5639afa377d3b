"""Train the digits Transformer and write its weights: the only file here that needs PyTorch.

    python examples/digits/train.py

The results are committed (digits.safetensors, and digits_one_head.safetensors for self_vs_multihead.py),
so PyTorch is a development-only need. Seeds and split are fixed; it takes a few minutes.
The encoder is a torch.nn.TransformerEncoder and keeps its names in the file: `edgeattn.TransformerEncoder.from_torch`
reads it whole, and `edgeattn.MultiHeadAttention.from_torch(path, num_heads=4, prefix="encoder.layers.0.self_attn.")`
the attention of one layer.
"""

import numpy as np
import torch
from data import load_digits_split
from model import NUM_LAYERS, NUM_PATCHES, ONE_HEAD_WEIGHTS, PATCH, WEIGHTS, patches
from safetensors.numpy import save_file
from torch import nn

WIDTH = 32
HIDDEN = 64
EPOCHS = 200
BATCH = 64
LEARNING_RATE = 2e-3
SEED = 1


class Model(nn.Module):
    """What model.py computes, as a trainable module with the same names."""

    def __init__(self, num_heads):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(NUM_PATCHES, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, num_heads, HIDDEN, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, NUM_LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        """Patches (B, 16, 4) to scores (B, 10)."""
        return self.head(self.encoder(self.embed(x) + self.position).mean(dim=1))


def shifted(images, generator):
    """Move every image by -1, 0 or 1 pixel down and right: few digits, many places."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    down, right = generator.integers(0, 3, size=(2, len(images)))
    return np.stack([image[d : d + 8, r : r + 8] for image, d, r in zip(padded, down, right, strict=True)])


def train(num_heads, path):
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums in the same order on every machine of a kind
    generator = np.random.default_rng(SEED)
    digits = load_digits_split()
    model = Model(num_heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * -(-len(digits.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    for epoch in range(1, EPOCHS + 1):
        model.train()
        images = patches(shifted(digits.train_images, generator))
        order = generator.permutation(len(images))
        total = 0.0
        for chosen in np.array_split(order, -(-len(images) // BATCH)):
            scores = model(torch.from_numpy(images[chosen]))
            labels = torch.from_numpy(digits.train_labels[chosen])
            loss = nn.functional.cross_entropy(scores, labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if epoch % 20 == 0:
            mean_loss = total / len(images)
            print(f"{num_heads} head(s), epoch {epoch:3d} of {EPOCHS}: loss {mean_loss:.4f}", flush=True)

    # The test images are looked at once, after the last step: no choice was made by them.
    model.eval()
    with torch.no_grad():
        predicted = model(torch.from_numpy(patches(digits.test_images))).argmax(dim=-1).numpy()
    correct = int((predicted == digits.test_labels).sum())
    metadata = {
        "num_heads": str(num_heads),
        "test_correct": str(correct),
        "test_total": str(len(predicted)),
        "trained_with": "torch",
    }
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, path, metadata=metadata)
    print(
        f"{num_heads} head(s): {correct} of {len(predicted)} test images right "
        f"({correct / len(predicted):.2%}); wrote {path.name}, {path.stat().st_size} bytes",
        flush=True,
    )


if __name__ == "__main__":
    train(4, WEIGHTS)
    train(1, ONE_HEAD_WEIGHTS)
