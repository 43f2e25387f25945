"""GRPO (DeepSeekMath, arXiv 2402.03300) as pure functions in JAX.

Names are loaded when they are first used, so that `import grpo_jax` costs nothing, in reward workers too.
"""

import importlib
from typing import Any

_HOME = {
    "types": ("Policy", "Rollout", "SamplingParams", "TrainBatch", "TrainState"),
    "advantages": ("combine_rewards", "gae", "group_advantages", "process_advantages", "whiten"),
    "losses": (
        "clipped_surrogate",
        "dpo_loss",
        "fixed_length",
        "grpo_loss",
        "kl_k1",
        "kl_k2",
        "kl_k3",
        "policy_loss",
        "sequence_mean",
        "supervised_loss",
        "token_mean",
    ),
    "corrections": ("importance_correction", "top_entropies"),
    "objectives": ("LossConfig", "Objective", "grpo", "make_objective", "supervised"),
    "outcomes": ("AdvantageConfig", "Outcome"),
    "logprobs": ("completion_logprobs", "token_logprobs"),
    "sampling": ("generate",),
    "sampler": ("Sampler",),
    "data.tokenizer": ("ByteTokenizer",),
    "optimizers": ("OptimizerConfig", "make_optimizer"),
    "training": (
        "UpdateConfig",
        "init_train_state",
        "make_reference_logprobs",
        "make_train_step",
        "train_batch",
    ),
    "sharding": ("MeshConfig", "make_mesh"),
    "diagnosis": ("diagnose",),
    "models.transformer": ("TransformerConfig", "init_params", "make_policy"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"grpo_jax.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
