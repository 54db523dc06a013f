"""Tensor rules: one declarative table that import, export, verification and direct loading all read.

A `Rule` gives the upstream tensors of one of ours, the layers that have it, its shape in terms of the config, and its storage
in the release. A `Layout` is a table of rules with the dimensions that they name. Another upstream layout is another
`Layout`; the code here does not change. `map_tensors` fills in the placeholders for one config; the `TensorMapping`s that it
returns list every tensor that must exist, with dtype and shape.

Names have the placeholders `{layer}`; `{expert}`, for experts that are stacked in one tensor of ours; and `{last_draft}`,
for upstream tensors that the last draft layer holds for all draft layers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ..safetensors_engram import TensorSpan
from .safetensors_files import ConversionError, enumerate_names
from .storage import Storage

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """A tensor of this package and the upstream tensors that give it.

    Args:
        ours: our name of the weight.
        upstream: upstream names of the weight's parts. The rows of several parts follow one another; if the names hold
            `{expert}`, each expert's parts are joined like that and the experts stacked in front.
        shape: dimensions of *one* part, as names that the layout's `dimensions` know.
        storage: how the release stores a part; a quantized weight has a scale beside it.
        where: name of the set of layers that have it, as the layout's `dimensions` know it.
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
        """Our name of the scale, the one in transformers' FP8 modules; a table keeps a `scale` beside its `weight`."""
        if self.storage.block is None:
            return None
        return self.ours.removesuffix("weight") + "scale" if self.file == "table" else f"{self.ours}_scale_inv"


@dataclass(frozen=True)
class Dimensions:
    """The dimensions of a config: sizes by name (a list has one entry per Engram layer) and layer sets."""

    sizes: Mapping[str, int | Mapping[int, int]]
    layer_sets: Mapping[str, tuple[int, ...]]

    def size(self, name: str, layer: int | None) -> int:
        value = self.sizes[name]
        return value[layer] if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Layout:
    """An upstream checkpoint layout.

    Args:
        name: `model_type` of the upstream config.
        rules: the table.
        passed_through: prefixes of upstream names that the model may not use; those without a rule are kept byte for byte.
        dimensions: computes the `Dimensions` of an upstream config.
    """

    name: str
    rules: tuple[Rule, ...]
    passed_through: tuple[str, ...]
    dimensions: Callable[[Mapping], Dimensions] = field(repr=False)

    def may_pass_through(self, name: str) -> bool:
        """Return whether a tensor without a rule is kept unchanged."""
        return name.startswith(self.passed_through)


@dataclass(frozen=True, slots=True)
class UpstreamTensor:
    """An upstream tensor that the table expects: the `part`-th of equal runs of rows of our tensor, in its `expert`."""

    name: str
    dtype: str
    shape: Shape
    expert: int | None
    part: int
    is_scale: bool
    storage: Storage

    def matches(self, span: TensorSpan) -> bool:
        """Return whether a tensor with this name has the expected dtype and shape."""
        takes = span.dtype == self.dtype if self.is_scale else self.storage.takes(span.dtype)
        return takes and span.shape == self.shape


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """A rule on one layer: our tensor, and its upstream weights and scales in the order of our bytes."""

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


def map_tensors(layout: Layout, config: Mapping) -> list[TensorMapping]:
    """Return all tensors of a checkpoint with this upstream config, in the order of layers and of the table.

    A rule that names no layer applies if its set of layers is not empty.
    """
    dimensions = layout.dimensions(config)
    flat = [
        _map_one(rule, dimensions, None)
        for rule in layout.rules
        if "{layer}" not in rule.ours and dimensions.layer_sets[rule.where]
    ]
    layered = [rule for rule in layout.rules if "{layer}" in rule.ours]
    for layer in sorted({layer for layers in dimensions.layer_sets.values() for layer in layers}):
        flat += [_map_one(rule, dimensions, layer) for rule in layered if layer in dimensions.layer_sets[rule.where]]
    return flat


