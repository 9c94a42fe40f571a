"""Vision transformers as patch-token encoders, their preprocessing, and LoRA on their W_Q and W_V."""

from .lora import LoRA, add_lora
from .patch_encoder import PatchEncoder
from .pixels import Preprocess
from .retriever import Retriever
from .text_encoder import TextEncoder
from .tokens import PatchTokens, TextTokens

__all__ = ["LoRA", "PatchEncoder", "PatchTokens", "Preprocess", "Retriever", "TextEncoder", "TextTokens", "add_lora"]
