"""The page, in Gradio: a prompt, four answers beside each other, and where base and shadow differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from transformers import PreTrainedTokenizerBase

from shadow_peft.playground.comparison import Answer, answers, encoded, opinions
from shadow_peft.playground.markup import CSS, answers_html, opinions_html
from shadow_peft.tasks.causal_lm import ShadowForCausalLM

LONGEST = 512
FONTS = ("system-ui", "sans-serif")


def make_page(
    model: ShadowForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, title: str
) -> gr.Blocks:
    """The page for a model in eval mode; it computes one request at a time.

    Args:
        model: the adapted base.
        tokenizer: its tokenizer; with a chat template the page offers to use it.
        prompt: what stands in the prompt's field at first.
        max_new_tokens: likewise the number of tokens, at most `LONGEST`.
        title: what the page says that it shows.
    """

    def compare(text: str, tokens: int, chat: bool) -> Iterator[tuple[str, str]]:
        try:
            inputs = encoded(tokenizer, text, chat, model.device)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        found: list[Answer] = []
        yield answers_html(found), ""
        for answer in answers(model, tokenizer, inputs, int(tokens)):
            found.append(answer)
            yield answers_html(found), ""
        attached = found[1]
        if attached.problem is None:
            yield answers_html(found), opinions_html(opinions(model, tokenizer, inputs, attached.ids))

    with gr.Blocks(title="shadow-peft playground", analytics_enabled=False) as page:
        gr.Markdown(f"# shadow-peft playground\n\n{title}")
        text = gr.Textbox(prompt, label="Prompt", lines=3, elem_id="prompt")
        with gr.Row():
            tokens = gr.Slider(1, LONGEST, max_new_tokens, step=1, label="Most new tokens", min_width=260, elem_id="tokens")
            can_chat = tokenizer.chat_template is not None
            chat = gr.Checkbox(False, label="As a user's message (chat template)", visible=can_chat, min_width=260)
        button = gr.Button("Answer", variant="primary", elem_id="answer")
        shown = gr.HTML(elem_id="answers")
        differing = gr.HTML(elem_id="opinions")
        # one at a time: the mode belongs to the model, and two generations at once would spoil the times
        button.click(compare, [text, tokens, chat], [shown, differing], concurrency_limit=1, show_progress="hidden")
    return page


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Begin to serve a page, in a thread of its own, and return its address; `page.close()` ends it.

    Nothing is loaded from elsewhere: fonts are the system's own, and Gradio reports nothing.

    Args:
        page: the page.
        host: the address to serve at.
        port: the port; None takes the first free one from 7860 on.

    Raises:
        OSError: the port is in use.
    """
    theme = gr.themes.Default(
        primary_hue="blue", font=[gr.themes.Font(name) for name in FONTS], font_mono=gr.themes.Font("monospace")
    ).set(button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700")
    options: dict[str, Any] = {"quiet": True, "share": False, "footer_links": [], "theme": theme, "css": CSS}
    _, address, _ = page.queue().launch(server_name=host, server_port=port, prevent_thread_lock=True, **options)
    return str(address)
