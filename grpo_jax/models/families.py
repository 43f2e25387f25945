"""Hugging Face's config.json <-> TransformerConfig, for the families that the decoder covers.

`parse_config` reads the old spellings (`rope_theta`, `rope_scaling`, `rope_local_base_freq`,
`sliding_window_pattern`) and the new (`rope_parameters`, `layer_types`), with the defaults that the classes of
`transformers` have; what it does not know how to compute is refused by name and never ignored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.models.transformer import TransformerConfig

__all__ = ["PretrainedError", "as_score", "differences", "parse_config", "write_config"]

Raw = Mapping[str, Any]


class PretrainedError(ValueError):
    """A Hugging Face directory that cannot be read, or written, as asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What the models of an architecture have in common."""

    architecture: str  # that of a language model
    score: str  # that of a reward model: a linear layer of one output, and no bias, in the head's place
    fixed: Mapping[str, Any]  # fields of TransformerConfig
    defaults: Mapping[str, Any]  # entries of config.json, where they are not the ones below


_DEFAULTS = {
    "tie_word_embeddings": False, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "use_bidirectional_attention": False, "partial_rotary_factor": 1.0,
    "quantization_config": None,
}  # fmt: skip
_GEMMA = {"scale_embedding": True, "post_norms": True, "unit_offset": True}
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
FAMILIES = {
    "llama": _Family(
        architecture="LlamaForCausalLM",
        score="LlamaForSequenceClassification",
        fixed={"scale_embedding": False},
        defaults={},
    ),
    "qwen2": _Family(
        architecture="Qwen2ForCausalLM",
        score="Qwen2ForSequenceClassification",
        fixed={"scale_embedding": False, "qkv_bias": True},
        defaults={},
    ),
    "qwen3": _Family(
        architecture="Qwen3ForCausalLM",
        score="Qwen3ForSequenceClassification",
        fixed={"scale_embedding": False, "qk_norm": True},
        defaults={"head_dim": 128},
    ),
    "gemma2": _Family(
        architecture="Gemma2ForCausalLM",
        score="Gemma2ForSequenceClassification",
        fixed=_GEMMA,
        defaults={
            **_GEMMA_DEFAULTS, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": _Family(
        architecture="Gemma3ForCausalLM",
        score="Gemma3TextForSequenceClassification",
        fixed={**_GEMMA, "qk_norm": True},
        defaults={
            **_GEMMA_DEFAULTS, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 10_000.0,
        },
    ),
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _family(raw: Raw) -> tuple[str, bool]:
    """Of which family it is, and whether it is a reward model."""
    architectures = raw.get("architectures") or []
    for name, family in FAMILIES.items():
        if family.score in architectures:
            return name, True
        if family.architecture in architectures or (not architectures and raw.get("model_type") == name):
            return name, False
    known = ", ".join(f"{family.architecture} and {family.score} ({name})" for name, family in FAMILIES.items())
    raise PretrainedError(
        f"architectures={architectures} of model_type={raw.get('model_type')!r} is not among those that there are: "
        f"{known}."
    )


def parse_config(raw: Raw) -> TransformerConfig:
    """config.json as a TransformerConfig.

    Raises:
      PretrainedError: another architecture, a size that is missing, or a feature that the decoder lacks.
    """
    name, score = _family(raw)
    family = FAMILIES[name]
    if score and (labels := _labels(raw)) != 1:
        raise PretrainedError(
            f"num_labels={labels}: a reward model has one output, and this is a classifier. (transformers counts "
            "id2label, and takes 2 where there is none: save the model with num_labels=1.)"
        )
    defaults: dict[str, Any] = {**_DEFAULTS, **family.defaults}

    def get(key: str) -> Any:  # null means the default, but for what may be off
        return raw[key] if raw.get(key) is not None else defaults.get(key)

    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if absent := [key for key in required if not isinstance(raw.get(key), int)]:
        raise PretrainedError(f"{', '.join(absent)} missing: expected whole numbers.")
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config"):
        if get(key):
            raise PretrainedError(f"{key}={get(key)!r} is not supported by this decoder.")
    if not isinstance(get("tie_word_embeddings"), bool):
        raise PretrainedError(f"tie_word_embeddings={get('tie_word_embeddings')!r} must be true or false.")
    query_scale = get("query_pre_attn_scalar") or 0
    if not isinstance(query_scale, int | float) or query_scale % 1:
        raise PretrainedError(f"query_pre_attn_scalar={query_scale!r} must be a whole number.")
    gemma = "hidden_activation" in family.defaults
    activation = get("hidden_activation") if gemma else get("hidden_act")
    if activation not in _ACTIVATIONS.values():
        raise PretrainedError(f"activation {activation!r} is not supported: {sorted(_ACTIVATIONS.values())} are.")
    # A cap that is null is off where it is written so, and the family's where it is not written.
    cap = lambda key: float((raw[key] if key in raw else get(key)) or 0)
    if name == "gemma3_text" and cap("attn_logit_softcapping"):
        raise PretrainedError("attn_logit_softcapping is not supported for gemma3_text: transformers ignores it there.")
    heads = raw["num_attention_heads"]
    try:
        return TransformerConfig(
            vocab_size=raw["vocab_size"],
            layers=raw["num_hidden_layers"],
            width=raw["hidden_size"],
            heads=heads,
            kv_heads=get("num_key_value_heads") or heads,
            head_width=get("head_dim") or raw["hidden_size"] // heads,
            mlp_width=raw["intermediate_size"],
            norm_epsilon=float(get("rms_norm_eps")),
            tied=get("tie_word_embeddings"),
            score=score,
            activation=next(ours for ours, theirs in _ACTIVATIONS.items() if theirs == activation),
            query_scale=int(query_scale),
            attention_cap=cap("attn_logit_softcapping"),
            logit_cap=cap("final_logit_softcapping"),
            windows=_windows(raw, get, gemma),
            **_rope(raw, get, name),
            **family.fixed,
        )
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, PretrainedError) else PretrainedError(str(error)) from error


def _labels(raw: Raw) -> int:
    """Outputs of a classifier, as transformers counts them."""
    return len(raw["id2label"]) if raw.get("id2label") is not None else raw.get("num_labels", 2)


def as_score(raw: Raw) -> dict[str, Any]:
    """config.json of a language model as that of the reward model which has its layers."""
    name, _ = _family(raw)
    return {**raw, "architectures": [FAMILIES[name].score], "model_type": name, **_ONE_LABEL}


def _windows(raw: Raw, get: Callable[[str], Any], gemma: bool) -> tuple[int, ...]:
    """The shortest pattern whose repetition gives each layer's window."""
    layers, window = raw["num_hidden_layers"], get("sliding_window")
    if not window or not (gemma or raw.get("use_sliding_window")):
        return (0,)
    types = raw.get("layer_types")
    if types is None and gemma:
        types = [_FULL if (i + 1) % get("sliding_window_pattern") == 0 else _SLIDING for i in range(layers)]
    elif types is None:
        types = [_SLIDING if i >= raw.get("max_window_layers", 28) else _FULL for i in range(layers)]
    if len(types) != layers or not {_FULL, _SLIDING}.issuperset(types):
        raise PretrainedError(f"layer_types={types} must name {_FULL} or {_SLIDING} for each of {layers} layers.")
    each = [window if kind == _SLIDING else 0 for kind in types]
    return next(tuple(each[:n]) for n in range(1, layers + 1) if all(each[i] == each[i % n] for i in range(layers)))


