"""The documentation: MyST Markdown in, HTML out; `make docs` treats every warning as an error."""

from importlib.metadata import version as version_of

project = "shadow-peft"
author = "the shadow-peft developers"
copyright = "2026, the shadow-peft developers"
version = release = version_of("shadow-peft")

extensions = [
    "myst_nb",  # Markdown, and the notebooks as they were executed
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a CDN
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "notebooks/*.md"]  # docs/notebooks is a link to examples/notebooks
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"shadow-peft {version}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

default_role = "code"  # docstrings put names between single backquotes
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["config.cache"]
