"""A GGUF file to a Hugging Face folder: transformers reads it (packages ``gguf`` and ``accelerate``), and what it
leaves wrong is put right.

A GGUF file names the token that ends a response by number. transformers takes the number into the model's
configuration, and gives the tokenizer another token; a run, or a server, that believes the tokenizer would wait for a
token that the model does not write.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from dcpo_megatron.weights.hf_folder import CheckpointError

PACKAGES = ("gguf", "accelerate")


def check_gguf(file: str | os.PathLike) -> None:
    """Raises :class:`CheckpointError` where ``file`` is no GGUF file, or a package that reads it is missing."""
    try:
        with open(file, "rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        raise CheckpointError(f"{file} is not a GGUF file: give a GGUF file or a Hugging Face folder")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"reading {file} needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: `pip install"
            f" --no-deps {' '.join(missing)}`"
        )


def gguf_to_hf(file: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Writes the model (fp32) and the tokenizer of ``file`` as a Hugging Face folder.

    Raises:
        CheckpointError: no GGUF file, a package is missing, or an architecture that transformers does not read from
            GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_gguf(file)
    file, folder = Path(file), Path(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{file} cannot be read by transformers: {' '.join(str(error).split())[:300]}") from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    end_as_the_model_does(folder)


def end_as_the_model_does(folder: str | os.PathLike) -> None:
    """Gives the tokenizer in ``folder`` the end (and padding) token that the model's configuration names, where it has
    another."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    end = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not isinstance(end, int) or tokenizer.eos_token_id == end:
        return
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    # Beside the tokens transformers keeps their numbers, which would speak against them.
    settings = {key: value for key, value in settings.items() if not key.endswith("_token_id")}
    settings |= dict.fromkeys(("eos_token", "pad_token"), tokenizer.convert_ids_to_tokens(end))
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