def _rope(raw: Raw, get: Callable[[str], Any], name: str) -> dict[str, Any]:
    """Rotary positions, old spelling or new."""
    nested = raw.get("rope_parameters") or {}
    by_kind = _FULL in nested or _SLIDING in nested
    full = dict((nested.get(_FULL) or {}) if by_kind else nested) or dict(raw.get("rope_scaling") or {})
    kind = full.get("rope_type") or full.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise PretrainedError(f"rope_type={kind!r} is not supported: default, linear and llama3 are.")
    if float(full.get("partial_rotary_factor") or get("partial_rotary_factor")) != 1:
        raise PretrainedError("partial_rotary_factor other than 1 is not supported.")
    rope = {"rope_base": float(full.get("rope_theta") or get("rope_theta"))}
    try:
        if kind != "default":
            rope["rope_factor"] = float(full["factor"])
        if kind == "llama3":
            rope |= {
                "rope_low_factor": float(full["low_freq_factor"]),
                "rope_high_factor": float(full["high_freq_factor"]),
                "rope_length": int(full["original_max_position_embeddings"]),
            }
    except KeyError as error:
        raise PretrainedError(f"rope_type={kind!r} needs {error}, which is missing from {full}.") from None
    if name == "gemma3_text":
        local = (nested.get(_SLIDING) or {}) if by_kind else {}
        if local.get("rope_type", "default") != "default":
            raise PretrainedError(f"rope_type={local['rope_type']!r} of {_SLIDING} is not supported: default is.")
        rope["window_rope_base"] = float(local.get("rope_theta") or get("rope_local_base_freq"))
    elif by_kind and nested.get(_SLIDING) not in (None, nested.get(_FULL)):
        raise PretrainedError(f"rope_parameters of {_SLIDING} that differ from {_FULL} are not supported in {name}.")
    return rope


