"""Tensor rules: one declarative table that import, export, verification and direct loading all read.

A `Rule` says which upstream tensors make one of ours, on which layers it exists, how wide it is in terms of the config, and
how the release stores it. A `Family` is a table of rules with the dimensions they speak of; another upstream layout is another
`Family`, the code here does not change. `bind` fills the placeholders in for one config; what it returns, `Binding`s, lists
every tensor that must exist, with dtype and shape.

Placeholders in names: `{layer}`; for experts which we keep stacked in one tensor, `{expert}`; upstream, for what the last draft
layer holds for all of them, `{last_draft}`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ..safetensors_engram import TensorSpan
from .number_formats import Storage
from .safetensors_files import ConversionError, enumerate_names

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and the upstream tensors it is made of.

    Args:
        ours: our name of the weight.
        upstream: upstream names of the weight's parts. Several parts stand one after another in rows; if the names hold
            `{expert}`, each expert's parts are joined like that and the experts stacked in front.
        shape: dimensions of *one* part, as names the family's geometry knows.
        storage: how the release stores a part; a quantized weight has a scale beside it.
        where: name of the set of layers that have it, as the family's geometry knows it.
        file: `"model"`; `"draft"` for draft layers and `"table"` for memory tables, which get files of their own.
        experts: the dimension that counts experts, for names that hold `{expert}`.
    """

    ours: str
    upstream: tuple[str, ...]
    shape: tuple[str, ...]
    storage: Storage
    where: str = "layers"
    file: str = "model"
    experts: str = "n_routed_experts"

    @property
    def is_stacked(self) -> bool:
        return "{expert}" in self.upstream[0]

    @property
    def ours_scale(self) -> str | None:
        """Our name of the scale: what transformers' FP8 modules call it; a table keeps a `scale` beside its `weight`."""
        if self.storage.block is None:
            return None
        return self.ours.removesuffix("weight") + "scale" if self.file == "table" else f"{self.ours}_scale_inv"


@dataclass(frozen=True)
class Geometry:
    """What a config means for a table: sizes of named dimensions (a list: one per entry of `engram` layers) and layer sets."""

    dimensions: Mapping[str, int | Mapping[int, int]]
    layer_sets: Mapping[str, tuple[int, ...]]

    def size(self, name: str, layer: int | None) -> int:
        value = self.dimensions[name]
        return value[layer] if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Family:
    """An upstream checkpoint layout.

    Args:
        name: `model_type` of the upstream config.
        rules: the table.
        carried: prefixes of upstream names that the model may not use; those without a rule are kept byte for byte.
        geometry: computes the `Geometry` of an upstream config.
    """

    name: str
    rules: tuple[Rule, ...]
    carried: tuple[str, ...]
    geometry: Callable[[Mapping], Geometry] = field(repr=False)

    def may_carry(self, name: str) -> bool:
        """Whether a tensor without a rule of its own is kept as it is."""
        return name.startswith(self.carried)


@dataclass(frozen=True, slots=True)
class UpstreamTensor:
    """One upstream tensor as the table expects it: of ours, the `part`-th of equal runs of rows, after `expert` is chosen."""

    name: str
    dtype: str
    shape: Shape
    expert: int | None
    part: int
    is_scale: bool
    storage: Storage

    def matches(self, span: TensorSpan) -> bool:
        """Whether a tensor found under this name is the one that is expected."""
        takes = span.dtype == self.dtype if self.is_scale else self.storage.takes(span.dtype)
        return takes and span.shape == self.shape


@dataclass(frozen=True, slots=True)
class Binding:
    """A rule on one layer: our tensor, and its upstream weights and scales in the order of ours' bytes."""

    rule: Rule
    layer: int | None
    ours: str
    ours_scale: str | None
    part_shape: Shape
    shape: Shape
    weights: tuple[UpstreamTensor, ...]
    scales: tuple[UpstreamTensor, ...]

    @property
    def upstream(self) -> tuple[UpstreamTensor, ...]:
        return self.weights + self.scales


def bind(family: Family, config: Mapping) -> list[Binding]:
    """All tensors that a checkpoint with this upstream config has, in the order of layers and of the table.

    A rule for no layer in particular holds where its set of layers is not empty.
    """
    geometry = family.geometry(config)
    flat = [
        _bind_one(rule, geometry, None)
        for rule in family.rules
        if "{layer}" not in rule.ours and geometry.layer_sets[rule.where]
    ]
    layered = [rule for rule in family.rules if "{layer}" in rule.ours]
    for layer in sorted({layer for layers in geometry.layer_sets.values() for layer in layers}):
        flat += [_bind_one(rule, geometry, layer) for rule in layered if layer in geometry.layer_sets[rule.where]]
    return flat


