"""A program: llama.cpp's quantizer, out of its shared library.

    python quantize_gguf.py LIBRARY FULL FILE TYPE THREADS

TYPE is the number that llama.h gives the type. The program ends with llama.cpp's own status, 0 where the file is written. It
needs Python alone, and a process of its own, since llama.cpp ends a process that it cannot go on with.
"""

from __future__ import annotations

import ctypes
import sys


class Settings(ctypes.Structure):
    """`llama_model_quantize_params`: what is set here, and room for all that is not."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("others", ctypes.c_byte * 504))


def main() -> int:
    """Quantize a file."""
    library, full, file, kind, threads = sys.argv[1:]
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = Settings
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Settings))
    llama.llama_model_quantize.restype = ctypes.c_uint32
    settings = llama.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = int(threads), int(kind)
    return int(llama.llama_model_quantize(full.encode(), file.encode(), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.exit(main())
