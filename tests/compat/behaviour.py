"""How an adapted tiny Llama behaves in one of three implementations; the rows of the README's comparison.

    python tests/compat/behaviour.py shadow_peft     this library, or the published shadow-peft 0.1.x, whichever is installed
    python tests/compat/behaviour.py peft            the Shadow tuner of peft

Prints one line of JSON: question -> true, false or the error. Every question is asked of a fresh model whose adapter was
stirred, in float32 on the CPU, through public names alone.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY = 96
Model = Any


def make_base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Four random layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def attach_with_shadow_peft(base: LlamaForCausalLM) -> tuple[Model, Model]:
    """The adapted model, and the task model around it."""
    from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

    adapted = get_shadow_model(base, ShadowConfig(alpha=0.7, dropout=0.0))
    return adapted, ShadowForCausalLM(adapted).eval()


def attach_with_peft(base: LlamaForCausalLM) -> tuple[Model, Model]:
    """peft's model is both."""
    from peft import ShadowConfig, get_peft_model

    model = get_peft_model(base, ShadowConfig(task_type="CAUSAL_LM", shadow_alpha=0.7, shadow_dropout=0.0)).eval()
    return model, model


ATTACH = {"shadow_peft": attach_with_shadow_peft, "peft": attach_with_peft}


def adapted_and_task(library: str, base: LlamaForCausalLM) -> tuple[Model, Model]:
    """A fresh adapter whose up maps are not zero."""
    torch.manual_seed(1)
    adapted, task = ATTACH[library](base)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if "injection_ups" in name or "shadow_up." in name:
                parameter.normal_(std=0.3)
    return adapted, task


def ids(rows: int = 2, length: int = 9, seed: int = 2) -> torch.Tensor:
    """Token ids."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Model, **inputs: Any) -> torch.Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(**inputs).logits.float()


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to 1e-5."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5)


# ------------------------------------------------------------------ the questions


def bare_base_stays_bare(library: str) -> bool:
    """A call of the base itself gives the base's own logits while the adapter is attached."""
    base = make_base()
    before = logits(base, input_ids=ids())
    kept = adapted_and_task(library, base)
    return torch.equal(logits(base, input_ids=ids()), before) and bool(kept)


def dropped_wrapper_leaves_a_base(library: str) -> bool:
    """The base works, and is the base, when nothing refers to the adapted model any more."""
    base = make_base()
    before = logits(base, input_ids=ids())
    adapted_and_task(library, base)
    gc.collect()
    return torch.equal(logits(base, input_ids=ids()), before)


def base_keeps_its_names(library: str) -> bool:
    """The base's class, module names and state dict are what they were."""
    base = make_base()
    before = type(base), [n for n, _ in base.named_modules()], list(base.state_dict())
    kept = adapted_and_task(library, base)
    return bool(kept) and before == (type(base), [n for n, _ in base.named_modules()], list(base.state_dict()))


def unload_is_exact(library: str) -> bool:
    """`unload()` gives the base back, bit for bit."""
    base = make_base()
    before = logits(base, input_ids=ids())
    return torch.equal(logits(adapted_and_task(library, base)[0].unload(), input_ids=ids()), before)


def disable_is_exact(library: str) -> bool:
    """Inside `disable_adapter()` the model is the base, bit for bit."""
    base = make_base()
    before = logits(base, input_ids=ids())
    adapted, task = adapted_and_task(library, base)
    with adapted.disable_adapter():
        return torch.equal(logits(task, input_ids=ids()), before)


def left_padding_is_harmless(library: str) -> bool:
    """A left-padded row has the logits that it has alone, positions not being given."""
    _, task = adapted_and_task(library, make_base())
    row = ids(1)
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], 1), torch.ones(1, 12, dtype=torch.long)
    mask[:, :3] = 0
    alone = logits(task, input_ids=row, attention_mask=torch.ones_like(row))
    return near(logits(task, input_ids=padded, attention_mask=mask)[:, 3:], alone)


