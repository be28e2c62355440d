"""A CLIP text encoder with random weights and a small vocabulary, in the folders that transformers writes."""

from pathlib import Path

import torch
from torch import nn

MERGES = [
    ("r", "e"),
    ("re", "d</w>"),
    ("b", "a"),
    ("l", "l</w>"),
    ("ba", "ll</w>"),
    ("c", "u"),
    ("b", "e</w>"),
    ("cu", "be</w>"),
]


def small_clip(folder: Path, apart: bool = True, seed: int = 0) -> nn.Module:
    """Saved to `tokenizer` and `text_encoder` of a folder, as a pipeline has them, or both in the folder itself."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(i) for i in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters), *map("".join, MERGES)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=MERGES)
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = CLIPTextModel(config).eval()
    for p in model.parameters():  # norms and biases too
        nn.init.normal_(p, std=0.2)
    tokenizer.save_pretrained(folder / "tokenizer" if apart else folder)
    model.save_pretrained(folder / "text_encoder" if apart else folder)
    return model
