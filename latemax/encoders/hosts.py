"""How the libraries that users hold retrievers in encode images and queries: one class a kind, tried in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters.base import parameter_like
from .layouts import Layout, layout_of
from .patch_encoder import PatchEncoder
from .text_encoder import TextEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

# Where vision-language models keep their vision tower.
VISION = ("vision_tower", "vision_model", "visual")


class Encoded(NamedTuple):
    """A batch as the host encodes it.

    Attributes:
        tokens: ``[b, l, dim]``.
        mask: Bool ``[b, l]``, True = scored.
        ids: Int64 ``[b, l]``.
        features: All that the processor made of the batch.
    """

    tokens: Tensor
    mask: Tensor
    ids: Tensor
    features: Mapping[str, Any]


class Host:
    """A retriever of one library.

    Attributes:
        family: What it is called in messages.
        tokenizer: Of its queries.
    """

    family: str
    tokenizer: Any
    processor: Any

    def images(self, images: list[Image]) -> Encoded:
        """Encodes upright RGB images as the host's documents."""
        raise NotImplementedError

    def queries(self, texts: list[str]) -> Encoded:
        """Encodes texts as the host's queries."""
        raise NotImplementedError

    def query_ids(self, text: str) -> list[int]:
        """The scored tokens of one query."""
        raise NotImplementedError

    def layouts(self, encoded: Encoded, images: list[Image]) -> list[Layout]:
        """The layout of every image's scored tokens."""
        return [
            layout_of(self.processor, ids[mask].cpu(), encoded.features, i, (image.height, image.width))
            for i, (ids, mask, image) in enumerate(zip(encoded.ids, encoded.mask, images, strict=True))
        ]


