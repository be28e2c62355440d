"""Distances between images, the judge, and scores of whole models."""

from ldm_edu.evaluation.conditions import ConditionScores, score_condition
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
    "PromptAccuracy",
    "SceneReader",
    "Share",
    "ToyFeatures",
    "captions_of",
    "choose_scale",
    "diversity",
    "draw_captions",
    "prompt_accuracy",
    "psnr",
    "score_condition",
    "score_first_stage",
    "score_prompts",
    "score_reconstructions",
    "ssim",
    "what",
]
