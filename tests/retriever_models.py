"""One tiny random retriever per family, built from a configuration, with its processor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from latemax.encoders.layouts import LAYOUTS

CORPUS = ["a dog on a sofa", "the revenue of each region", "Question: Query: Describe the image. User: Assistant:"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SHAPE, "image_size": 32, "patch_size": 8}
VOCAB = 1600


def tokenizer(*special: str, **named: str) -> Any:
    """A byte-level BPE tokenizer of transformers trained on ``CORPUS``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ["<pad>", "<bos>", "<eos>", *special, *named.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(dict.fromkeys(names)), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", extra_special_tokens=named
    )


def images(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Noise of these (width, height)."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def shaken(model: nn.Module) -> Any:
    """In eval mode, with every parameter random, so that no norm or scale is an identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def seeded(build: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
    """Built once, with the same weights in every run."""

    @functools.cache
    def once() -> tuple[Any, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build()

    return once


@seeded
def colpali() -> tuple[Any, Any]:
    from transformers import ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor, SiglipImageProcessorPil

    words = tokenizer(image_token="<image>")
    size = {"height": 32, "width": 32}
    processor = ColPaliProcessor(SiglipImageProcessorPil(size=size, image_seq_length=16), words)
    vlm = {
        "model_type": "paligemma",
        "image_token_index": processor.image_token_id,
        "projection_dim": 32,
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 32},
        "text_config": {
            "model_type": "gemma", **SHAPE, "vocab_size": VOCAB, "num_key_value_heads": 1, "head_dim": 8
        },
    }  # fmt: skip
    return shaken(ColPaliForRetrieval(ColPaliConfig(vlm_config=vlm, embedding_dim=24))), processor


@seeded
def colqwen2() -> tuple[Any, Any]:
    from transformers import ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor, Qwen2VLImageProcessorPil

    words = tokenizer(
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>"
    )
    words.pad_token = "<|endoftext|>"
    words.padding_side = "left"
    images = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=256, max_pixels=4096, merge_size=2)
    processor = ColQwen2Processor(images, words)
    vlm = {
        "model_type": "qwen2_vl",
        "image_token_id": processor.image_token_id,
        "vision_config": {
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2
        },
        "text_config": {
            **SHAPE, "vocab_size": VOCAB, "num_key_value_heads": 2, "rope_parameters": {"mrope_section": [1, 1, 2]}
        },
    }  # fmt: skip
    return shaken(ColQwen2ForRetrieval(ColQwen2Config(vlm_config=vlm, embedding_dim=24))), processor


@seeded
def colmodernvbert() -> tuple[Any, Any]:
    from transformers import (
        ColModernVBertConfig,
        ColModernVBertForRetrieval,
        ColModernVBertProcessor,
        Idefics3ImageProcessorPil,
    )

    marks = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    words = tokenizer(
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<|begin_of_text|>", *marks
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = ColModernVBertProcessor(images, words, image_seq_len=4)
    vlm = {
        "model_type": "modernvbert",
        "image_token_id": processor.image_token_id,
        "pixel_shuffle_factor": 2,
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "text_config": {
            "model_type": "modernbert", **SHAPE, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
        },
    }  # fmt: skip
    return shaken(ColModernVBertForRetrieval(ColModernVBertConfig(vlm_config=vlm, embedding_dim=24))), processor


TEMPLATE = (
    "{{ '<query>' if task == 'query' else '<doc>' }}"
    "{% for part in messages[0]['content'] %}"
    "{{ '<img>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{{ '<mask><mask>' if task == 'query' else '' }}"
)


@seeded
def neomme() -> tuple[Any, Any]:
    from transformers import NeoMMEConfig, NeoMMEForRetrieval, NeoMMEImageProcessor, NeoMMEProcessor

    words = tokenizer(
        mask_token="<mask>", document_token="<doc>", query_token="<query>", image_token="<img>", row_token="<row>"
    )
    processor = NeoMMEProcessor(NeoMMEImageProcessor(patch_size=8, max_side=32), words, chat_template=TEMPLATE)
    config = NeoMMEConfig(
        **SHAPE, vocab_size=VOCAB, embedding_rank=16, num_key_value_heads=2, head_dim=16, patch_size=8,
        embedding_dim=24, image_token_id=processor.image_token_id, document_token_id=words.document_token_id,
    )  # fmt: skip
    return shaken(NeoMMEForRetrieval(config)), processor


class Family(NamedTuple):
    """A retriever of transformers, and the grid of a 64 x 32 image (width, height) in it; None for tiles."""

    build: Callable[[], tuple[Any, Any]]
    grid: tuple[int, int] | None


FAMILIES = {
    "ColPali": Family(colpali, (4, 4)),
    "ColQwen2": Family(colqwen2, (2, 4)),
    "ColModernVBert": Family(colmodernvbert, None),
    "NeoMME": Family(neomme, (2, 4)),
}


def host_inputs(model: Any, processor: Any, images: Any = None, texts: Any = None) -> Any:
    """What the host's own documentation feeds to the model."""
    if type(model).__name__ != "NeoMMEForRetrieval":
        call = processor.process_images if images else processor.process_queries
        return call(images or texts, return_tensors="pt")
    kind, task = ("image", "document") if images else ("text", "query")
    return processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": kind, kind: item}]}] for item in images or texts],
        task=task, tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt", "padding": True},
    )  # fmt: skip


def host_tokens(model: Any, inputs: Any) -> list[torch.Tensor]:
    """The host's embeddings, unpadded."""
    inputs.pop("labels", None)
    with torch.no_grad():
        found = model(**inputs).embeddings
    return [row[mask != 0] for row, mask in zip(found, inputs["attention_mask"], strict=True)]


def cells(name: str) -> list[str]:
    """The row of a family in the table, every figure computed now."""
    from latemax import Retriever

    family = FAMILIES[name]
    model, processor = family.build()
    retriever, pictures, texts = Retriever(model, processor), images((64, 32)), [CORPUS[0]]
    pages, queries = retriever.encode_images(pictures), retriever.encode_queries(texts)
    inputs = {"images": pictures}, {"texts": texts}
    host = [host_tokens(model, host_inputs(model, processor, **x))[0] for x in inputs]
    ours = [found.tokens[0][found.mask[0]] for found in (pages, queries)]
    difference = max((a - b).abs().max().item() for a, b in zip(ours, host, strict=True))
    grid = "tiles" if family.grid is None else f"{family.grid[0]} × {family.grid[1]}"
    layout = next(row for row in LAYOUTS if row.matches(processor)).name
    return [name, str(int(pages.mask.sum())), str(int(pages.is_patch.sum())), grid, layout, f"{difference:.1e}"]


def table() -> str:
    """The families as markdown."""
    head = ["family", "tokens of a 64 × 32 image", "patches", "grid", "layout", "max abs diff to the library"]
    lines = [head, ["---"] * len(head), *map(cells, FAMILIES)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    import torchvision_shim

    torchvision_shim.install()
    print(table())
