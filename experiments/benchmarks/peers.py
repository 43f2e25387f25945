"""The other side, and all that imports PyTorch: transformers' generate, TRL's trainer, tunix' sampler. (`.[parity]`)"""

import functools
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets  # what trl brings
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import selective_log_softmax

from experiments.benchmarks.workload import EOS, PAD, Workload, completion_reward
from grpo_jax.models.families import write_config
from grpo_jax.models.transformer import TransformerConfig

__all__ = [
    "RewardLog",
    "TrlSteps",
    "character_tokenizer",
    "grpo_trainer",
    "load_model",
    "logprobs",
    "number_tokenizer",
    "rollout",
    "tunix_rollout",
    "write_checkpoint",
]

transformers.utils.logging.disable_progress_bar()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_checkpoint(directory: pathlib.Path, config: TransformerConfig, seed: int) -> None:
    """A random model as transformers initializes and saves it, with no end in its generation configuration."""
    raw = write_config(config)
    torch.manual_seed(seed)
    model_config = transformers.AutoConfig.for_model(
        raw.pop("model_type"), **raw, pad_token_id=PAD, eos_token_id=None
    )  # fmt: skip
    with torch.device(DEVICE):
        transformers.AutoModelForCausalLM.from_config(model_config).save_pretrained(directory)


def load_model(directory: pathlib.Path, dtype: str = "float32") -> Any:
    """A model as one would load it: fused attention."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return model.to(DEVICE).eval()


class Lengths(transformers.LogitsProcessor):
    """Forbids the end before a row has its length and forces it there; a row of length T is cut, as ours is."""

    def __init__(self, limits: np.ndarray, tokens: int):
        """`limits`: [B] int32."""
        self._count = 0
        rows = {int(n) - 1: np.flatnonzero(limits == n) for n in np.unique(limits) if n < tokens}
        self._ending = {step: torch.from_numpy(of) for step, of in rows.items()}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of the next token; changed in place, for they are a copy of the logits."""
        scores[:, EOS] = -torch.inf
        if (rows := self._ending.get(self._count)) is not None:
            scores[rows] = -torch.inf
            scores[rows, EOS] = 0
        self._count += 1
        return scores


def rollout(workload: Workload, directory: pathlib.Path) -> Callable[[], np.ndarray]:
    """transformers' `generate` on the prompts, each G times as TRL has it: lengths [B] of the completions."""
    model = load_model(directory, workload.dtype)
    rows = torch.from_numpy(np.repeat(workload.prompt_ids, workload.group, axis=0)).long()
    config = transformers.GenerationConfig(
        max_new_tokens=workload.tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
        pad_token_id=PAD, eos_token_id=EOS, disable_compile=True,
    )  # fmt: skip

    def generate() -> np.ndarray:
        ids = rows.to(DEVICE)
        processors = transformers.LogitsProcessorList([Lengths(workload.limits.reshape(-1), workload.tokens)])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=processors
            )
        ended = (out[:, ids.shape[1] :] == EOS).cpu().numpy()
        return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, ended.shape[1])

    return generate


# TRL -------------------------------------------------------------------------------------------------


