"""The documentation's configuration: `python -m sphinx -W --keep-going -n -b html docs OUT`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import jadder  # noqa: E402  the path comes first

project = "jadder"
copyright = "the authors of jadder"
version = release = jadder.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "names",
    "gallery",
]
exclude_patterns = ["_build", "jupyter_execute"]
needs_sphinx = "8.1"
nitpicky = True
nitpick_ignore = [  # types of private fields, which have no page
    ("py:class", "jadder.adder_kernels.Layer"),
    ("py:class", "jadder.integer.hybrid.ByteProduct"),
]

# Names in single backticks, as the docstrings have them: a link where jadder has the name.
default_role = "name"
highlight_language = "none"  # what is Python says so

autodoc_default_options = {"members": True, "member-order": "bysource", "no-value": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shared arguments", "params_style")]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Pages are executed every time, so that none shows what the library no longer does.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300  # seconds for a cell, on a machine that does other things too
nb_merge_streams = True

html_theme = "furo"
html_title = "jadder"
html_theme_options = {
    "light_css_variables": {
        "sidebar-caption-space-above": "0.5rem",
        "sidebar-item-spacing-vertical": "0.25rem",
    }
}
html_static_path = ["_static"]
html_css_files = ["jadder.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
