"""`shadow-peft convert`: writes an adapter for peft's Shadow tuner, or one of peft's for this library."""

from __future__ import annotations

from pathlib import Path

from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.loading import load_model, named_base
from shadow_peft.cli.options import OPTIONS, ConvertOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.conversion import SHADOW_FOLDER, to_native, to_peft

DESCRIPTION = (
    "Writes an adapter of the variant peft for peft's Shadow tuner, or an adapter of that tuner for this library; both "
    "compute the same. Adapters of other variants have no equal in peft, and are refused with the reason."
)
EXAMPLES = """examples:
  shadow-peft train --model ./base --variant peft --data data.jsonl --output out
  shadow-peft convert out --to peft --output for-peft
"""


def run(arguments: list[str]) -> None:
    """Parse the options, load base and adapter, and write."""
    parser = VerbParser("convert", OPTIONS["convert"], DESCRIPTION, EXAMPLES)
    parser.add_argument("adapter", help="Folder or hub id of a shadow adapter")
    options, others = parse(parser, arguments)
    folder = _folder(options)
    with quiet_libraries():
        name = named_base(others.adapter) if options.model is None else options.model
        base = load_model(name, dtype="auto")
        try:
            (to_peft if options.to == "peft" else to_native)(base, others.adapter, folder)
        except (ValueError, OSError) as error:
            raise UserError(f"cannot convert {others.adapter!r}: {one_line(error)}") from error
    names = sorted(path.name for path in folder.iterdir())
    print(f"{folder}: {', '.join(names)}")
    if SHADOW_FOLDER in names:
        print(f"the adapter names its shadow by its place, {(folder / SHADOW_FOLDER).resolve()}: leave it there")


def _folder(options: ConvertOptions) -> Path:
    """The folder to write into.

    Raises:
        UserError: something is there.
    """
    folder = Path(options.output)
    if folder.is_file():
        raise UserError(f"--output {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder} is not empty; give another folder")
    return folder
