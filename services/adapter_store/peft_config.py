"""adapter_config.json: what a PEFT LoRA asks for, or the name of what is not served.

Every field is read, known to have no effect on inference, or neutral. Anything else is refused by
name: a feature that is silently dropped is an adapter that silently does something else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.adapter_store.modules import EMBEDDING_PATH
from services.adapter_store.patterns import Pattern, check_cost, compile_pattern
from services.adapter_store.refusals import invalid, shown, unsupported
from services.adapter_store.strict_json import parse_object
from services.common.adapter_container import HEAD

FILE: Final = "adapter_config.json"
CONFIG_BYTES_MAX: Final = 2**20
LIST_ITEMS_MAX: Final = 4096
BASE_MODEL_CHARACTERS_MAX: Final = 512
PEFT_VERSION_CHARACTERS_MAX: Final = 64

# Read below.
_READ: Final = frozenset({
    "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "base_model_name_or_path", "init_lora_weights", "fan_in_fan_out", "peft_version",
})  # fmt: skip
# For training, or for a feature whose own switch is checked.
_NO_EFFECT: Final = frozenset({
    "lora_dropout", "inference_mode", "revision", "auto_mapping", "megatron_core",
    "qalora_group_size", "eva_config",
})  # fmt: skip
# Other initialisations change the base model's own weights, so B·A alone is not the adapter.
_PLAIN_INITIALISATIONS: Final = (True, False, None, "gaussian", "orthogonal", "eva")
_OUTSIDE_LAYERS: Final = (EMBEDDING_PATH, HEAD)
_ALL_LINEAR: Final = "all-linear"  # in upper or lower case
_ANY_LAYERS: Final = r".*?\.[^.]*\.(?P<idx>\d+)\."
# From this many names on PEFT shortens whole paths, and `layers_to_transform` applies to them.
_SHORTENED_NAMES: Final = 20


@dataclass(frozen=True, slots=True)
class Targets:
    """Which modules an adapter has, by full path. Patterns match as PEFT matches them."""

    names: tuple[str, ...] | Pattern | None  # None: every linear of every layer
    excluded: tuple[str, ...] | Pattern
    layers: frozenset[int] | None
    layer_patterns: tuple[Pattern, ...]

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """All that a path may be matched with."""
        named = (self.names, self.excluded)
        return (*(p for p in named if isinstance(p, Pattern)), *self.layer_patterns)

    def include(self, path: str) -> bool:
        """Whether the module at `path`, for example "model.layers.0.mlp.up_proj", has LoRA."""
        if _matches(self.excluded, path):
            return False
        if self.names is None:
            return path not in _OUTSIDE_LAYERS
        if isinstance(self.names, tuple) and path in self.names:
            return True  # a whole path is meant, whatever layers are
        return _matches(self.names, path) and self._in_layers(path)

    def _in_layers(self, path: str) -> bool:
        if self.layers is None:
            return True
        matches = (pattern.regex.match(path) for pattern in self.layer_patterns)
        found = next((match for match in matches if match is not None), None)
        # An alternative of the pattern may have matched that has no number.
        number = None if found is None else found["idx"]
        return number is not None and int(number) in self.layers


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of a config that decides the arithmetic."""

    rank: int
    alpha: float
    ranks: tuple[tuple[Pattern, int], ...]
    alphas: tuple[tuple[Pattern, float], ...]
    use_rslora: bool
    targets: Targets
    base_model: str
    peft_version: str

    def rank_of(self, path: str) -> int:
        """Rank of a module."""
        return next((rank for pattern, rank in self.ranks if pattern.regex.match(path)), self.rank)

    def scale_of(self, path: str, *, rank: int) -> float:
        """What B·A·x of a module of this rank is multiplied by."""
        alpha = next((a for pattern, a in self.alphas if pattern.regex.match(path)), self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(data: bytes, *, rank_max: int) -> LoraConfig:
    """Read adapter_config.json. Raises ADAPTER_INVALID and ADAPTER_UNSUPPORTED."""
    fields = parse_object(data, file=FILE)
    _refuse_features(fields)
    _flag(fields, "fan_in_fan_out")  # PEFT takes true for false where the module is an nn.Linear
    ranks = tuple(
        (pattern, _rank(value, field="rank_pattern", rank_max=rank_max))
        for pattern, value in _pattern_map(fields, "rank_pattern")
    )
    alphas = tuple(
        (pattern, _alpha(value, field="alpha_pattern"))
        for pattern, value in _pattern_map(fields, "alpha_pattern")
    )
    targets = _targets(fields)
    patterns = (*targets.patterns, *(p for p, _ in ranks), *(p for p, _ in alphas))
    check_cost(*patterns, field=FILE)
    return LoraConfig(
        rank=_rank(fields.get("r"), field="r", rank_max=rank_max),
        alpha=_alpha(fields.get("lora_alpha"), field="lora_alpha"),
        ranks=ranks,
        alphas=alphas,
        use_rslora=_flag(fields, "use_rslora"),
        targets=targets,
        base_model=_text(fields, "base_model_name_or_path", BASE_MODEL_CHARACTERS_MAX),
        peft_version=_text(fields, "peft_version", PEFT_VERSION_CHARACTERS_MAX),
    )


def _refuse_features(fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise unsupported(
            f"peft_type {shown(fields.get('peft_type'))} is not served; LORA is", field="peft_type"
        )
    if fields.get("bias", "none") != "none":
        raise unsupported(f"bias {shown(fields['bias'])} is not served", field="bias")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise unsupported(
            f"task_type {shown(fields['task_type'])} is not served", field="task_type"
        )
    initialisation = fields.get("init_lora_weights")
    if not any(
        initialisation is plain or initialisation == plain for plain in _PLAIN_INITIALISATIONS
    ):
        raise unsupported(
            f"init_lora_weights {shown(initialisation)} changes the base model's weights; "
            "convert the adapter to plain LoRA when saving it",
            field="init_lora_weights",
        )
    for name, value in fields.items():
        if name not in _READ and name not in _NO_EFFECT and not _is_neutral(value):
            raise unsupported(f"{shown(name)} is not served", field=shown(name))


def _is_neutral(value: Any) -> bool:
    """Absent in effect. A dictionary of absent values is how PEFT writes an unused sub-config."""
    values = value.values() if isinstance(value, dict) else (value,)
    return all(item is None or item is False or item in ("", [], {}) for item in values)


def _rank(value: Any, *, field: str, rank_max: int) -> int:
    if type(value) is not int or value < 1:
        raise invalid(
            f"{field}: a rank must be an integer of 1 and up: {shown(value)}", field=field
        )
    if value > rank_max:
        raise unsupported(f"{field}: rank {shown(value)} is over the limit {rank_max}", field=field)
    return value


def _alpha(value: Any, *, field: str) -> float:
    is_number = type(value) is int or type(value) is float
    if not is_number or not 0 < value <= 2**53:  # false for NaN as well
        raise invalid(f"{field}: alpha must be more than 0: {shown(value)}", field=field)
    return float(value)


def _flag(fields: Mapping[str, Any], field: str) -> bool:
    value = fields.get(field, False)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{field}: must be true or false: {shown(value)}", field=field)
    return bool(value)


def _pattern_map(fields: Mapping[str, Any], field: str) -> list[tuple[Pattern, Any]]:
    """Keys match the end of a module's path, from a dot on; the first that matches decides."""
    values = fields.get(field) or {}
    if not isinstance(values, dict) or len(values) > LIST_ITEMS_MAX:
        raise invalid(f"{field}: must be an object of at most {LIST_ITEMS_MAX} keys", field=field)
    return [
        (compile_pattern(key, field=field, wrap=(r"(?:.*\.)?(?:", ")$")), value)
        for key, value in values.items()
    ]


def _targets(fields: Mapping[str, Any]) -> Targets:
    names = _module_names(fields, "target_modules")
    if names is None or names == ():
        raise invalid("target_modules: names no module", field="target_modules")
    is_all = isinstance(names, str) and names.lower() == _ALL_LINEAR
    return Targets(
        names=None if is_all else _pattern_or_names(names, "target_modules"),
        excluded=_pattern_or_names(
            _module_names(fields, "exclude_modules") or (), "exclude_modules"
        ),
        layers=_layers(fields, names),
        layer_patterns=_layer_patterns(fields.get("layers_pattern")),
    )


def _module_names(fields: Mapping[str, Any], field: str) -> tuple[str, ...] | str | None:
    value = fields.get(field)
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, list) or len(value) > LIST_ITEMS_MAX:
        raise invalid(f"{field}: must be text or a list of at most {LIST_ITEMS_MAX}", field=field)
    if not all(isinstance(item, str) and item for item in value):
        raise invalid(f"{field}: must be a list of module names", field=field)
    return tuple(value)


def _pattern_or_names(names: tuple[str, ...] | str, field: str) -> tuple[str, ...] | Pattern:
    if isinstance(names, tuple):
        return names
    return compile_pattern(names, field=field, wrap=("(?:", r")\Z"))


def _matches(names: Sequence[str] | Pattern, path: str) -> bool:
    if isinstance(names, Pattern):
        return names.regex.match(path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _layers(fields: Mapping[str, Any], names: tuple[str, ...] | str) -> frozenset[int] | None:
    field = "layers_to_transform"
    value = fields.get(field)
    items = value if isinstance(value, list) else [] if value is None else [value]
    if len(items) > LIST_ITEMS_MAX or not all(type(item) is int and item >= 0 for item in items):
        raise invalid(f"{field}: must be layer numbers: {shown(value)}", field=field)
    if items and isinstance(names, str):
        raise invalid(f"{field}: needs target_modules to be a list", field=field)
    if items and len(names) >= _SHORTENED_NAMES:
        raise unsupported(
            f"{field}: with {_SHORTENED_NAMES} and more target_modules is not served", field=field
        )
    if not items and fields.get("layers_pattern"):
        raise invalid("layers_pattern: needs layers_to_transform", field="layers_pattern")
    return frozenset(items) or None


def _layer_patterns(value: Any) -> tuple[Pattern, ...]:
    field = "layers_pattern"
    items = value if isinstance(value, list) else [value] if value else []
    if len(items) > LIST_ITEMS_MAX or not all(isinstance(item, str) for item in items):
        raise invalid(f"{field}: must be text or a list of text", field=field)
    if not items:
        return (compile_pattern(_ANY_LAYERS, field=field),)
    # Without a group around it, as PEFT has it: alternatives reach to the ends.
    return tuple(
        compile_pattern(item, field=field, wrap=(r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\."))
        for item in items
    )


def _text(fields: Mapping[str, Any], field: str, characters_max: int) -> str:
    value = fields.get(field)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > characters_max:
        raise invalid(
            f"{field}: must be text of at most {characters_max} characters: {shown(value)}",
            field=field,
        )
    if not value.isprintable():  # lone surrogates have no UTF-8 form
        raise invalid(f"{field}: must be printable: {shown(value)}", field=field)
    return value
