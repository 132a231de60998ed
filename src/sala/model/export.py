"""A checkpoint for another engine: checked by that engine's rules, and written as it wants it."""

import json
import shutil
from pathlib import Path

from sala.errors import CheckpointError
from sala.model.checkpoint import find_checkpoint, is_gguf, output_folder, read_json, shard_files
from sala.model.families import load_config
from sala.model.report import check_tensors
from sala.model.sglang import packing_obstacles, why_not_sglang

# beside config.json and the weights
BESIDE = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "*.jinja")
INDEX = "model.safetensors.index.json"
# of SGLang's own class: the program of a model is not asked for
OF_TRANSFORMERS = ("auto_map",)


def export_for_sglang(name: str | Path, out: Path) -> str:
    """Write a folder that SGLang's MiniCPM-SALA model loads, and return the command that serves it.

    Weights are linked where the file system allows it, else copied.

    Raises:
        CheckpointError: SGLang could not load it, or would compute something else: all reasons.
        InputError: `out` exists already.
    """
    folder = find_checkpoint(name)
    if is_gguf(folder):
        raise CheckpointError(f"{str(folder)!r} is a GGUF file; expected a checkpoint folder")
    config, fields = load_config(folder), read_json(folder / "config.json")
    check_tensors(folder, config)
    reasons = [*why_not_sglang(config, fields), *packing_obstacles(fields.get("quantization_config"))]
    if reasons:
        raise CheckpointError(
            f"SGLang cannot serve {str(name)!r}: {'; '.join(reasons)}; expected a hybrid of the released form"
        )
    with output_folder(out) as working:
        kept = {key: value for key, value in fields.items() if key not in OF_TRANSFORMERS}
        (working / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        files = [*shard_files(folder), *(path for pattern in BESIDE for path in folder.glob(pattern))]
        if (folder / INDEX).is_file():
            files.append(folder / INDEX)
        for path in dict.fromkeys(files):
            _link_or_copy(path, working / path.name)
    return f"python -m sglang.launch_server --model-path {out} --tp-size 1 --port 30000"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source.resolve())
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
