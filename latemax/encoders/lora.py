"""LoRA on the query and value projections of a vision transformer, as a parametrisation of their weights.

W -> W + (alpha / rank) * B @ A, with A [rank, in] and B [out, rank] (Hu et al., "LoRA", 2021, arXiv 2106.09685).
Parametrising the weight, not the layer's forward, is what makes one mechanism fit all: timm's BEiT and EVA blocks and
nn.MultiheadAttention read the weight and never call the layer, so an adapter around the layer would silently do nothing
there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .patch_encoder import PatchEncoder

# Names of separate projections, per target, across the libraries.
SEPARATE = {
    "q": ("q_proj", "query", "q", "to_q", "wq"),
    "k": ("k_proj", "key", "k", "to_k", "wk"),
    "v": ("v_proj", "value", "v", "to_v", "wv"),
}
FUSED = "qkv"
# nn.MultiheadAttention: one weight where all widths agree, three where they differ.
IN_PROJ = "in_proj_weight"
TARGETS = tuple(SEPARATE)
FORMAT = "latemax-lora-1"


class LowRank(nn.Module):
    """Adds scale * B @ A to some row blocks of a weight [blocks * out, in]; `blocks` is 1, or 3 for fused q, k, v."""

    def __init__(self, weight: Tensor, rank: int, scale: float, targets: tuple[str, ...], blocks: int):
        super().__init__()
        self.scale = scale
        self.blocks = blocks
        out, width = weight.shape[0] // blocks, weight.shape[1]
        # float32 whatever the base: steps of 1e-4 vanish in a bfloat16 factor.
        like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.a = nn.ParameterDict({t: nn.Parameter(torch.empty(rank, width, **like)) for t in targets})
        self.b = nn.ParameterDict({t: nn.Parameter(torch.zeros(out, rank, **like)) for t in targets})
        for a in self.a.values():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        deltas = {t: ((self.b[t] @ a) * self.scale).to(weight.dtype) for t, a in self.a.items()}
        if self.blocks == 1:
            return weight + next(iter(deltas.values()))
        parts = weight.chunk(self.blocks)
        return torch.cat([part + deltas[t] if t in deltas else part for t, part in zip(TARGETS, parts, strict=True)])


class LoRA:
    """The low-rank factors living in a model; made by `add_lora`.

    `sites` names the adapted weights ("blocks.0.attn.qkv.weight"); keys of `state_dict` are "<site>:<target>.a" and
    ".b".
    """

    def __init__(self, sites: dict[str, tuple[nn.Module, str]], config: dict, frozen: list[nn.Parameter]):
        self._sites = sites
        self._frozen = frozen
        self.rank, self.alpha, self.targets = config["rank"], config["alpha"], tuple(config["targets"])

    @property
    def sites(self) -> list[str]:
        return list(self._sites)

    def _low_rank(self) -> Iterator[tuple[str, LowRank]]:
        for name, (module, attribute) in self._sites.items():
            if not parametrize.is_parametrized(module, attribute):
                raise RuntimeError("this LoRA was merged or removed already; call add_lora again")
            yield name, module.parametrizations[attribute][0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("<site>:<target>.a" [rank, in] or ".b" [out, rank], parameter)."""
        for name, low_rank in self._low_rank():
            for target in low_rank.a:
                yield f"{name}:{target}.a", low_rank.a[target]
                yield f"{name}:{target}.b", low_rank.b[target]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable factors: what an optimiser takes."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies the factors in; ValueError on a missing or unknown key or a wrong shape, before anything is "
        "changed."""
        own = dict(self.named_parameters())
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"state: {len(missing)} missing keys (first: {missing[:2]}) and {len(unknown)} unknown ones (first: "
                f"{unknown[:2]}); it must come from the same architecture and targets {self.targets}"
            )
        for name, parameter in own.items():
            if state[name].shape != parameter.shape:
                raise ValueError(f"state: {name} must be {tuple(parameter.shape)}, got {tuple(state[name].shape)}")
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def merge(self) -> None:
        """Writes W + scale * B @ A into the base weights, bit for bit the weight in use before, and drops the factors.

        The state dict has its original keys again, and what `add_lora` froze may be trained again.
        """
        self._finish(keep=True)

    def remove(self) -> None:
        """Drops the factors: the model is bit for bit what it was before `add_lora`."""
        self._finish(keep=False)

    def _finish(self, keep: bool) -> None:
        sites = list(self._low_rank())
        for name, _ in sites:
            module, attribute = self._sites[name]
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=keep)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the factors with rank, alpha and targets, in one step: safetensors where that is installed, else
        torch.save.

        `LoRA.from_file` and `load` read either.
        """
        path = Path(path)
        state = {k: v.contiguous().cpu() for k, v in self.state_dict().items()}
        config = {"format": FORMAT, "rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}
        # Beside the target, because a rename is atomic only within one file system.
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            try:
                from safetensors.torch import save_file
            except ImportError:
                torch.save({"config": config, "state": state}, scratch)
            else:
                save_file(state, scratch, metadata={"latemax": json.dumps(config)})
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike) -> None:
        """Copies the factors of a file into this LoRA; ValueError where rank, alpha, targets or sites differ."""
        config, state = _read(path)
        own = {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}
        wrong = {k: (config[k], v) for k, v in own.items() if config[k] != v}
        if wrong:
            raise ValueError(
                f"{path}: saved with other settings (file, here): {wrong}; use LoRA.from_file(path, model)"
            )
        self.load_state_dict(state)

    @classmethod
    def from_file(cls, path: str | os.PathLike, model: nn.Module) -> LoRA:
        """`add_lora` on `model` with the file's rank, alpha and targets, then its factors."""
        config, state = _read(path)
        lora = add_lora(model, config["rank"], config["alpha"], tuple(config["targets"]))
        try:
            lora.load_state_dict(state)
        except ValueError:
            lora.remove()
            raise
        return lora

    def __repr__(self) -> str:
        live = all(parametrize.is_parametrized(module, attribute) for module, attribute in self._sites.values())
        state = f"{sum(p.numel() for p in self.parameters())} parameters" if live else "merged or removed"
        settings = f"rank={self.rank}, alpha={self.alpha}, targets={self.targets}"
        return f"LoRA({len(self._sites)} weights, {settings}, {state})"


