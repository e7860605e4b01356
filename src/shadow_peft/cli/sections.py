"""What the help of every verb shows of its options: sections with names of options, and shorter texts than TRL's."""

from __future__ import annotations

QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")

#: Verb -> title of a section of its help -> options in it. What stands in no section is shown by --help-all.
SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "demo": {"options": ("output", "smoke", "seed", "config")},
    "train": {
        "what to train": ("model", "data", "output", "task", "config", "overwrite", "resume_from_checkpoint", "export"),
        "data": (
            "data_name", "data_split", "eval_data", "eval_split", "eval_fraction", "prompt", "completion",
            "completion_if_missing", "class_column", "class_names", "chat", "chat_template_path", "dataset_text_field",
            "max_length", "packing",
        ),
        "shadow": (
            "variant", "num_shadow_layers", "injection_hidden_size", "gate_hidden_size", "output_hidden_size",
            "readout_hidden_size", "first_injected_layer", "alpha", "dropout", "shadow_model", "share_embeddings",
            "shadow_loss_weight", "distillation_weight", "distillation_temperature", "distillation_warmup_ratio",
        ),
        "training": (
            "learning_rate", "shadow_learning_rate_scale", "num_train_epochs", "max_steps", "per_device_train_batch_size",
            "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "seed", "logging_steps",
            "eval_strategy", "eval_steps", "early_stopping_patience", "early_stopping_threshold", "save_strategy",
            "save_steps", "save_total_limit", "dtype", "bf16", "activation_checkpointing", *QUANTIZATION, "use_cpu",
            "report_to", "push_to_hub", "hub_model_id",
        ),
        "LoRA baselines": (
            "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora",
        ),
    },
    "pretrain": {
        "what to train": ("model", "data", "output", "max_steps", "config", "resume"),
        "the shadow: layers of the base, or a small model": (
            "num_shadow_layers", "shadow_init_layers", "shadow_init", "shadow_hidden_size", "shadow_intermediate_size",
            "shadow_num_attention_heads", "shadow_num_key_value_heads", "small", "share_embeddings",
        ),
        "what it learns": ("align", "next_token_weight", "distillation_weight", "top_k", "teacher_cache"),
        "text": ("text_column", "data_name", "data_split", "data_licence", "context", "held_out", "shuffle_buffer"),
        "training": (
            "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "decay_fraction",
            "weight_decay", "eval_steps", "save_steps", "logging_steps", "seed", "dtype", "use_cpu", "compile",
        ),
    },
    "generate": {
        "what answers": ("model", "adapter", "shadow_only", "draft", "chat", "dtype", *QUANTIZATION, "config"),
        "how it answers (what is not given stays as the model's own file has it)": (
            "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "seed",
        ),
    },
    "classify": {"what answers": ("model", "adapter", "shadow_only", "dtype", *QUANTIZATION, "config")},
    "eval": {
        "what is scored": ("model", "adapter", "inference_mode", "dtype", *QUANTIZATION, "device", "config"),
        "by what": (
            "tasks", "include_path", "num_fewshot", "limit", "batch_size", "apply_chat_template", "seed", "output",
            "log_samples",
        ),
    },
    "convert": {"what is written": ("to", "output", "model", "config")},
    "cascade": {
        "who answers": (
            "adapter", "model", "remote_url", "remote_model", "timeout", "threshold", "takeover", "chat", "dtype",
            *QUANTIZATION, "config",
        ),
        "calibration": ("calibrate", "target", "promise", "confidence", "quality", "output"),
        "data": ("data", "prompt", "completion", "class_column", "batch_size"),
        "how they answer (what is not given stays as the model's own file has it)": (
            "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed",
        ),
    },
    "serve": {
        "what answers": (
            "adapter", "model", "base_name", "remote_url", "remote_model", "remote_timeout", "adapters_in_memory", "draft",
            "dtype", *QUANTIZATION, "device", "config",
        ),
        "where": ("host", "port", "api_key_file", "allowed_origins", "check"),
        "limits": ("max_prompt_tokens", "max_new_tokens", "max_queue", "timeout", "max_batch", "window"),
    },
    "export": {
        "what is written": (
            "to", "output", "overwrite", "model", "fold", "dtype", "type", "quantize", "config",
        ),
        "the page in the browser (--to html)": (
            "page_title", "page_about", "page_prompt", "remote_url", "remote_model", "threshold", "timeout",
        ),
        "what it is compared on": ("check", "check_prompts", "check_tokens"),
    },
    "playground": {
        "what answers": ("adapter", "model", "dtype", *QUANTIZATION, "config"),
        "the page": ("prompt", "max_new_tokens", "host", "port"),
    },
}  # fmt: skip

#: Options of `train` whose own text, mostly TRL's, is long or says little -> the text that the help shows.
TEXTS: dict[str, str] = {
    "variant": "Mathematics between the layers: readout is this library's, published and peft are those packages'.",
    "chat_template_path": "Chat template to use: a .jinja file, or a folder or hub id with a tokenizer.",
    "dataset_text_field": "Column of plain text to learn.",
    "max_length": "Longest example in tokens; what is longer is cut at its end.",
    "packing": "Fill sequences of --max_length with several examples.",
    "resume_from_checkpoint": "Go on from a checkpoint: last, which is the newest finished one in OUTPUT, or a folder.",
    "learning_rate": "Peak learning rate.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps; above 0 it overrides --num_train_epochs.",
    "per_device_train_batch_size": "Examples of one forward pass.",
    "gradient_accumulation_steps": "Forward passes of one optimizer step.",
    "lr_scheduler_type": "How the learning rate falls.",
    "warmup_steps": "Steps in which the learning rate rises; below 1, that part of the training.",
    "weight_decay": "Weight decay of the matrices.",
    "seed": "Seed of weights, dropout and order.",
    "logging_steps": "Steps between two lines of the log.",
    "eval_strategy": "When to evaluate, beside the end.",
    "eval_steps": "Steps between two evaluations.",
    "save_strategy": "When to save a checkpoint.",
    "save_steps": "Steps between two checkpoints.",
    "save_total_limit": "Keep only so many checkpoints.",
    "dtype": "Floating point numbers of the base; auto is its file's.",
    "bf16": "Compute in bfloat16 (mixed precision).",
    "activation_checkpointing": "Compute activations again instead of keeping them: less memory, about 20 percent slower.",
    "load_in_4bit": "Quantize the base to 4 bits, by bitsandbytes.",
    "load_in_8bit": "Quantize the base to 8 bits, by bitsandbytes.",
    "bnb_4bit_quant_type": "The 4 bit numbers: nf4 or fp4.",
    "use_bnb_nested_quant": "Quantize the scales of the 4 bit weights, too.",
    "use_cpu": "Compute on the CPU where there is a GPU, too.",
    "report_to": "Trackers to log to, such as tensorboard or wandb.",
    "push_to_hub": "Push the output folder to the hub.",
    "hub_model_id": "Repository to push to.",
    "use_peft": "Train LoRA on the same data instead of a shadow.",
    "lora_r": "Rank of LoRA.",
    "lora_alpha": "Factor of LoRA, over its rank.",
    "lora_dropout": "Dropout of LoRA.",
    "lora_target_modules": "Names of the layers that get LoRA, or all-linear.",
    "use_rslora": "Scale by the square root of the rank (rsLoRA).",
    "use_dora": "Train magnitude and direction apart (DoRA).",
}
