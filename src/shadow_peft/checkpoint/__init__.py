"""Saves and loads an adapter in either file dialect.

The modules of this package:

    mixin        what a `ShadowPeftModel` does with its tensors and files
    state_dicts  its state dict, also inside of other modules
    reading      what a folder holds of an adapter, read once and checked
    store        saving and loading as a whole: dialect, files, validation
    native       dialect A, `shadow-peft` 0.1.x: shadow_config.json + shadow_adapter.safetensors + shadow_modules.safetensors
    peft         dialect B, the Shadow tuner of `peft`: adapter_config.json + adapter_model.safetensors
    folder       what a folder holds, and whether a save may write there
    provenance   where an adapter comes from, written and read back
    arguments    what trainers pass to `save_pretrained`

How a save happens all or none, how files are read with errors that name what is wrong, and the hub: see `storage`.
"""