def _tokenizer(model: tokenizers.Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def number_tokenizer(vocab_size: int) -> Any:
    """`workload.NumberTokenizer` as transformers has tokenizers."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {str(i): i for i in range(2, vocab_size)}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return _tokenizer(model)


def character_tokenizer(token_bytes: Sequence[bytes | None]) -> Any:
    """A `ByteTokenizer` as transformers has tokenizers: a token a character, padding 0 and end 1."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {byte.decode(): i for i, byte in enumerate(token_bytes) if byte}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    split = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    model.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return _tokenizer(model)


def grpo_trainer(
    directory: pathlib.Path, out: pathlib.Path, tokenizer: Any, rows: Mapping[str, Sequence[Any]],
    rewards: Sequence[Any], *, dtype: str = "float32", callbacks: Sequence[Any] = (), **options: Any,
) -> Any:  # fmt: skip
    """TRL's trainer as one would have it for speed on this device: no logs, no checkpoints, nothing computed twice.

    `rows`: the columns of the prompts, in the order in which they are trained on. `options`: of `GRPOConfig`.
    """
    config = GRPOConfig(
        output_dir=str(out), report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
        use_cpu=DEVICE == "cpu", bf16=dtype == "bfloat16", gradient_checkpointing=False, shuffle_dataset=False,
        loss_type="grpo", use_bias_correction_kl=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"}, **options,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(directory), reward_funcs=list(rewards), args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(dict(rows)), callbacks=list(callbacks),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class RewardLog(transformers.TrainerCallback):
    """The mean reward of every step of a trainer, and the seconds that its steps have taken."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._elapsed = 0.0

    def of(self, trainer: Any) -> None:
        """Whose log it is."""
        self._trainer = trainer

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        """A clock."""
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        """The step has been generated, scored and learned from."""
        self._elapsed += time.perf_counter() - self._started
        reward = self._trainer._metrics["train"]["reward"][-1]
        self.rows.append({"step": len(self.rows) + 1, "reward": reward, "time/elapsed_seconds": self._elapsed})


class _Closed(Exception):
    pass


class TrlSteps(transformers.TrainerCallback):
    """TRL's trainer in its own loop, in a thread of its own, which takes a step whenever it is asked for one."""

    def __init__(self, workload: Workload, directory: pathlib.Path, out: pathlib.Path, *, microbatches: int = 1):
        """`microbatches`: gradients are accumulated over so many; 1: a step is one batch."""
        batch = workload.prompts * workload.group
        trainer = grpo_trainer(
            directory, out, number_tokenizer(workload.model.vocab_size), {"prompt": workload.texts}, [self._reward],
            dtype=workload.dtype, callbacks=[self], beta=0.04, learning_rate=1e-6, max_grad_norm=1.0,
            num_generations=workload.group, max_completion_length=workload.tokens, max_steps=1_000_000,
            per_device_train_batch_size=batch // microbatches, gradient_accumulation_steps=microbatches,
            temperature=1.0, seed=workload.seed,
        )  # fmt: skip
        self._workload, self._lengths, self._generation = workload, np.zeros(0), 0.0
        trainer.model.generate = functools.partial(self._generate, trainer.model.generate)
        self._asked: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self._thread.start()

    def __call__(self) -> dict[str, float]:
        """One step: generation, rewards, reference and update."""
        self._asked.put(True)
        done = self._done.get()
        if isinstance(done, BaseException):
            raise done
        self._workload.check(self._lengths, "trl")
        return {
            "seconds": done, "generation_seconds": self._generation, "update_seconds": done - self._generation,
        }  # fmt: skip

    def close(self) -> None:
        """Ends the loop."""
        self._asked.put(False)
        self._thread.join()

    def _train(self, trainer: Any) -> None:
        try:
            trainer.train()
        except _Closed:
            pass
        except BaseException as error:  # whoever waits for the step gets it
            self._done.put(error)

    def _reward(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        self._lengths = np.array([len(ids) for ids in completion_ids])
        return completion_reward(completion_ids=completion_ids, **columns)

    def _generate(self, generate: Callable[..., Any], *args: Any, **options: Any) -> Any:
        limits = self._workload.limits.reshape(-1)
        started = time.perf_counter()
        out = generate(
            *args, **options,
            logits_processor=transformers.LogitsProcessorList([Lengths(limits, self._workload.tokens)]),
        )  # fmt: skip
        self._generation = time.perf_counter() - started
        return out

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        """Waits until somebody wants a step."""
        if not self._asked.get():
            raise _Closed
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        """The optimizer has moved."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self._done.put(time.perf_counter() - self._started)


# Log-probabilities -----------------------------------------------------------------------------------


def logprobs(
    hidden: np.ndarray, kernel: np.ndarray, tokens: np.ndarray, weights: np.ndarray, *, chunked: bool
) -> Callable[[], float]:
    """TRL's log-probabilities and their gradients, of full logits or in the chunks that its trainers have: the loss.

    Args:
      hidden: [N, D] float32.
      kernel: [V, D] float32.
      tokens: [N] int32.
      weights: [N] float32, of the log-probabilities in the loss.
      chunked: without the full logits.
    """
    x, w = (torch.from_numpy(a).to(DEVICE).requires_grad_() for a in (hidden, kernel))
    ids, scale = torch.from_numpy(tokens).long().to(DEVICE), torch.from_numpy(weights).to(DEVICE)

    def run() -> float:
        x.grad = w.grad = None
        if chunked:
            per_token = ChunkedLogProbFunction.apply(x, w, None, ids, 1.0, 32_768, None, 1.0, ("entropy",))[0]
        else:
            per_token = selective_log_softmax(x @ w.T, ids)
        loss = (scale * per_token).sum()
        loss.backward()
        return float(loss.detach())

    return run


# tunix -----------------------------------------------------------------------------------------------


def tunix_rollout(workload: Workload, directory: pathlib.Path) -> Callable[[], np.ndarray]:
    """tunix' sampler on the prompts, each G times: lengths [B] of the completions, which can only be full."""
    import jax
    import jax.numpy as jnp
    from tunix.generate import sampler as tunix_sampler  # pyright: ignore[reportMissingImports]
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore[reportMissingImports]
    from tunix.models.qwen2 import params as qwen2_params  # pyright: ignore[reportMissingImports]

    ours = workload.model
    config = qwen2.ModelConfig(
        num_layers=ours.layers, vocab_size=ours.vocab_size, embed_dim=ours.width, hidden_dim=ours.mlp_width,
        num_heads=ours.heads, head_dim=ours.head_width, num_kv_heads=ours.kv_heads, rope_theta=int(ours.rope_base),
        norm_eps=ours.norm_epsilon, use_tied_embedding=True, dtype=jnp.dtype(workload.dtype),
    )  # fmt: skip
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        model = qwen2_params.create_model_from_safe_tensors(str(directory), config, mesh, jnp.dtype(workload.dtype))
    columns = workload.prompt_tokens + workload.tokens
    sampler = tunix_sampler.Sampler(
        model, number_tokenizer(ours.vocab_size),
        tunix_sampler.CacheConfig(
            cache_size=columns, num_layers=ours.layers, num_kv_heads=ours.kv_heads, head_dim=ours.head_width
        ),
    )  # fmt: skip
    texts = [text for text in workload.texts for _ in range(workload.group)]

    def generate() -> np.ndarray:
        out = sampler(
            texts, max_generation_steps=workload.tokens, max_prompt_length=workload.prompt_tokens, temperature=1.0,
            top_p=1.0, eos_tokens=[EOS], forbidden_tokens=[EOS], seed=workload.seed,
        )  # fmt: skip
        return np.array([len(ids) for ids in out.tokens])

    return generate
