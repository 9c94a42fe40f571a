"""The Python blocks of README.md run as they are, one after the other, in one namespace."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_blocks_of_the_readme_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    from PIL import Image
    from transformers import ViTConfig, ViTModel

    from latemax import PatchEncoder

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    # a hub's model is replaced by a tiny random one
    tiny = PatchEncoder(ViTModel(config, add_pooling_layer=False).eval())
    monkeypatch.setattr(PatchEncoder, "from_pretrained", lambda name: tiny)
    q, d = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 7, 16, requires_grad=True)
    namespace = dict(
        query_tokens=torch.randn(5, 16), page_tokens=torch.randn(4, 7, 16), pages=[torch.randn(7, 16)] * 3,
        q=q, d=d, q_mask=torch.ones(3, 5), d_mask=torch.ones(3, 7),
        q_flat=torch.randn(9, 16), d_flat=torch.randn(12, 16), cu_seqlens_q=torch.tensor([0, 4, 9]),
        cu_seqlens_d=torch.tensor([0, 7, 12]), tokens=torch.randn(12, 16),
        offsets=torch.tensor([0, 7, 12]), candidates=torch.tensor([[0, 1], [1, 0], [1, -1]]),
        found=torch.tensor([1, 0]), asked=torch.tensor([2, 2]), idf=torch.rand(3, 5),
        images=[Image.new("RGB", (40, 50))],
    )  # fmt: skip
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "page-" in capsys.readouterr().out
