"""Write tests/models/golden: tiny random models as transformers and sentence-transformers save them, and their results.

    python -m venv build/models && build/models/bin/pip install torch transformers sentence-transformers
    build/models/bin/python tools/goldens/models.py

Needs nothing of this project, and no network. Weights and inputs are random and seeded. Made with torch 2.13,
transformers 5.24, sentence-transformers 6.2.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
import transformers as t
from sentence_transformers.sentence_transformer import modules as parts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "models" / "golden"
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TEXT = dict(**SIZES, vocab_size=40, max_position_embeddings=24)
IMAGE = dict(**SIZES, image_size=12, patch_size=4)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHORT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40, "max_position_embeddings": 24}
DINO = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=12, patch_size=4)
MODELS = {
    "bert": t.BertConfig(**TEXT),
    "roberta": t.RobertaConfig(**TEXT),
    "xlm-roberta": t.XLMRobertaConfig(**TEXT),
    "camembert": t.CamembertConfig(**TEXT),
    "data2vec-text": t.Data2VecTextConfig(**TEXT),
    "ernie": t.ErnieConfig(**TEXT),
    "electra": t.ElectraConfig(**TEXT, embedding_size=8),
    "distilbert": t.DistilBertConfig(**SHORT),
    "mpnet": t.MPNetConfig(**TEXT),
    "albert": t.AlbertConfig(**{**TEXT, "num_hidden_layers": 4}, embedding_size=8, num_hidden_groups=2),
    "modernbert": t.ModernBertConfig(**{**TEXT, "num_hidden_layers": 3}, **TOKENS, cls_token_id=1, sep_token_id=2,
                                     local_attention=8, global_attn_every_n_layers=2),
    "nomic_bert": t.NomicBertConfig(**TEXT),
    "gpt2": t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=24, **TOKENS),
    "vit": t.ViTConfig(**IMAGE),
    "deit": t.DeiTConfig(**IMAGE),
    "dinov2": t.Dinov2Config(**DINO),
    "dinov2-swiglu": t.Dinov2Config(**DINO, use_swiglu_ffn=True),
    "audio-spectrogram-transformer": t.ASTConfig(
        **SIZES, patch_size=4, frequency_stride=3, time_stride=3, max_length=20, num_mel_bins=12),
    "clip-text": t.CLIPTextConfig(**TEXT, **TOKENS),
    "clip-vision": t.CLIPVisionConfig(**IMAGE),
    "siglip-text": t.SiglipTextConfig(**TEXT, **TOKENS),
    "siglip-vision": t.SiglipVisionConfig(**IMAGE),
    "whisper": t.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=12, max_target_positions=6,
        vocab_size=40, decoder_start_token_id=1, **TOKENS),
}
WORDS = "[PAD] [UNK] [CLS] [SEP] a b c the cat sat on mat dog dogs ran runs fast slowly home and ##s ##ing".split()
SENTENCES = ["The cat sat on the mat", "a", "", "dogs run fast " * 9, "a dog ran home slowly and the cats sat"]


def randomize(model):
    """Weights of a size at which every part of a model has its say in the result."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(float(name.endswith("weight") or "lambda" in name), 0.2)
    return model.eval()


def of_text(model):
    """Ids, among which RoBERTa's number of padding, a mask, and the hidden states of real tokens."""
    random = np.random.default_rng(6)
    ids = random.integers(0, 40, (3, 20))
    lengths = np.array([20, 13, 1])
    mask = (np.arange(20) < lengths[:, None]).astype(np.int64)
    with torch.no_grad():
        hidden = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    return {"ids": ids, "attention_mask": mask, "hidden": hidden * mask[..., None].astype(np.float32)}


def of_images(model):
    """Pixels, and hidden states; for DINOv2 of another size too, for which it interpolates."""
    random, made = np.random.default_rng(7), {}
    shapes = {"": (2, 20, 12) if model.config.model_type.startswith("audio") else (2, 3, 12, 12)}
    if model.config.model_type == "dinov2":
        shapes["_wide"] = (1, 3, 8, 20)
    for name, shape in shapes.items():
        pixels = random.normal(size=shape).astype(np.float32)
        with torch.no_grad():
            made |= {f"pixels{name}": pixels, f"hidden{name}": model(torch.tensor(pixels)).last_hidden_state.numpy()}
    return made


def of_sound(model):
    """What the layers of a speech model's encoder are given, and what it gives."""
    spectrum = torch.tensor(np.random.default_rng(8).normal(size=(2, 8, 24)).astype(np.float32))
    with torch.no_grad():
        states = model.encoder(spectrum, output_hidden_states=True)
    return {"rows": states.hidden_states[0].numpy(), "hidden": states.last_hidden_state.numpy()}


def sentence_transformer(folder, hidden):
    """A folder of sentence-transformers, and what it makes of SENTENCES."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=20).save_pretrained(hidden)
    randomize(t.BertModel(t.BertConfig(**TEXT))).save_pretrained(hidden)
    model = sentence_transformers.SentenceTransformer(modules=[
        parts.Transformer(str(hidden), max_seq_length=12), parts.Pooling(16, "mean"), parts.Normalize()])
    model.save(str(folder), create_model_card=False)
    return {"sentences": np.array(SENTENCES), "embeddings": model.encode(SENTENCES)}


def main():
    """Write all of it."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, config in MODELS.items():
        config._attn_implementation = "eager"
        model = randomize(t.SiglipTextModel(config) if name == "siglip-text" else t.AutoModel.from_config(config))
        model.save_pretrained(FOLDER / name)
        made = (of_sound if name == "whisper" else of_text if hasattr(config, "vocab_size") else of_images)(model)
        np.savez(FOLDER / name / "expected.npz", **made)
    made = sentence_transformer(FOLDER / "sentence-transformer", FOLDER / "temporary")
    shutil.rmtree(FOLDER / "temporary")
    np.savez(FOLDER / "sentence-transformer" / "expected.npz", **made)
    for path in sorted(FOLDER.rglob("*")):
        if path.name in ("README.md", ".gitattributes"):
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
