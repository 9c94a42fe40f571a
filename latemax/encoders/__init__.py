"""Vision transformers as patch-token encoders, their preprocessing, and LoRA on their W_Q and W_V."""

from .lora import LoRA, add_lora
from .patch_encoder import PatchEncoder
from .pdf import PdfPages
from .pixels import Preprocess
from .tokens import PatchTokens

__all__ = ["LoRA", "PatchEncoder", "PatchTokens", "PdfPages", "Preprocess", "add_lora"]
