"""Vision transformers as patch-token encoders, text towers, pages of PDF files, and LoRA on W_Q and W_V."""

from .lora import LoRA, add_lora
from .patch_encoder import PatchEncoder
from .pdf import PdfPages
from .pixels import Preprocess
from .text_encoder import TextEncoder
from .tokens import PatchTokens, TextTokens

__all__ = ["LoRA", "PatchEncoder", "PatchTokens", "PdfPages", "Preprocess", "TextEncoder", "TextTokens", "add_lora"]
