"""A warm start of the text conditioner: before it speaks to a UNet, it answers riddles about the captions alone."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_edu.conditioning.condition import Conditioner
from ldm_edu.conditioning.text import TextConditioner, split_words
from ldm_edu.data.cache import SampleCache
from ldm_edu.data.toy.captions import RELATIONS, WORDS, read_caption
from ldm_edu.data.toy.scenes import COLOURS, SHAPES, SIZES
from ldm_edu.errors import LDMError
from ldm_edu.training.data import condition_batch
from ldm_edu.training.loop import sample_streams
from ldm_edu.training.recipes import Recipe, Training
from ldm_edu.training.run import Run
from ldm_edu.training.stages import ImageStage
from ldm_edu.training.tasks import build_conditioner

__all__ = ["TextStage"]

NOUNS = {word for shape in SHAPES for word in WORDS[shape]}  # the last word of every thing in a caption
OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
LOOKS = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES}  # questions with one answer each


def check_reader(recipe: Recipe, conditioner: Conditioner | None) -> TextConditioner:
    "The conditioner of a recipe; `LDMError` where it is none that riddles can be asked of."
    strict = isinstance(conditioner, TextConditioner) and conditioner.tokenizer.strict
    if recipe.dataset != "toy" or not strict:
        raise LDMError(
            "text: riddles are about captions of toy scenes, so dataset should be 'toy' "
            "and the one conditioner a strict TextConditioner; text=None leaves the warm start out"
        )
    return cast(TextConditioner, conditioner)


def riddles(
    captions: Sequence[str],
    length: int,  # tokens a caption
) -> dict[str, Tensor]:
    """The right answers, for the token of every noun: `size`, `colour`, `shape` (b, l), -1 where there is no noun, and
    `sides` (b, l, 4): does the thing stand left, right, in front, behind of another, as the caption says?"""
    answers = {name: torch.full((len(captions), length), -1) for name in LOOKS}
    sides = torch.zeros(len(captions), length, len(RELATIONS))
    for i, caption in enumerate(captions):
        if (count := len(split_words(caption))) > length:
            raise LDMError(f"a prompt has at most {length} words, this one has {count}: {caption!r}")
        said = read_caption(caption)
        tokens = [k for k, word in enumerate(split_words(caption)) if word in NOUNS]
        for k, thing in zip(tokens, said.things, strict=True):
            for name, known in LOOKS.items():
                answers[name][i, k] = known.index(getattr(thing, name))
        for first, word, second in said.relations:
            sides[i, tokens[first], RELATIONS.index(word)] = 1
            sides[i, tokens[second], RELATIONS.index(OPPOSITE[word])] = 1
    return answers | {"sides": sides}


class RiddleTask(nn.Module):
    "A text conditioner, and a linear layer that answers `riddles` from each of its tokens."

    def __init__(self, conditioner: TextConditioner):
        super().__init__()
        self.conditioner = conditioner
        self.parts = [*map(len, LOOKS.values()), len(RELATIONS)]
        self.answer = nn.Linear(cast(int, conditioner.context_dim), sum(self.parts))

    def logits(self, captions: Sequence[str]) -> dict[str, Float[Tensor, "b l k"]]:
        "What is answered at every token, by question."
        context = cast(Tensor, self.conditioner(captions).context)
        return dict(zip((*LOOKS, "sides"), self.answer(context).float().split(self.parts, -1)))

    def forward(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        "Cross-entropy of looks and sides at the nouns of batch `caption`; the loss and its terms."
        logits, nouns = self.logits(batch["caption"]), batch["shape"] >= 0
        each = {}  # (b, l)
        for name in LOOKS:
            each[name] = F.cross_entropy(logits[name].transpose(1, 2), batch[name], ignore_index=-1, reduction="none")
        sides = F.binary_cross_entropy_with_logits(
            logits["sides"], batch["sides"].to(logits["sides"]), reduction="none"
        )
        each["sides"] = sides.mean(-1) * nouns
        # A mean over the nouns of a caption, then over captions: so micro-batches and processes have equal weights.
        terms = {name: (values.sum(1) / nouns.sum(1)).mean() for name, values in each.items()}
        loss = sum(terms.values(), torch.zeros((), device=nouns.device))
        return loss, {name: value.detach() for name, value in terms.items()}


def share_answered(task: RiddleTask, batch: Mapping[str, Any]) -> float:
    "The share of captions of which every riddle is answered right."
    logits, nouns = task.logits(batch["caption"]), batch["shape"] >= 0
    right = torch.stack([logits[name].argmax(-1) == batch[name] for name in LOOKS]).all(0)
    right &= ((logits["sides"] > 0) == (batch["sides"] > 0.5)).all(-1)
    return (right | ~nouns).all(1).float().mean().item()


class TextStage(ImageStage):
    "The text conditioner of a recipe, before it is trained with the UNet."

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        made: Mapping[str, nn.Module],  # what earlier stages have made; not needed here
    ):
        torch.manual_seed(recipe.seed + 1)
        conditioner = build_conditioner(recipe.diffusion)
        super().__init__(
            "text", RiddleTask(check_reader(recipe, conditioner)), run, recipe, cast(Training, recipe.text), 1
        )

    def samples(
        self, dataset: SampleCache, step: int, indices: Sequence[int], repeats: Sequence[int] | None = None
    ) -> dict[str, Any]:
        streams = sample_streams(self.seed, step, indices, repeats)
        phrase = torch.tensor([rng.random() for rng in streams], dtype=torch.float32)
        batch = condition_batch(dataset, ("caption",), indices, phrase)
        conditioner = cast(RiddleTask, self.task).conditioner
        return batch | riddles(batch["caption"], conditioner.tokenizer.length)

    def validate(self, task: nn.Module) -> dict[str, float]:
        "The loss, and the share of captions of which all is understood."
        seen, reader = self.held_out_batch(), cast(RiddleTask, task)
        return {"held_out": reader(seen)[0].item(), "understood": share_answered(reader, seen)}

    def finish(self, task: nn.Module) -> TextConditioner:
        "The conditioner alone."
        return cast(RiddleTask, task).conditioner.train()
