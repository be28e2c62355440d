"""Distances between images, the judge, and scores of whole models."""

from ldm_edu.evaluation.attention import attention_maps
from ldm_edu.evaluation.conditions import ConditionScores, score_condition
from ldm_edu.evaluation.copying import copied, thumbnails
from ldm_edu.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
)
from ldm_edu.evaluation.report import Drawing, Evaluation, evaluate, last_evaluation
from ldm_edu.evaluation.extractors import Extractor, clip_score, extract, find_extractor
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.judge import PromptAccuracy, SceneReader, Share, prompt_accuracy, what
from ldm_edu.evaluation.metrics import LPIPS, psnr, ssim
from ldm_edu.evaluation.prompts import (
    captions_of,
    choose_scale,
    diversity,
    draw_captions,
    score_prompts,
    score_reconstructions,
)
from ldm_edu.evaluation.reconstruction import score_first_stage

__all__ = [
    "LPIPS",
    "ConditionScores",
    "Drawing",
    "Evaluation",
    "Extractor",
    "PromptAccuracy",
    "SceneReader",
    "Share",
    "ToyFeatures",
    "attention_maps",
    "captions_of",
    "choose_scale",
    "clip_score",
    "copied",
    "diversity",
    "draw_captions",
    "evaluate",
    "extract",
    "find_extractor",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "last_evaluation",
    "nearest_neighbours",
    "precision_recall",
    "prompt_accuracy",
    "psnr",
    "score_condition",
    "score_first_stage",
    "score_prompts",
    "score_reconstructions",
    "ssim",
    "thumbnails",
    "what",
]