class TransformersHost(Host):
    """``...ForRetrieval`` of transformers, which projects, normalises and zeroes padding in its own forward."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.family = type(model).__name__
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise TypeError(
                f"processor must be that of {self.family}, with a tokenizer and an image processor, got "
                f"{type(processor).__name__}"
            )
        self.tokenizer = processor.tokenizer

    @staticmethod
    def matches(model: Any) -> bool:
        """Whether ``model`` is a class of transformers whose output has ``embeddings``."""
        return type(model).__name__.endswith("ForRetrieval") and hasattr(vars(model).get("config"), "model_type")

    def images(self, images: list[Image]) -> Encoded:
        return self._run(self._prepared(images))

    def queries(self, texts: list[str]) -> Encoded:
        return self._run(self._asked(texts))

    def query_ids(self, text: str) -> list[int]:
        inputs = self._asked([text])
        return inputs["input_ids"][0][inputs["attention_mask"][0] != 0].tolist()

    def _prepared(self, images: list[Image]) -> Any:
        return self.processor.process_images(images=images, return_tensors="pt")

    def _asked(self, texts: list[str]) -> Any:
        return self.processor.process_queries(text=texts, return_tensors="pt")

    def _run(self, inputs: Any) -> Encoded:
        like = parameter_like(self.model)
        assert like is not None
        moved = {
            name: value.to(like.device, like.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            # Training labels of a processor that makes them for every image: no input of retrieval.
            if isinstance(value, Tensor) and name != "labels"
        }
        out = self.model(**moved).embeddings
        return Encoded(out, moved["attention_mask"] != 0, moved["input_ids"], moved)


class TemplateHost(TransformersHost):
    """A retriever whose processor marks queries and documents by its chat template (NeoMME)."""

    @staticmethod
    def matches(model: Any) -> bool:
        return type(model).__name__ == "NeoMMEForRetrieval"

    def _prepared(self, images: list[Image]) -> Any:
        return self._templated([[{"type": "image", "image": image}] for image in images], "document")

    def _asked(self, texts: list[str]) -> Any:
        return self._templated([[{"type": "text", "text": text}] for text in texts], "query")

    def _templated(self, contents: list[Any], task: str) -> Any:
        return self.processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            task=task,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True},
        )


class SentenceTransformersHost(Host):
    """``MultiVectorEncoder`` of sentence-transformers, with its prompts, expansion, masks and pipeline."""

    def __init__(self, model: Any, processor: Any):
        if processor is not None:
            raise ValueError("processor must be None with a MultiVectorEncoder, which has its own")
        self.model, self.processor, self.tokenizer = model, model.processor, model.tokenizer
        inner = next((part.model for part in model if hasattr(part, "model")), model)
        self.family = f"MultiVectorEncoder ({type(inner).__name__})"

    @staticmethod
    def matches(model: Any) -> bool:
        return callable(getattr(type(model), "encode_query", None)) and callable(
            getattr(type(model), "encode_document", None)
        )

    def images(self, images: list[Image]) -> Encoded:
        if "image" not in self.model.modalities:
            raise ValueError(f"images: this {self.family} takes no images, only {self.model.modalities}")
        return self._joined(
            self.model.encode_document(images, batch_size=len(images), output_value=None, show_progress_bar=False)
        )

    def queries(self, texts: list[str]) -> Encoded:
        return self._joined(
            self.model.encode_query(texts, batch_size=len(texts), output_value=None, show_progress_bar=False)
        )

    def query_ids(self, text: str) -> list[int]:
        encoded = self.queries([text])
        return encoded.ids[0][encoded.mask[0]].tolist()

    def _joined(self, found: list[dict[str, Any]]) -> Encoded:
        names = [name for name, value in found[0].items() if isinstance(value, Tensor)]
        # A value that is not one an input is carried whole by every input.
        features = {name: torch.stack([one[name] for one in found]) for name in names}
        tokens, mask = features["token_embeddings"], features["attention_mask"] != 0
        ids = features["input_ids"]
        if ids.shape != mask.shape:
            raise ValueError(
                f"model: this {self.family} pools its tokens ({tokens.shape[1]} are left of {ids.shape[1]}), so they "
                f"are no patches and no word pieces any more; take the token pooling out of its modules"
            )
        return Encoded(tokens, mask, ids, features)


class PooledAlone(nn.Module):
    """An attention-pooling head given every patch by itself: attention over one token is its value projection.

    The module is not registered as a child, because it is the model's own: it moves and is saved with the model.
    """

    def __init__(self, tower: Any):
        super().__init__()
        self._tower = (tower,)

    def forward(self, tokens: Tensor) -> Tensor:
        return self._tower[0].head(tokens.flatten(0, 1).unsqueeze(1)).view(*tokens.shape[:2], -1)


class Pair:
    """CLIP, SigLIP or open_clip: a ``PatchEncoder`` and a ``TextEncoder`` of one model."""

    def __init__(self, model: Any, processor: Any, model_id: str | None):
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer is None:
            raise ValueError("processor must be the model's processor or its tokenizer, got None")
        images = getattr(processor, "image_processor", None)
        vision = model._modules.get("vision_model")
        head: Any = "text" if vision is None or not hasattr(vision, "head") else PooledAlone(vision)
        self.patches = PatchEncoder(model, projection=head, preprocess=images, model_id=model_id)
        self.texts = TextEncoder(model, tokenizer, model_id=model_id)
        self.family = self.texts.family

    @staticmethod
    def matches(model: Any) -> bool:
        return "text_model" in model._modules or "visual" in model._modules


HOSTS: tuple[Any, ...] = (TemplateHost, TransformersHost, SentenceTransformersHost)


# Children of a vision tower that pool its tokens, which no retriever uses.
POOLS = ("head", "pooler", "attn_pool")


def vision_tower(model: nn.Module) -> nn.Module:
    """The vision tower in ``model``; ``model`` itself where one encoder reads patches and words."""
    names = sorted(
        (name for name, _ in model.named_modules() if name.rpartition(".")[2] in VISION), key=lambda n: n.count(".")
    )
    return model.get_submodule(names[0]) if names else model
