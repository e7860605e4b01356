"""Saves and loads an adapter in either file dialect.

The modules of this package:

    store    saving and loading: dialect, validation, provenance
    native   dialect A, `shadow-peft` 0.1.x: shadow_config.json + shadow_adapter.safetensors + shadow_modules.safetensors
    peft     dialect B, the Shadow tuner of `peft`: adapter_config.json + adapter_model.safetensors
    mixin    the methods of `ShadowPeftModel`: state dicts, save_pretrained, from_pretrained, push_to_hub
"""
