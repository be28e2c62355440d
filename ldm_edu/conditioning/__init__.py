"""What a model is conditioned on: conditions, text, classifier-free guidance (§ 3.3, 4.3)."""

from ldm_edu.conditioning.condition import Condition
from ldm_edu.conditioning.guidance import Guidance, drop
from ldm_edu.conditioning.text import TextConditioner, TextTransformer, WordTokenizer

__all__ = ["Condition", "Guidance", "TextConditioner", "TextTransformer", "WordTokenizer", "drop"]
