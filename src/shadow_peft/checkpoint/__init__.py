"""Checkpoints: an adapter saved and loaded in either file dialect, from a directory or the hub.

The files of this package:

    store    saving and loading as a whole: dialect, validation, provenance
    native   dialect A, `shadow-peft` 0.1.x: shadow_config.json + shadow_adapter.safetensors + shadow_modules.safetensors
    peft     dialect B, the Shadow tuner of `peft`: adapter_config.json + adapter_model.safetensors
    files    written all or none, read with errors that name what is wrong
    hub      where checkpoints are fetched from and pushed to
"""
