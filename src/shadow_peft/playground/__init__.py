"""A page in the browser where a base and its shadow answer side by side.

comparison    the four answers to a prompt, and what both networks think of each token; needs no web library
markup        both as HTML
page          the page itself (Gradio)
"""
