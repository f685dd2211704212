"""Sphinx: ``make docs`` builds the pages of this folder into ``build/docs``."""

import logging
from importlib.metadata import version as installed_version

logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)  # autodoc imports it, and Sphinx prints its log

project = "gathering_pipeline"
author = "the gathering_pipeline authors"
version = release = installed_version("gathering-pipeline").partition("+")[0]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = "gathering-pipeline"  # the hyphen is where the sidebar breaks it
highlight_language = "none"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_use_ivar = True
nitpicky = False
