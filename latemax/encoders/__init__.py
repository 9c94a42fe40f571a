"""Vision transformers, text towers and retrievers as encoders of tokens; pages of PDF files; LoRA on W_Q and W_V."""

from .lora import LoRA, add_lora
from .patch_encoder import PatchEncoder
from .pdf import PdfPages
from .pixels import Preprocess
from .retriever import Retriever
from .text_encoder import TextEncoder
from .tokens import PatchTokens, TextTokens

__all__ = [
    "LoRA",
    "PatchEncoder",
    "PatchTokens",
    "PdfPages",
    "Preprocess",
    "Retriever",
    "TextEncoder",
    "TextTokens",
    "add_lora",
]