def differences(ours: TransformerConfig, theirs: TransformerConfig) -> list[str]:
    """In what two configurations are not the same model; how it runs, and how its windows are written, do not count."""

    def model(config: TransformerConfig) -> dict[str, Any]:
        fields = dataclasses.asdict(config)
        for name in ("compute_dtype", "sampler_dtype", "attention", "remat"):
            del fields[name]
        windows = tuple(config.windows[i % len(config.windows)] for i in range(config.layers))
        return {**fields, "windows": windows, "query_scale": config.query_scale or config.head_width}

    here, there = model(ours), model(theirs)
    return [f"{name}: here {here[name]!r}, there {there[name]!r}" for name in here if here[name] != there[name]]


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """config.json of the family that has such models, in the new spelling and, beside it, the old.

    Raises:
      PretrainedError: no family has.
    """
    for name in FAMILIES:
        raw = _write(config, name)
        try:
            again = parse_config(raw)
        except PretrainedError:
            continue
        if not differences(config, again):
            return raw
    raise PretrainedError(
        f"no family among {', '.join(FAMILIES)} has models like {config}; a model that is to be saved for others has "
        "the fields of one of them: " + "; ".join(f"{name}: {dict(f.fixed)}" for name, f in FAMILIES.items())
    )


def _write(config: TransformerConfig, name: str) -> dict[str, Any]:
    gemma = name.startswith("gemma")
    kinds = [_SLIDING if config.pattern[i % len(config.pattern)] else _FULL for i in range(config.layers)]
    window = max(config.pattern)
    kind = "default" if config.rope_factor == 1 else "llama3" if config.rope_low_factor else "linear"
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = config.rope_factor
    if kind == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_low_factor,
            "high_freq_factor": config.rope_high_factor,
            "original_max_position_embeddings": config.rope_length,
        }
    rope = {**scaling, "rope_theta": config.rope_base}
    raw = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": _ACTIVATIONS[config.activation],
        "rope_parameters": rope,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling if kind != "default" else None,
        "attention_bias": False,
    }
    if name != "llama":
        raw |= {"layer_types": kinds, "sliding_window": window or None}
    if name.startswith("qwen"):
        raw["use_sliding_window"] = bool(window)
    if gemma:
        raw |= {
            "hidden_activation": _ACTIVATIONS[config.activation],
            "query_pre_attn_scalar": config.query_scale or config.head_width,
            "attn_logit_softcapping": config.attention_cap or None,
            "final_logit_softcapping": config.logit_cap or None,
        }
    if name == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.window_rope_base}
        raw |= {"rope_parameters": {_FULL: rope, _SLIDING: local}, "rope_local_base_freq": config.window_rope_base}
    return as_score(raw) if config.score else raw
