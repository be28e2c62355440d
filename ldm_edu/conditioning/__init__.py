"""What a model is conditioned on: conditions, text, classifier-free guidance (§ 3.3, 4.3)."""

from ldm_edu.conditioning.condition import Condition, Conditioner, MergedConditioner
from ldm_edu.conditioning.guidance import Guidance, drop
from ldm_edu.conditioning.image_guiding import ImageGuiding
from ldm_edu.conditioning.spatial import InpaintingConditioner, MapConditioner
from ldm_edu.conditioning.text import TextConditioner, TextTransformer, WordTokenizer, frequent_words
from ldm_edu.conditioning.tokens import AttributesConditioner, ClassConditioner, CLIPConditioner, LayoutConditioner

__all__ = [
    "AttributesConditioner",
    "CLIPConditioner",
    "ClassConditioner",
    "Condition",
    "Conditioner",
    "Guidance",
    "ImageGuiding",
    "InpaintingConditioner",
    "LayoutConditioner",
    "MapConditioner",
    "MergedConditioner",
    "TextConditioner",
    "TextTransformer",
    "WordTokenizer",
    "drop",
    "frequent_words",
]
