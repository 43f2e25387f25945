"""The files of a Hugging Face directory: JSON, and which safetensors file holds which tensor."""

import json
import re
from typing import Any

from safetensors import SafetensorError, safe_open

from grpo_jax import storage
from grpo_jax.models.families import PretrainedError
from grpo_jax.models.layout import HEAD, Tensor
from grpo_jax.models.ranges import RangedFile

__all__ = ["DTYPES", "WeightFiles", "read_json"]

_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")  # written by old versions, and computed from the configuration
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_json(path: storage.Path) -> dict[str, Any]:
    """An object of a Hugging Face directory; raises PretrainedError where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        if (path.parent / "adapter_config.json").exists():
            raise PretrainedError(
                f"{path.parent} is an adapter and no model: name export/ beside it, or its run's workdir."
            ) from None
        found = storage.is_remote(path) or path.parent.exists()
        raise PretrainedError(
            f"there is no {f'{path.name} in' if found else 'directory'} {path.parent}: expected a directory as "
            "downloaded from the Hugging Face hub (`hf download NAME --local-dir=DIR` makes one)."
        ) from None
    except NotADirectoryError:
        raise PretrainedError(f"{path.parent} is a file; expected a directory, in which {path.name} is.") from None
    except (ValueError, OSError) as error:
        raise PretrainedError(f"cannot read {path}: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise PretrainedError(f"{path} holds a {type(value).__name__}; expected an object.")
    return value


class WeightFiles:
    """The safetensors files of a directory, and which tensor is in which.

    A file is opened for each tensor anew: what stays open stays mapped, and counts as the host's memory once read.
    """

    def __init__(self, directory: storage.Path):
        """Raises PretrainedError where there are none, or an index and its files do not belong together."""
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        single, weight_map = sorted(directory.glob("*.safetensors")), {}
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map or {*map(type, weight_map.values())} != {str}:
                raise PretrainedError(f"{index} has no weight_map from tensors to files: download it again.")
            names = sorted(set(weight_map.values()))
        elif (directory / "model.safetensors").exists():  # whatever else lies beside it
            names = ["model.safetensors"]
        elif len(single) == 1:
            names = [single[0].name]
        elif single:
            raise PretrainedError(
                f"{directory} holds {len(single)} safetensors files and no model.safetensors.index.json, which says "
                "what is in which: download it too."
            )
        else:
            pickles = sorted(path.name for path in directory.glob("*.bin")) + sorted(
                path.name for path in directory.glob("*.pt*")
            )
            raise PretrainedError(
                f"there are no safetensors files in {directory}"
                + (f", only {', '.join(pickles)}: pickles can run code and are not read. " if pickles else ". ")
                + "Download or convert the weights as safetensors."
            )
        self.names = names
        self._opened: dict[str, Any] = {}  # headers of a store's files, which hold nothing mapped
        held = {name: set(self._open(directory / name).keys()) for name in names}
        self.file_of = {tensor: name for name, tensors in held.items() for tensor in tensors} | weight_map
        for tensor, name in weight_map.items():
            if tensor not in held[name]:
                raise PretrainedError(
                    f"tensor {tensor} is missing from {directory / name}, though {index.name} says that it is there: "
                    "download both again."
                )

    @staticmethod
    def _open(path: storage.Path) -> Any:
        if not path.exists():
            raise PretrainedError(f"{path} is missing, though model.safetensors.index.json names it: download it.")
        try:
            return RangedFile(path) if storage.is_remote(path) else safe_open(path, "numpy")
        except (SafetensorError, OSError) as error:
            raise PretrainedError(f"{path} is truncated or corrupt ({error}): download it again.") from error

    def __getitem__(self, name: str) -> Any:
        file = self.directory / self.file_of[name]
        if not storage.is_remote(file):
            return self._open(file).get_slice(name)
        if file.name not in self._opened:
            self._opened[file.name] = self._open(file)
        return self._opened[file.name].get_slice(name)

    def where(self, name: str) -> str:
        """The tensor and its file, in words."""
        return f"tensor {name} of {self.directory / self.file_of[name]}"

    def check(self, wanted: list[Tensor]) -> None:
        """Raises PretrainedError unless exactly these tensors are there, in these shapes, as floating point."""
        files = ", ".join(self.names)
        missing = [t.name for t in wanted if t.name not in self.file_of]
        if missing:
            raise PretrainedError(
                f"{_listed(missing, 'tensor')} missing from {self.directory} ({files})"
                + ("; config.json says tie_word_embeddings=false, so the head must be there" if HEAD in missing else "")
                + ". config.json and the weights do not belong together, or the download is not complete."
            )
        extra = [name for name in self.file_of.keys() - {t.name for t in wanted} if not _BUFFERS.fullmatch(name)]
        if extra:
            file = self.file_of[min(extra)]
            raise PretrainedError(
                f"{_listed(sorted(extra), 'tensor')} in {self.directory / file}, unexpected: a model as config.json "
                "describes it has none such, and leaving it out would give another model."
            )
        for tensor in wanted:
            found = self[tensor.name]
            if tuple(found.get_shape()) != tensor.their_shape:
                raise PretrainedError(
                    f"{self.where(tensor.name)} has shape {tuple(found.get_shape())}; config.json makes it "
                    f"{tensor.their_shape}."
                )
            if found.get_dtype() not in DTYPES:
                raise PretrainedError(
                    f"{self.where(tensor.name)} is of type {found.get_dtype()}; expected one of {sorted(DTYPES)}: "
                    "convert it. (Quantized weights cannot be trained: take the original.)"
                )


def _listed(names: list[str], what: str) -> str:
    many = len(names) > 1
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{what}{'s' if many else ''} {shown} {'are' if many else 'is'}"
