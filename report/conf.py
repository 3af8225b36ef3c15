"""Sphinx settings of the report; report/build.py calls Sphinx with them."""

project = "focalcal"
html_title = "focalcal: calibration and the focal loss"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # the notebooks come executed, from the pipeline
nb_ipywidgets_js = {}
nb_render_markdown_format = "gfm"  # tables in outputs, too
html_theme = "furo"
html_static_path = ["report.css"]
html_css_files = ["report.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
exclude_patterns = ["*.html"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "myst.xref_missing"]
