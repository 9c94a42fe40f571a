"""LoRA on the query and value projections of a vision transformer, as a parametrisation of their weights.

W -> W + (alpha / rank) * B @ A, with A [rank, in] and B [out, rank] (Hu et al., "LoRA", 2021, arXiv 2106.09685).
Parametrising the weight, not the layer's forward, is what makes one mechanism fit all: timm's BEiT and EVA blocks and
nn.MultiheadAttention read the weight and never call the layer, so an adapter around the layer would silently do nothing
there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import lora_file
from .hosts import POOLS
from .patch_encoder import PatchEncoder
from .retriever import Retriever

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
# Modules of a PatchEncoder that are trained next to its model.
OWN_MODULES = ("projection", "final_norm")


class LowRank(nn.Module):
    """Adds scale * B @ A to some row blocks of a weight [blocks * out, in]; ``blocks`` is 1, or 3 for fused q, k, v."""

    def __init__(self, weight: Tensor, rank: int, scale: float, targets: tuple[str, ...], blocks: int):
        super().__init__()
        self.scale = scale
        self.blocks = blocks
        out, width = weight.shape[0] // blocks, weight.shape[1]
        # float32 whatever the base: steps of 1e-4 vanish in a bfloat16 factor.
        like: dict[str, Any] = {
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
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


class Site(NamedTuple):
    """One adapted weight.

    Attributes:
        name: Dotted name of the weight in the model.
        module: Its owner.
        attribute: Its name there.
        targets: Which of "q", "k", "v" it serves.
        blocks: Row blocks of the weight: 1, or 3 for fused q, k, v.
    """

    name: str
    module: nn.Module
    attribute: str
    targets: tuple[str, ...]
    blocks: int


class LoRA:
    """The low-rank factors in a model; made by ``add_lora``.

    Attributes:
        rank: Columns of B and rows of A.
        alpha: The update is scaled by alpha / rank.
        targets: Which of "q", "k", "v" are adapted.
    """

    def __init__(
        self, model: nn.Module, sites: list[Site], rank: int, alpha: float, targets: tuple[str, ...], frozen: list[Any]
    ):
        self._encoder = model if isinstance(model, PatchEncoder) else None
        self._sites = sites
        self._orders = [list(site.module._parameters) for site in sites]
        self._frozen = frozen
        self.rank, self.alpha, self.targets = rank, alpha, targets
        for site in sites:
            low_rank = LowRank(getattr(site.module, site.attribute), rank, alpha / rank, site.targets, site.blocks)
            # unsafe: the check it skips would run the update once more; shape and dtype are kept by construction.
            parametrize.register_parametrization(site.module, site.attribute, low_rank, unsafe=True)

    @property
    def sites(self) -> list[str]:
        """Names of the adapted weights, as "blocks.0.attn.qkv.weight"."""
        return [site.name for site in self._sites]

    def _low_rank(self) -> Iterator[tuple[str, Any]]:
        for site in self._sites:
            if not parametrize.is_parametrized(site.module, site.attribute):
                raise RuntimeError("this LoRA was merged or removed already; call add_lora again")
            parametrizations: Any = site.module.parametrizations
            yield site.name, parametrizations[site.attribute][0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``("<site>:<target>.a", [rank, in])`` and ``("<site>:<target>.b", [out, rank])`` of every factor."""
        for name, low_rank in self._low_rank():
            for target in low_rank.a:
                yield f"{name}:{target}.a", low_rank.a[target]
                yield f"{name}:{target}.b", low_rank.b[target]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable factors: what an optimiser takes, with ``encoder.projection.parameters()``."""
        return (parameter for _, parameter in self.named_parameters())

    def _own_modules(self) -> dict[str, nn.Module]:
        """What is trained with the factors: the encoder's own projection and final norm."""
        modules = {name: getattr(self._encoder, name, None) for name in OWN_MODULES}
        return {name: module for name, module in modules.items() if module is not None}

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        for name, module in self._own_modules().items():
            tensors.update({f"{name}.{key}": value for key, value in module.state_dict().items()})
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """All that is trained: the factors, named as in ``named_parameters``, and the encoder's own projection
        ("projection.weight") and final norm."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies the tensors of ``state_dict`` in.

        Raises:
            ValueError: A missing or unknown key or a wrong shape; nothing has changed then.
        """
        own = self._tensors()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"state: {len(missing)} missing keys (first: {missing[:2]}) and {len(unknown)} unknown ones (first: "
                f"{unknown[:2]}); it must come from the same architecture and targets {self.targets}"
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"state: {name} must be {tuple(tensor.shape)}, got {tuple(state[name].shape)}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def merge(self) -> None:
        """Writes W + scale * B @ A into the base weights, bit for bit the weight in use before, and drops the factors.

        The state dict has its original keys again, in their order, and what ``add_lora`` froze may be trained again.
        """
        self._finish(keep=True)

    def remove(self) -> None:
        """Drops the factors: the model is bit for bit what it was before ``add_lora``."""
        self._finish(keep=False)

    def _finish(self, keep: bool) -> None:
        list(self._low_rank())
        for site in self._sites:
            parametrize.remove_parametrizations(site.module, site.attribute, leave_parametrized=keep)
        # torch appends a weight after the bias: an optimiser's state, kept by index, would not fit. In place, because
        # an encoder's view shares the dictionary.
        for site, order in zip(self._sites, self._orders, strict=True):
            parameters = site.module._parameters
            for name in order:
                parameters[name] = parameters.pop(name)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def _encoder_settings(self) -> dict[str, Any] | None:
        """What the tokens depend on, next to the weights; None for a LoRA on a plain model."""
        encoder = self._encoder
        return None if encoder is None else {"projection": encoder.projection_kind, "final_norm": encoder.norm_kind}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file that holds all that was trained: the factors and the encoder's own projection and norm.

        It is written in one step, as safetensors where that is installed, else by ``torch.save``. ``from_file`` and
        ``load`` read either.
        """
        settings = {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}
        lora_file.write(path, {**settings, "encoder": self._encoder_settings()}, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Copies a file's tensors into this LoRA and its encoder.

        Raises:
            ValueError: Rank, alpha, targets, sites or the encoder's projection and norm differ.
        """
        config, state = lora_file.read(path)
        own = {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}
        wrong = {k: (config[k], v) for k, v in own.items() if config[k] != v}
        if wrong:
            raise ValueError(
                f"{path}: saved with other settings (file, here): {wrong}; use LoRA.from_file(path, model)"
            )
        self._check_encoder(path, config, state)
        self.load_state_dict(state)

    def _check_encoder(self, path: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Raises ValueError where the tokens would not be those that were trained."""
        theirs, ours = config["encoder"], self._encoder_settings()
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(
                f"{path}: trained in an encoder of {theirs}, loaded into one of {ours}; build it with "
                f"PatchEncoder(model, **LoRA.encoder_options(path))"
            )
        held = {key.split(".")[0] for key in state if ":" not in key}
        here = set(self._own_modules())
        if held != here:
            raise ValueError(
                f"{path}: the file holds {sorted(held) or 'no projection'}, and the model here has "
                f"{sorted(here) or 'none'}; build it with PatchEncoder(model, **LoRA.encoder_options(path))"
            )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], model: nn.Module) -> LoRA:
        """``add_lora`` on ``model`` with the file's rank, alpha and targets, then its tensors.

        Args:
            path: A file of ``save``.
            model: The base model, or the ``PatchEncoder`` around it; see ``encoder_options``.

        Raises:
            ValueError: The model or the encoder is of another shape; ``model`` is then as it was.

        Example:
            >>> encoder = PatchEncoder.from_pretrained(name, **LoRA.encoder_options("lora.safetensors"))
            >>> lora = LoRA.from_file("lora.safetensors", encoder)
        """
        config, state = lora_file.read(path)
        lora = add_lora(model, config["rank"], config["alpha"], tuple(config["targets"]))
        try:
            lora._check_encoder(path, config, state)
            lora.load_state_dict(state)
        except ValueError:
            lora.remove()
            raise
        return lora

    @staticmethod
    def encoder_options(path: str | os.PathLike[str]) -> dict[str, Any]:
        """The arguments of ``PatchEncoder`` that a file was trained with: ``projection`` and ``final_norm``.

        Raises:
            ValueError: They were modules of the caller's own, which only the caller can build.
        """
        config, state = lora_file.read(path)
        settings = config["encoder"] or {"projection": None, "final_norm": "auto"}
        options = dict(settings)
        if settings["projection"] == "module":
            keys = [key for key in state if key.startswith("projection.")]
            if keys != ["projection.weight"] or state[keys[0]].ndim != 2:
                raise ValueError(
                    f"{path}: trained with a projection of its own, {keys}; build it yourself: "
                    f"PatchEncoder(model, projection=<that module>)"
                )
            options["projection"] = state[keys[0]].shape[0]
        if settings["final_norm"] == "module":
            raise ValueError(
                f"{path}: trained with a final norm of its own; build it yourself: "
                f"PatchEncoder(model, final_norm=<that module>)"
            )
        return options

    def __repr__(self) -> str:
        live = all(parametrize.is_parametrized(site.module, site.attribute) for site in self._sites)
        state = f"{sum(p.numel() for p in self.parameters())} parameters" if live else "merged or removed"
        settings = f"rank={self.rank}, alpha={self.alpha}, targets={self.targets}"
        return f"LoRA({len(self._sites)} weights, {settings}, {state})"


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16, targets: str | tuple[str, ...] = ("q", "v")) -> LoRA:
    """Adds trainable low-rank updates to W_Q and W_V of every attention in ``model``, in place, and freezes its own
    weights.

    Separate q/v linears, a fused qkv linear and ``nn.MultiheadAttention``'s in_proj_weight are all adapted. The weights
    in use are bit for bit unchanged until the first optimiser step (B starts at zero).

    Args:
        model: A module. Of a ``PatchEncoder``, only the tower that makes patch tokens is adapted (no text tower, pooler
            or head), and an own ``projection`` stays trainable. Of a ``Retriever``, only its vision tower (of NeoMME,
            which reads patches and words with one encoder, that).
        rank: Columns of B and rows of A; at most the smaller side of a weight.
        alpha: The update is scaled by alpha / rank.
        targets: Which of "q", "k", "v".

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A bad argument, a model that carries a LoRA already, quantised weights, or no attention found.
    """
    targets = _check(model, rank, alpha, targets)
    base: nn.Module = model
    search: nn.Module = model
    skipped: list[nn.Module] = []
    if isinstance(model, Retriever):
        base, search = model.model, model.vision_tower
        pools = [search._modules.get(name) for name in POOLS]
        skipped = [pool for pool in pools if pool is not None]
    elif isinstance(model, PatchEncoder):
        adapter = model.adapter
        base, search, skipped = model.model, adapter.tower, adapter.unused
        if not isinstance(base, nn.Module):
            raise TypeError("model: this PatchEncoder wraps a plain callable; pass the module inside it to add_lora")
    names = {id(module): name for name, module in base.named_modules()}
    ignored = {id(m) for part in skipped for m in part.modules()}
    sites = [
        Site(".".join(filter(None, (names[id(module)], path))), owner, attribute, served, blocks)
        for module in search.modules()
        if id(module) not in ignored
        for path, owner, attribute, served, blocks in _sites_of(module, targets)
    ]
    if not sites:
        raise ValueError(
            f"model: no attention with targets {targets} found in {type(base).__name__}: looked for fused '{FUSED}' "
            f"linears, '{IN_PROJ}', and linears named {[n for t in targets for n in SEPARATE[t]]}"
        )
    for site in sites:
        _check_site(site, rank)
    frozen = [p for p in base.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return LoRA(model, sites, rank, alpha, targets, frozen)


def _sites_of(
    module: nn.Module, targets: tuple[str, ...]
) -> Iterator[tuple[str, nn.Module, str, tuple[str, ...], int]]:
    """(path below ``module``, owner of the weight, its attribute, targets it serves, row blocks) of one attention."""
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
    found = {t: next((n for n in SEPARATE[t] if isinstance(children.get(n), nn.Linear)), None) for t in TARGETS}
    if found["q"] is None or found["v"] is None:
        return
    for target in targets:
        linear = found[target]
        if linear is not None:
            yield f"{linear}.weight", children[linear], "weight", (target,), 1


def _check(model: object, rank: int, alpha: float, targets: str | tuple[str, ...]) -> tuple[str, ...]:
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


def _check_site(site: Site, rank: int) -> None:
    name, blocks = site.name, site.blocks
    if parametrize.is_parametrized(site.module, site.attribute):
        raise ValueError(f"model: {name} is parametrised already (an earlier LoRA?); merge() or remove() that first")
    weight = getattr(site.module, site.attribute)
    if not weight.is_floating_point():
        raise ValueError(
            f"model: {name} holds {weight.dtype}; LoRA by weight needs floating-point weights, not quantised ones"
        )
    if weight.shape[0] % blocks:
        raise ValueError(f"model: {name} has {weight.shape[0]} rows, which do not split into q, k and v of equal size")
    smallest = min(weight.shape[0] // blocks, weight.shape[1])
    if rank > smallest:
        raise ValueError(f"rank must be at most {smallest} for {name} {tuple(weight.shape)}, got {rank}")
