"""Data sets that are drawn: small scenes with captions, and faces.

The function `captions` is imported from `ldm_edu.data.toy.captions`: here the name belongs to the module.
"""

from ldm_edu.data.toy.captions import VOCABULARY, Description, caption, read_caption, relation
from ldm_edu.data.toy.datasets import ToyCelebA, ToyCOCO
from ldm_edu.data.toy.faces import FACE_ATTRIBUTES, FACE_SEGMENTS, Face, draw_face, face_truth, render_faces
from ldm_edu.data.toy.scenes import SEGMENTS, UNSEEN, Scene, Thing, draw_scene, render, truth

__all__ = [
    "FACE_ATTRIBUTES",
    "FACE_SEGMENTS",
    "SEGMENTS",
    "UNSEEN",
    "VOCABULARY",
    "Description",
    "Face",
    "Scene",
    "Thing",
    "ToyCOCO",
    "ToyCelebA",
    "caption",
    "draw_face",
    "draw_scene",
    "face_truth",
    "read_caption",
    "relation",
    "render",
    "render_faces",
    "truth",
]