def add_lora(
    model: nn.Module | PatchEncoder, rank: int = 8, alpha: float = 16, targets: tuple[str, ...] = ("q", "v")
) -> LoRA:
    """Adds trainable low-rank updates to W_Q and W_V of every attention in `model`, in place, and freezes its own
    weights.

    Separate q/v linears, a fused qkv linear and nn.MultiheadAttention's in_proj_weight are all adapted. The weights in
    use are bit for bit unchanged until the first optimiser step (B starts at zero). Given a `PatchEncoder`, only the
    tower that makes patch tokens is adapted (no text tower, pooler or head), and an own `projection` stays trainable.

    Args:
        rank: columns of B and rows of A; at most the smaller side of a weight.
        alpha: the update is scaled by alpha / rank.
        targets: which of "q", "k", "v".

    Raises:
        TypeError: `model` is no module.
        ValueError: a bad argument, a model that carries a LoRA already, quantised weights, or no attention found.
    """
    targets = _check(model, rank, alpha, targets)
    base, skipped = model, []
    search = model
    if isinstance(model, PatchEncoder):
        adapter = model.adapter
        base, search, skipped = model.model, adapter.tower, adapter.unused
        if not isinstance(base, nn.Module):
            raise TypeError("model: this PatchEncoder wraps a plain callable; pass the module behind it to add_lora")
    names = {id(module): name for name, module in base.named_modules()}
    ignored = {id(m) for part in skipped for m in part.modules()}
    plan = [
        (".".join(filter(None, (names[id(module)], attribute))), *site)
        for module in search.modules()
        if id(module) not in ignored
        for attribute, *site in _sites_of(module, targets)
    ]
    if not plan:
        raise ValueError(
            f"model: no attention with targets {targets} found in {type(base).__name__}: looked for fused '{FUSED}' "
            f"linears, '{IN_PROJ}', and linears named {[n for t in targets for n in SEPARATE[t]]}"
        )
    for name, module, attribute, site_targets, blocks in plan:
        _check_site(name, module, attribute, site_targets, blocks, rank)
    frozen = [p for p in base.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    sites = {}
    for name, module, attribute, site_targets, blocks in plan:
        low_rank = LowRank(getattr(module, attribute), rank, alpha / rank, site_targets, blocks)
        # unsafe: the check it skips would run the update once more; shape and dtype are kept by construction.
        parametrize.register_parametrization(module, attribute, low_rank, unsafe=True)
        sites[name] = (module, attribute)
    return LoRA(sites, {"rank": rank, "alpha": alpha, "targets": targets}, frozen)


def _sites_of(module: nn.Module, targets: tuple[str, ...]):
    """(path below `module`, owner of the weight, its attribute, targets it serves, row blocks) of one attention."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            yield IN_PROJ, module, IN_PROJ, targets, len(TARGETS)
            return
        for target in targets:
            name = f"{target}_proj_weight"
            yield name, module, name, (target,), 1
        return
    children = dict(module.named_children())
    if isinstance(children.get(FUSED), nn.Linear):
        yield f"{FUSED}.weight", children[FUSED], "weight", targets, len(TARGETS)
        return
    found = {t: next((n for n in SEPARATE[t] if isinstance(children.get(n), nn.Linear)), None) for t in ("q", "v")}
    if not all(found.values()):
        return
    for target in targets:
        name = next((n for n in SEPARATE[target] if isinstance(children.get(n), nn.Linear)), None)
        if name is not None:
            yield f"{name}.weight", children[name], "weight", (target,), 1


def _check(model, rank, alpha, targets) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a PatchEncoder, got {type(model).__name__}")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an int >= 1, got {rank!r}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"alpha must be a number > 0, got {alpha!r}")
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if not targets or len(set(targets)) != len(targets) or not set(targets) <= set(TARGETS):
        raise ValueError(f"targets must be distinct names out of {TARGETS}, got {targets}")
    return targets


def _check_site(name: str, module: nn.Module, attribute: str, targets, blocks: int, rank: int) -> None:
    if parametrize.is_parametrized(module, attribute):
        raise ValueError(f"model: {name} is parametrised already (an earlier LoRA?); merge() or remove() that first")
    weight = getattr(module, attribute)
    if not weight.is_floating_point():
        raise ValueError(
            f"model: {name} holds {weight.dtype}; LoRA by weight needs floating-point weights, not quantised ones"
        )
    if weight.shape[0] % blocks:
        raise ValueError(f"model: {name} has {weight.shape[0]} rows, which do not split into q, k and v of equal size")
    smallest = min(weight.shape[0] // blocks, weight.shape[1])
    if rank > smallest:
        raise ValueError(f"rank must be at most {smallest} for {name} {tuple(weight.shape)}, got {rank}")


def _read(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    with open(path, "rb") as file:
        # A zip archive is torch.save's; anything else is read as safetensors.
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, state = content.get("config", {}), content.get("state", {})
    else:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(f'reading {path} needs safetensors: pip install "latemax[encoders]"') from error
        try:
            with safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {}).get("latemax", "{}"))
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable LoRA file: {error}") from error
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a LoRA file of this library (format {config.get('format')!r}, expected {FORMAT!r})"
        )
    return config, state
