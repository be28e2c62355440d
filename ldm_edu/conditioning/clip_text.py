"""CLIP's text encoder and tokenizer: read from a folder or the hub, checked, and built again from what was saved."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ldm_edu.checks import check_captions, check_count, check_counts, check_number, shown
from ldm_edu.conditioning.text import check_prompt
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import brief, parse_json

__all__ = ["read_clip_tokenizer"]

_TEXT_CONFIG = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT_CONFIG += ("max_position_embeddings", "hidden_act", "layer_norm_eps")
_TEXT_CONFIG += ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def reading_clip(name: str | Path, what: str) -> Iterator[None]:
    "CheckpointError in place of whatever transformers raises where it cannot load from a folder or the hub."
    try:
        yield
    except Exception as error:  # it raises errors of many kinds
        where = f"{name}: no {what} can be loaded from this folder, nor from the hub under this name"
        raise CheckpointError(f"{where} ({type(error).__name__}: {brief(error)})") from error


def read_clip_tokenizer(name: str | Path, length: int = 77) -> dict[str, Any]:
    "CLIP's tokenizer from a folder or the hub, as the JSON of the library `tokenizers`; each prompt is `length` ids."
    import transformers

    kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)  # one and the same in transformers 5
    inside: dict[str, Any] = {"subfolder": "tokenizer"} if (Path(name) / "tokenizer").is_dir() else {}
    with reading_clip(name, "CLIP tokenizer"):
        found = kind.from_pretrained(str(name), **inside)
        tokenizer = found.backend_tokenizer
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=found.pad_token_id, pad_token=found.pad_token)
        return parse_json(tokenizer.to_str())


def read_clip_encoder(name: str | Path) -> nn.Module:
    "CLIP's text encoder from a folder or the hub, in float32."
    from transformers import CLIPTextModel

    inside: dict[str, Any] = {"subfolder": "text_encoder"} if (Path(name) / "text_encoder").is_dir() else {}
    with reading_clip(name, "CLIP text encoder"):
        return CLIPTextModel.from_pretrained(str(name), **inside).float()


_START, _END = "<|startoftext|>", "<|endoftext|>"
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_tokenizer(saved: Mapping[str, Any], length: int) -> Any:
    "CLIP's tokenizer with the pieces, merges and padding of a saved one, and nothing else of it."
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces, pad = saved["model"]["vocab"], saved["padding"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in saved["model"]["merges"]]
    merges = [(first, second) for first, second in pairs]
    found = Tokenizer(models.BPE(pieces, merges, unk_token=_END, end_of_word_suffix="</w>"))
    spaces, lower = normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()
    found.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, lower])
    split = pre_tokenizers.Split(Regex(_PIECES), "removed", invert=True)
    found.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ends = (_END, pieces[_END]), (_START, pieces[_START])
    found.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    found.add_special_tokens([_START, _END])
    found.enable_truncation(length)
    found.enable_padding(pad_id=pad["pad_id"], pad_token=pad["pad_token"], length=length)
    return found


class ClipIds:
    "Captions to ids. LDMError for a tokenizer that is none of CLIP's, or that belongs to another encoder."

    def __init__(self, saved: Mapping[str, Any], vocab_size: int, length: int):
        self.length = length
        try:
            self.words = clip_tokenizer(saved, length)
            ids = [*saved["model"]["vocab"].values(), saved["padding"]["pad_id"]]
        except Exception as error:  # tokenizers raises bare exceptions
            raise LDMError(f"tokenizer is not the JSON of CLIP's: {type(error).__name__}: {brief(error)}") from error
        if not vocab_size / 2 < len({*ids}) <= vocab_size or not 0 <= min(ids) <= max(ids) < vocab_size:
            what = f"the tokenizer has {len({*ids})} pieces, the largest id is {max(ids)}"
            raise LDMError(f"tokenizer: {what}, and the encoder knows {vocab_size}: they do not belong together")

    def __call__(self, captions: Sequence[str]) -> Int[Tensor, "b l"]:
        "One row for each caption, the rest of a long one left out; LDMError where they are no texts."
        texts = [check_prompt(caption, strict=False) for caption in check_captions("caption", captions)]
        # No piece is longer than 100 letters. Half of a pair of surrogates is no letter.
        plain = [text[: 100 * self.length].encode("utf-8", "replace").decode() for text in texts]
        return torch.tensor([row.ids for row in self.words.encode_batch(plain)], dtype=torch.long)


def check_text_config(said: Mapping[str, Any]) -> dict[str, Any]:
    "The sizes of a CLIP text encoder; LDMError for other words, or for sizes that it cannot have."
    wanted = f"text_config should be a dict with some of {', '.join(_TEXT_CONFIG)}"
    if not isinstance(said, Mapping):
        raise LDMError(f"{wanted}, not {shown(said)}")
    if unknown := [name for name in said if name not in _TEXT_CONFIG]:
        raise LDMError(f"{wanted}; it has {shown(unknown[0])}")
    sizes = [name for name in _TEXT_CONFIG if name.startswith(("vocab", "hidden_size", "inter", "num", "max"))]
    check_counts(**{f"text_config: {name}": said[name] for name in sizes if name in said})
    for name in ("bos_token_id", "eos_token_id"):
        check_count(f"text_config: {name}", said.get(name, 0), 0)
    check_number("text_config: layer_norm_eps", said.get("layer_norm_eps", 1e-5), above=0)
    return dict(said)


def open_clip_text(
    pretrained: str | None, text_config: Mapping[str, Any] | None, tokenizer: Mapping[str, Any] | None, length: int
) -> tuple[nn.Module, dict[str, Any], dict[str, Any], ClipIds]:
    "CLIP's text encoder, its sizes, its tokenizer, twice; LDMError where there is neither a name nor all of these."
    from transformers import CLIPTextConfig, CLIPTextModel

    if (pretrained is None) == (text_config is None) or (text_config is None) != (tokenizer is None):
        raise LDMError("give either pretrained, a folder or a model on the hub, or text_config and tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, Mapping):
        raise LDMError(f"tokenizer should be a dict, see `read_clip_tokenizer`, not {shown(tokenizer)}")
    if text_config is None:
        if torch.empty(0).is_meta:  # a saved conditioner is first built there: it must not name another one
            raise LDMError("pretrained names another encoder: it can be given, and not be loaded or built on 'meta'")
        model, words = read_clip_encoder(str(pretrained)), read_clip_tokenizer(str(pretrained), length)
    else:
        model, words = (
            CLIPTextModel(CLIPTextConfig(**check_text_config(text_config))),
            copy.deepcopy(dict(tokenizer or {})),
        )
    sizes = {name: getattr(model.config, name) for name in _TEXT_CONFIG}
    check_count("length", length, 2, sizes["max_position_embeddings"])
    with reading_clip(str(pretrained), "CLIP tokenizer of this encoder") if text_config is None else nullcontext():
        ids = ClipIds(words, sizes["vocab_size"], length)
    # transformers 5 took the module `text_model` away: so weights have the same names under both
    return getattr(model, "text_model", model), sizes, words, ids
