"""The output folder of a training: what a run leaves in it, what is refused, what `--overwrite` removes, where to resume."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from shadow_peft.checkpoint import peft
from shadow_peft.checkpoint.folder import FILES as ADAPTER_FILES
from shadow_peft.checkpoint.folder import others_in
from shadow_peft.cli.errors import UserError
from shadow_peft.config import CONFIG_FILE
from shadow_peft.storage.files import read_json

CARD, EXPORT, STATE = "README.md", "shadow", "trainer_state.json"

_RESULTS = ("all_results.json", "train_results.json", "eval_results.json", STATE, "training_args.bin", "losses.png")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
_MODEL = re.compile(
    r"(config|generation_config|model\.safetensors\.index)\.json|(model|pytorch_model)\b.*\.(safetensors|bin)"
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.saving-.*")
_SHARDED = re.compile(r"pytorch_model_fsdp.*|global_step\d+")
"""What FSDP and DeepSpeed write of a model that is spread over processes."""


def check_output(
    output: Path, sources: dict[str, str | None], *, resumes: str | None, overwrite: bool, export: bool, shadow: bool = True
) -> None:
    """Refuse a folder that something would be lost in.

    Args:
        output: folder of the run, which may be missing.
        sources: option -> folder, file or hub id that the run reads.
        resumes: the checkpoint that the run goes on from.
        overwrite: an old run may go.
        export: the run exports its shadow.
        shadow: the run trains a shadow, which is never saved beside a model or an adapter of others.

    Raises:
        UserError: saying what is there, and what to do.
    """
    if output.is_file():
        raise UserError(f"--output {output} is a file; give a folder")
    for option, place in sources.items():
        if place is not None and Path(place).exists() and output.resolve() == Path(place).resolve():
            raise UserError(f"--output {output} is what {option} reads, which is never written into; give another folder")
    if not output.is_dir():
        return
    model = sorted(path.name for path in output.iterdir() if _MODEL.fullmatch(path.name))
    if model:
        raise UserError(f"--output {output} holds a model ({model[0]}); give another folder")
    old = [path.name for path in old_run(output)]
    resumes_here = resumes is not None and Path(resumes).resolve().parent == output.resolve()
    there = others_in(output, but=() if resumes_here else old) if shadow else None
    if there:
        raise UserError(f"--output {output} holds {there}; give another folder")
    if resumes_here:
        if EXPORT in old and not export:
            raise UserError(f"{output / EXPORT} was exported from this run; add --export to renew it, or remove it")
        return
    if overwrite and old:
        return
    if old:
        named = ", ".join(old[:3]) + (", ..." if len(old) > 3 else "")
        raise UserError(
            f"--output {output} holds an earlier run ({named}); give another folder, --overwrite to replace it, "
            "or --resume_from_checkpoint last to go on with it"
        )
    others = [name for name in (CARD, EXPORT) if (output / name).exists()]
    if others:
        raise UserError(
            f"--output {output} holds {others[0]}, which is of no run and might be replaced; give another folder"
        )


def old_run(output: Path) -> list[Path]:
    """What an earlier run left in its output folder; nothing where no file shows that there was one."""
    here = sorted(output.iterdir()) if output.is_dir() else []
    ours = {*ADAPTER_FILES, *_RESULTS}
    found = [p for p in here if (p.name in ours and p.is_file()) or _is_checkpoint(p)]
    if not found or (_is_foreign(output) and not any(p.name in _RESULTS for p in here)):
        return []
    found += [p for p in here if p.name in TOKENIZER_FILES or _LEFTOVER.fullmatch(p.name)]
    if (output / EXPORT / "config.json").is_file():
        found.append(output / EXPORT)
    card = output / CARD
    if card.is_file() and "shadow-peft" in card.read_text(encoding="utf-8", errors="replace"):
        found.append(card)
    return found


def _is_foreign(output: Path) -> bool:
    """Whether the adapter in a folder is one of PEFT's methods; a run of ours with `--use_peft` leaves results beside it."""
    config = output / peft.CONFIG_FILE
    try:
        return config.is_file() and read_json(config).get("peft_type") != peft.PEFT_TYPE
    except ValueError:  # damaged: nobody's
        return False


def clear(output: Path) -> None:
    """Remove what `old_run` finds, and nothing else; of the exported shadow the files that an export has."""
    for path in old_run(output):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.name != EXPORT:
            shutil.rmtree(path)
        else:
            _clear_export(path)


def _clear_export(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and (path.name in TOKENIZER_FILES or _MODEL.fullmatch(path.name)):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and _CHECKPOINT.fullmatch(path.name) is not None


# ---------------------------------------------------------------- checkpoints


def checkpoint_to_resume(given: str | None, output: str) -> tuple[str | None, list[str]]:
    """The checkpoint to resume from, and a line about each newer one that is not finished.

    Args:
        given: a folder; "last" for the newest finished checkpoint in the output folder; None or "false" for none.
        output: the output folder.

    Raises:
        UserError: there is none.
    """
    if given is None or given.lower() == "false":
        return None, []
    if given.lower() not in ("last", "true"):
        missing = what_is_missing(Path(given))
        if missing:
            raise UserError(f"--resume_from_checkpoint {given} is no finished checkpoint of a trainer: {missing}")
        return given, []
    skipped: list[str] = []
    for folder in reversed(checkpoints(Path(output))):
        missing = what_is_missing(folder)
        if not missing:
            return str(folder), skipped
        skipped.append(f"{folder} is not finished, {missing}; it is skipped")
    why = "".join(f" ({line})" for line in skipped[:1])
    raise UserError(f"there is no finished checkpoint in {output} to resume from{why}; drop --resume_from_checkpoint")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in an output folder, finished or not, the newest last."""
    found = [path for path in output.iterdir() if _is_checkpoint(path)] if output.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed; None where it is finished. A trainer writes its state last."""
    if not folder.is_dir():
        return "it is no folder"
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE}"
    except (OSError, ValueError):
        return f"its {STATE} is damaged"
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"its {STATE} is damaged"
    if any(_SHARDED.fullmatch(path.name) for path in folder.iterdir()):
        return None
    weights = [path for path in folder.glob("*.safetensors") if path.name in ADAPTER_FILES]
    configs = [folder / name for name in (CONFIG_FILE, "adapter_config.json") if (folder / name).is_file()]
    if not weights or not configs:
        return "it has no adapter"
    return next((f"its {path.name} is damaged" for path in [*weights, *configs] if not _reads(path)), None)


def _reads(path: Path) -> bool:
    """Whether a file of weights is as long as it says, or a file of JSON holds an object."""
    try:
        if path.suffix == ".json":
            read_json(path)
        else:
            with safe_open(path, "pt"):
                pass
    except (SafetensorError, OSError, ValueError):
        return False
    return True
