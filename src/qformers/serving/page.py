"""The page: Gradio lays it out, and everything it asks goes from the browser to /v1 like any other client's requests.

Gradio's own way, files and events through its server, is closed by the guard: it would take files to disk and fetch
addresses that a client names.
"""

from __future__ import annotations

import base64
from html import escape
from importlib.resources import files

import gradio as gr
from fastapi import FastAPI
from gradio.components import Component
from gradio.themes import Default

from qformers.errors import DataError
from qformers.search.table import scan
from qformers.serving.pictures import FORMATS
from qformers.serving.routes import jpeg_thumbnail
from qformers.serving.service import Service

EXAMPLES = 8
EMPTY = '<p class="qf-empty">{}</p>'


def mount_page(app: FastAPI, service: Service) -> None:
    """Put the page at "/", behind every other address."""
    resources = files("qformers.serving")
    script, style = (resources.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    gr.mount_gradio_app(
        app,
        _blocks(service),
        path="/",
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=style,
        head=f"<script>{script}</script>",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )


def _blocks(service: Service) -> gr.Blocks:
    with gr.Blocks(title="qformers", analytics_enabled=False) as page:
        gr.HTML('<h1 class="qf-title">qformers</h1>')
        with gr.Row(equal_height=False, elem_classes="qf-page"):
            with gr.Column(scale=2, min_width=260):
                gr.HTML(_picker(_examples(service)), js_on_load=None)
            with gr.Column(scale=3, min_width=260), gr.Tabs():
                if service.speaker is not None:
                    _tab("Caption", "caption", [], "A picture's caption, and where the queries looked.")
                    question = {"label": "Question", "placeholder": "what is to the left of the duck?"}
                    _tab("Ask", "ask", [question], "An answer, and where the queries looked.")
                if service.matcher is not None:
                    texts = {"label": "Texts, one a line", "placeholder": "a cat on a sofa\na red car", "lines": 3}
                    _tab("Match", "match", [texts], "How likely each text describes the picture.")
                if service.index is not None:
                    text = {"label": "Text, with the picture's help if one is ticked", "placeholder": "a cat on a sofa"}
                    _tab("Search", "search", [text], f"The best of {len(service.index)} pictures.", picture_too=True)
    return page


def _tab(title: str, name: str, boxes: list[dict], empty: str, picture_too: bool = False) -> None:
    """One thing to do: what it takes, a button, and the place of its answer."""
    with gr.Tab(title):
        inputs: list[Component] = [
            gr.Textbox(**{"lines": 1, **box}, max_length=2000, elem_id=f"qf-{name}-text") for box in boxes
        ]
        if picture_too:
            inputs.append(gr.Checkbox(False, label="Like my picture", elem_id=f"qf-{name}-picture"))
        button = gr.Button(title, variant="primary", elem_id=f"qf-{name}-button")
        answer = gr.HTML(EMPTY.format(escape(empty)), elem_id=f"qf-{name}-answer", js_on_load=None)
        # No function of Python's: the browser asks /v1.
        ask = {"fn": None, "inputs": inputs, "outputs": answer, "js": f"(...given) => qformers.{name}(...given)"}
        button.click(**ask)
        for box in inputs:
            if isinstance(box, gr.Textbox) and box.lines == 1:
                box.submit(**ask)


def _picker(examples: list[tuple[str, str]]) -> str:
    """The place of the picture, and some to try."""
    accept = ",".join(f".{kind.lower()}" for kind in (*FORMATS, "JPG", "TIF"))
    shown = "".join(
        f'<button type="button" class="qf-example" data-example="{source}" title="{escape(name, quote=True)}">'
        f'<img src="{source}" alt="{escape(name, quote=True)}"></button>'
        for name, source in examples
    )
    return (
        '<label class="qf-drop" for="qf-file"><span id="qf-hint">Choose a picture, or drop one here</span>'
        '<img id="qf-preview" alt="" hidden></label>'
        f'<input id="qf-file" type="file" accept="{accept}" aria-label="Picture">'
        '<p id="qf-error" role="alert"></p>'
        + (f'<div class="qf-examples" role="group" aria-label="Examples">{shown}</div>' if shown else "")
    )


def _examples(service: Service) -> list[tuple[str, str]]:
    """Names and small copies of some pictures of the index, spread over it."""
    if service.index is None:
        return []
    rows = sorted(scan(service.index.table, ["path", "caption"]).to_pylist(), key=lambda row: row["path"])
    found = []
    for row in rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]:
        try:
            content = jpeg_thumbnail(service, row["path"])
        except DataError:
            continue  # gone since it was indexed
        name = row["caption"] or row["path"]
        found.append((name, f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"))
    return found
