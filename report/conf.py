"""Sphinx settings of the report; report/build.py calls Sphinx with them."""

import re

project = "focalcal"
html_title = "focalcal: calibration and the focal loss"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
nb_execution_mode = "off"  # the notebooks come executed, from the pipeline
nb_ipywidgets_js = {}
nb_render_markdown_format = "gfm"  # tables in outputs, too
html_theme = "furo"
html_static_path = ["report.css", "theme.js", "tables.js", "charts.js"]
html_css_files = ["report.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = False
html_use_index = False
exclude_patterns = ["*.html"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "myst.xref_missing"]
add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # else PyTorch's
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"


def plain(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: paragraphs, ``code`` in double backticks, *emphasis*, and indented blocks of code."""
    shown = []
    for block in "\n".join(lines).strip().split("\n\n"):
        if block.startswith("    "):
            shown += ["::", "", *block.split("\n"), ""]
        else:
            shown += [_paragraph(" ".join(block.split())), ""]
    lines[:] = shown


def _paragraph(text: str) -> str:
    """As reStructuredText that says just this; the mark in front keeps it from being read as a list."""
    pieces = re.split(r"(``[^`]+``|(?<!\S)\*\w+\*(?!\S))", text)
    return r"\ " + "".join(p if i % 2 else re.sub(r"([\\*`|_])", r"\\\1", p) for i, p in enumerate(pieces))


def skip(app, what, name, obj, skipped, options):
    """Fields of a named tuple have no docstring of their own."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain)
    app.connect("autodoc-skip-member", skip)