def _map_one(rule: Rule, dimensions: Dimensions, layer: int | None) -> TensorMapping:
    part_shape = tuple(dimensions.size(name, layer) for name in rule.shape)
    experts = range(dimensions.size(rule.experts, layer)) if rule.is_stacked else [None]
    shape = (part_shape[0] * len(rule.upstream), *part_shape[1:])
    weights, scales = [], []
    for expert in experts:
        for index, pattern in enumerate(rule.upstream):
            last = max(dimensions.layer_sets["drafts"], default=None)
            name = pattern.format(layer=layer, expert=expert, last_draft=last)
            place, storage = (expert, index), rule.storage
            weights.append(
                UpstreamTensor(name, storage.dtype, storage.weight_shape(part_shape), *place, False, storage)
            )
            if storage.block:
                scale_shape = storage.scale_shape(part_shape)
                scales.append(UpstreamTensor(scale_name(name), "F8_E8M0", scale_shape, *place, True, storage))
    return TensorMapping(
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
    """Return the upstream name of a quantized weight's scale."""
    return weight_name.removesuffix("weight") + "scale"


def check_tensors(
    layout: Layout,
    mappings: list[TensorMapping],
    tensors: Mapping[str, TensorSpan],
    elsewhere: frozenset[str] = frozenset(),
) -> None:
    """Check that the tensors are exactly those of the table, in dtype and shape, plus well-formed passed-through ones.

    Args:
        elsewhere: names of tensors in shards that were not read.
    """
    _check_scales_and_weights(tensors, elsewhere)
    expected = {tensor.name: tensor for mapping in mappings for tensor in mapping.upstream}
    unknown = [name for name in (*tensors, *elsewhere) if name not in expected and not layout.may_pass_through(name)]
    if unknown:
        raise ConversionError(
            f"The checkpoint holds {enumerate_names(unknown)}, which a {layout.name} with this config does not have; "
            f"is the config.json that of these weights?"
        )
    missing = expected.keys() - tensors.keys() - elsewhere
    if missing:
        raise ConversionError(
            f"The checkpoint lacks {enumerate_names(missing)}, which its config asks for; fetch it again, or correct the config."
        )
    for name, tensor in expected.items():
        if name in tensors:
            _check_tensor(tensor, tensors[name])


def _check_tensor(expected: UpstreamTensor, found: TensorSpan) -> None:
    if not expected.matches(found):
        raise ConversionError(
            f"Tensor {found.name!r} of {found.path} is {found.dtype} {list(found.shape)}, but the config asks for "
            f"{expected.dtype} {list(expected.shape)}; fetch the file again, or correct the config."
        )


def _check_scales_and_weights(tensors: Mapping[str, TensorSpan], elsewhere: frozenset[str]) -> None:
    """Check that each scale has its weight and each quantized weight its scale, also among passed-through tensors,
    which have no table.
    """
    present = tensors.keys() | elsewhere
    known = {"BF16", "F32", "F8_E4M3", "F8_E8M0", "I8"}
    for name, span in tensors.items():
        if span.dtype not in known:
            raise ConversionError(
                f"Tensor {name!r} of {span.path} is {span.dtype}, expected one of {sorted(known)}; fetch it again."
            )
        if span.dtype in ("F8_E4M3", "I8") and scale_name(name) not in present:
            raise ConversionError(
                f"Tensor {name!r} of {span.path} is quantized, but its scale {scale_name(name)!r} is missing; fetch it again."
            )
        if span.dtype == "F8_E8M0" and name.removesuffix("scale") + "weight" not in present:
            raise ConversionError(
                f"Tensor {name!r} of {span.path} is a scale, but its weight is missing; fetch it again."
            )


_LINEAR = ("_proj.weight", "head.weight", "patch_embedding.weight", "linear_1.weight", "linear_2.weight")


def unquantized_modules(layout: Layout) -> list[str]:
    """Return names, relative to a decoder layer or the model, of linear modules that the release keeps in full
    precision.

    transformers' FP8 quantizer replaces every other linear module.
    """
    names = (rule.ours.split("{layer}.")[-1] for rule in layout.rules if rule.storage.block is None)
    return sorted({name.removesuffix(".weight") for name in names if name.endswith(_LINEAR)})


def iterate_upstream(mappings: list[TensorMapping]) -> Iterator[tuple[TensorMapping, UpstreamTensor]]:
    """Yield every upstream tensor with the mapping it belongs to."""
    for mapping in mappings:
        for tensor in mapping.upstream:
            yield mapping, tensor
