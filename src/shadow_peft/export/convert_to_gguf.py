"""A program: llama.cpp's converter on a folder, with a name for a pre-tokenizer that it does not know by its hash.

    python convert_to_gguf.py LLAMA_CPP PRE_TOKENIZER FOLDER FILE TYPE

It imports llama.cpp's modules by their own names, so it is no module of this package.
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> None:
    """Convert, or end with one line on standard error."""
    llama_cpp, name, folder, file, outtype = sys.argv[1:]
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
    main()