def cached_generation_is_exact(library: str) -> bool:
    """Greedy decoding gives the same tokens with a cache and without."""
    _, task = adapted_and_task(library, make_base())
    settings = {"attention_mask": torch.ones_like(ids()), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    return torch.equal(
        task.generate(input_ids=ids(), **settings), task.generate(input_ids=ids(), **settings, use_cache=False)
    )


@torch.no_grad()
def generations_interleave(library: str) -> bool:
    """Two cached decodings that take turns on one model are each right."""
    _, task = adapted_and_task(library, make_base())
    rows = [ids(1, seed=5), ids(1, seed=6)]
    caches = [task(input_ids=row[:, :6], use_cache=True).past_key_values for row in rows]
    steps: list[list[torch.Tensor]] = [[], []]
    for t in range(6, 9):
        for i, row in enumerate(rows):
            outputs = task(input_ids=row[:, t : t + 1], past_key_values=caches[i], use_cache=True)
            caches[i] = outputs.past_key_values
            steps[i].append(outputs.logits)
    return all(near(torch.cat(step, 1), logits(task, input_ids=row)[:, 6:]) for step, row in zip(steps, rows, strict=True))


def no_copy_of_the_head(library: str) -> bool:
    """Beside the base's own tensors there is none as large as its output embedding."""
    base = make_base()
    _, task = adapted_and_task(library, base)
    own = {p.data_ptr() for p in base.lm_head.parameters()} | {p.data_ptr() for p in base.model.embed_tokens.parameters()}
    size = base.lm_head.weight.numel()
    return not any(p.numel() == size and p.shape[0] == VOCABULARY and p.data_ptr() not in own for p in task.parameters())


def half_precision_base_trains(library: str) -> bool:
    """A bf16 base runs forward and backward out of the box, every trained parameter being float32."""
    _, task = adapted_and_task(library, make_base(torch.bfloat16))
    task.train()
    task(input_ids=ids(), labels=ids()).loss.backward()
    return all(p.dtype == torch.float32 for p in task.parameters() if p.requires_grad)


def rows_without_labels_are_finite(library: str) -> bool:
    """A batch whose labels are all -100 has a finite loss."""
    _, task = adapted_and_task(library, make_base())
    task.train()
    return bool(task(input_ids=ids(), labels=torch.full_like(ids(), -100)).loss.isfinite())


def trained(library: str, rows: int, steps: int, **options: Any) -> list[torch.Tensor]:
    """Trained tensors after one optimiser step on four rows with different numbers of labels."""
    _, task = adapted_and_task(library, make_base())
    data = [
        {"input_ids": row, "labels": row.clone().index_fill(0, torch.arange(i * 2), -100)}
        for i, row in enumerate(ids(4, 10))
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            learning_rate=1.0,
            optim="sgd",
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        Trainer(task, arguments, train_dataset=data).train()
    return [p.detach() for p in task.parameters() if p.requires_grad]


def trainer_trains(library: str) -> bool:
    """`transformers.Trainer` trains the adapter with default arguments."""
    _, task = adapted_and_task(library, make_base())
    before = [p.detach().clone() for p in task.parameters() if p.requires_grad]
    return any(not torch.equal(a, b) for a, b in zip(before, trained(library, 4, 1), strict=True))


def accumulation_is_exact(library: str) -> bool:
    """One step on 1 x 4 rows and on 4 x 1 rows with gradient accumulation moves every trained tensor alike."""
    at_once, in_parts = (trained(library, *batch, remove_unused_columns=False) for batch in ((4, 1), (1, 4)))
    pairs = zip(at_once, in_parts, strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


QUESTIONS: dict[str, Callable[[str], bool]] = {
    "calling the base gives the base's own logits": bare_base_stays_bare,
    "class, module names and state dict of the base stay": base_keeps_its_names,
    "dropping the wrapper leaves a working base": dropped_wrapper_leaves_a_base,
    "unload() gives the base back bit for bit": unload_is_exact,
    "disable_adapter() is the base bit for bit": disable_is_exact,
    "a left-padded row has the logits it has alone": left_padding_is_harmless,
    "greedy decoding is the same with and without a cache": cached_generation_is_exact,
    "two cached decodings may take turns": generations_interleave,
    "no copy of the output embedding": no_copy_of_the_head,
    "bf16 base, float32 adapter, out of the box": half_precision_base_trains,
    "labels that are all -100 give a finite loss": rows_without_labels_are_finite,
    "Trainer with default arguments trains it": trainer_trains,
    "gradient accumulation 1 x 4 = 4 x 1": accumulation_is_exact,
}


def main() -> None:
    """The command line."""
    library = sys.argv[1]
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answers: dict[str, bool | str] = {}
    for question, ask in QUESTIONS.items():
        try:
            answers[question] = ask(library)
        except Exception as error:
            answers[question] = f"{type(error).__name__}: {error}"[:160]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