def _bind_one(rule: Rule, geometry: Geometry, layer: int | None) -> Binding:
    part_shape = tuple(geometry.size(name, layer) for name in rule.shape)
    experts = range(geometry.size(rule.experts, layer)) if rule.is_stacked else [None]
    shape = (part_shape[0] * len(rule.upstream), *part_shape[1:])
    weights, scales = [], []
    for expert in experts:
        for index, pattern in enumerate(rule.upstream):
            last = max(geometry.layer_sets["drafts"], default=None)
            name = pattern.format(layer=layer, expert=expert, last_draft=last)
            place, storage = (expert, index), rule.storage
            weights.append(
                UpstreamTensor(name, storage.dtype, storage.weight_shape(part_shape), *place, False, storage)
            )
            if storage.block:
                scale_shape = storage.scale_shape(part_shape)
                scales.append(UpstreamTensor(scale_name(name), "F8_E8M0", scale_shape, *place, True, storage))
    return Binding(
        rule,
        layer,
        rule.ours.format(layer=layer),
        rule.ours_scale and rule.ours_scale.format(layer=layer),
        part_shape,
        (len(experts), *shape) if rule.is_stacked else shape,
        tuple(weights),
        tuple(scales),
    )


def scale_name(weight_name: str) -> str:
    """The upstream name of a quantized weight's scale."""
    return weight_name.removesuffix("weight") + "scale"


def check_tensors(
    family: Family,
    bindings: list[Binding],
    tensors: Mapping[str, TensorSpan],
    elsewhere: frozenset[str] = frozenset(),
) -> None:
    """Check that the tensors are exactly those the table asks for, in dtype and shape, plus well-formed carried ones.

    Args:
        elsewhere: tensors in shards that were not read, of which the index tells the names alone.
    """
    _check_scales_and_weights(tensors, elsewhere)
    expected = {tensor.name: tensor for binding in bindings for tensor in binding.upstream}
    unknown = [name for name in (*tensors, *elsewhere) if name not in expected and not family.may_carry(name)]
    if unknown:
        raise ConversionError(
            f"the checkpoint holds {enumerate_names(unknown)}, which a {family.name} with this config does not have; "
            f"is the config.json that of these weights?"
        )
    missing = expected.keys() - tensors.keys() - elsewhere
    if missing:
        raise ConversionError(
            f"the checkpoint lacks {enumerate_names(missing)}, which its config asks for; fetch it again, or correct the config."
        )
    for name, tensor in expected.items():
        if name in tensors:
            _check_tensor(tensor, tensors[name])


def _check_tensor(expected: UpstreamTensor, found: TensorSpan) -> None:
    if not expected.matches(found):
        raise ConversionError(
            f"tensor {found.name!r} of {found.path} is {found.dtype} {list(found.shape)}, the config asks for "
            f"{expected.dtype} {list(expected.shape)}; fetch the file again, or correct the config."
        )


def _check_scales_and_weights(tensors: Mapping[str, TensorSpan], elsewhere: frozenset[str]) -> None:
    """A scale has its weight and a quantized weight its scale: among carried tensors too, which no table describes."""
    present = tensors.keys() | elsewhere
    known = {"BF16", "F32", "F8_E4M3", "F8_E8M0", "I8"}
    for name, span in tensors.items():
        if span.dtype not in known:
            raise ConversionError(f"tensor {name!r} of {span.path} is {span.dtype}, expected one of {sorted(known)}.")
        if span.dtype in ("F8_E4M3", "I8") and scale_name(name) not in present:
            raise ConversionError(
                f"tensor {name!r} of {span.path} is quantized, but its scale {scale_name(name)!r} is missing; fetch it again."
            )
        if span.dtype == "F8_E8M0" and name.removesuffix("scale") + "weight" not in present:
            raise ConversionError(
                f"tensor {name!r} of {span.path} is a scale, but its weight is missing; fetch it again."
            )


_LINEAR = ("_proj.weight", "head.weight", "patch_embedding.weight", "linear_1.weight", "linear_2.weight")


def unquantized_modules(family: Family) -> list[str]:
    """Names, relative to a decoder layer or the model, of linear modules the release keeps in full precision.

    transformers' FP8 quantizer replaces every other linear module.
    """
    names = (rule.ours.split("{layer}.")[-1] for rule in family.rules if rule.storage.block is None)
    return sorted({name.removesuffix(".weight") for name in names if name.endswith(_LINEAR)})


def iterate_upstream(bindings: list[Binding]) -> Iterator[tuple[Binding, UpstreamTensor]]:
    """Every upstream tensor with the binding it belongs to."""
    for binding in bindings:
        for tensor in binding.upstream:
            yield binding, tensor
