"""A program: llama.cpp's converter on a folder, with a name for a pre-tokenizer that it does not know by its hash.

    python convert_to_gguf.py LLAMA_CPP PRE_TOKENIZER FOLDER FILE TYPE REASON

Where it fails, REASON is a file with one line that says why: standard error also has what other libraries warn of, before
and after. It imports llama.cpp's modules by their own names, so it is no module of this package.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any


class LastError(logging.Handler):
    """Keeps the last error that was logged, which the converter does before it ends with a status alone."""

    text = "it does not say why"

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.text = record.getMessage()


def main() -> int:
    """Convert, or write the reason why not; the status of the program."""
    *words, reason = sys.argv[1:]
    logged = LastError(logging.ERROR)
    logging.getLogger().addHandler(logged)
    try:
        convert(*words)
    except SystemExit as end:
        said = end.code if isinstance(end.code, str) else logged.text
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        return 0
    Path(reason).write_text(" ".join(said.split()), encoding="utf-8")
    return 1


def convert(llama_cpp: str, name: str, folder: str, file: str, outtype: str) -> None:
    """Run the converter; `name` is that of the pre-tokenizer, or empty where llama.cpp has to know it."""
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    import convert_hf_to_gguf as converter
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def name_of(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not name:
                raise SystemExit("the way this tokenizer splits text before BPE is none that llama.cpp has") from None
            return name

    TextModel.get_vocab_base_pre = name_of
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", outtype]
    converter.main()


if __name__ == "__main__":
    sys.exit(main())
